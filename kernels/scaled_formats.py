"""What matrix units multiply of quantized numbers, and which device has which. The one table that kernels and recipes read.

    fp8      e4m3 codes, fp32 scales of blocks of 128: of any target's fp8 products, the scales in fp32 around them
    mxfp8    e4m3 codes, mxfp4 e2m1 codes, e8m0 scales of 32; nvfp4 e2m1 codes, e4m3 scales of 16: of products that take scales

Without Triton, so that a run can ask before it chooses.
"""

from dataclasses import dataclass

import torch

from moesaic.kernels.quantize import Format, Packed


@dataclass(frozen=True)
class Scaled:
    """element: of codes, as `tl.dot_scaled` names it. group: columns that share a scale. scale: its type."""

    element: str
    group: int
    scale: torch.dtype

    @property
    def pack(self) -> int:
        """Codes a byte."""
        return 2 if self.element == "e2m1" else 1


FORMATS = {
    "fp8": Scaled("e4m3", 128, torch.float32),
    "mxfp8": Scaled("e4m3", 32, torch.float8_e8m0fnu),
    "mxfp4": Scaled("e2m1", 32, torch.float8_e8m0fnu),
    "nvfp4": Scaled("e2m1", 16, torch.float8_e4m3fn),
}
# sm_90a has no mx products: Triton makes bf16 of codes and scales first, which loses nothing but a scale of 2^-127, then 0.
TARGETS_OF = {
    "fp8": ("sm_90a", "sm_100a", "gfx942", "gfx950", "cpu"),
    "mxfp8": ("sm_90a", "sm_100a", "gfx950", "cpu"),
    "mxfp4": ("sm_90a", "sm_100a", "gfx950", "cpu"),
    "nvfp4": ("sm_100a", "cpu"),
}
STORED = {"fp32": torch.float32, "pow2": torch.float32, "e8m0": torch.float8_e8m0fnu, "e4m3": torch.float8_e4m3fn}


def name_of(form: Format) -> str:
    """The name of the format in FORMATS that a cast gives; raises ValueError where matrix units have none such."""
    for name, known in FORMATS.items():
        if (form.element, form.block[1], STORED[form.scale]) == (known.element, known.group, known.scale):
            return name
    raise ValueError(
        f"element={form.element}, block={form.block[0]}x{form.block[1]}, scale={form.scale}: no matrix unit multiplies it; "
        "those that do: e4m3 with fp32 scales of 128 columns, e4m3 or e2m1 with e8m0 scales of 32, e2m1 with e4m3 scales of 16"
    )


def format_of(packed: Packed) -> str:
    """`name_of` a packed matrix."""
    return name_of(packed.format)
