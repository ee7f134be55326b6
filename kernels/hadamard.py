"""Rotation of a product's contraction by a Hadamard matrix with random signs, so that no value of a block stands out.

    rotate(x)_j = n^(-1/2) sum_i H_ij s_i x_i        within each run of n = 16, 32, 64 or 128 columns; s_i = +1 or -1

H is Sylvester's: H_ij = -1 to the number of bits that i and j share. H / sqrt(n) is orthogonal and its own inverse, so
rotating both operands of a product by the same n and signs leaves the product as it was.

**The signs stand before the rotation.** Signs behind it, s_j sum_i H_ij x_i, change nothing: a quantizer that treats x and -x
alike commutes with them, and its error stays the same draw after draw. (Quartet's published code has them there,
arXiv 2505.14669; Quartet II put it right.)

Letters: N rows, K columns, n the size of the rotation.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.kernels.products import mm

SIZES = (16, 32, 64, 128)


@functools.cache
def hadamard(size: int, device: torch.device) -> Tensor:
    """(n, n), entries +1 and -1, fp32."""
    assert size in SIZES, size
    matrix = torch.ones(1, 1, device="cpu")  # made on the host, which waits for the copy: streams share it
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix.to(device)


def rotation(size: int, signs_n: Tensor | None, device: torch.device) -> Tensor:
    """(n, n): what a run of n columns is multiplied with."""
    matrix = hadamard(size, device) * size**-0.5
    return matrix if signs_n is None else signs_n[:, None] * matrix


def rotate(x_NK: Tensor, size: int, signs_n: Tensor | None = None) -> Tensor:
    """The rotated x, fp32, its columns first padded with zeros to a multiple of n: the padding takes part in the product. No
    gradient."""
    if x_NK.shape[-1] % size:
        x_NK = F.pad(x_NK, (0, -x_NK.shape[-1] % size))
    return mm(x_NK.reshape(-1, size), rotation(size, signs_n, x_NK.device)).view(x_NK.shape)


def rotate_back(y_NK: Tensor, size: int, signs_n: Tensor | None, columns: int) -> Tensor:
    """The x of which `rotate` made y, or the gradient of x from that of y; without the padding."""
    return mm(y_NK.reshape(-1, size), rotation(size, signs_n, y_NK.device).T).view(y_NK.shape)[..., :columns]
