"""The least time that a kernel can take on a target: from its multiply-adds and the bytes it must move, by formulas.

A formula is Python over a shape's letters, and is what docs/kernels.md prints. FLOPs are 2 for a multiply-add of a product; what
is elementwise is left out. Bytes count each tensor once, as read or as written, in bf16 where it is one: what is read twice
because it didn't stay in L2 comes on top.

    time >= max(FLOPs / peak rate of the matrix units, bytes / bandwidth of the memory)

Letters: T tokens, D width, F expert width, G width of the pre-activation (2F with a gate), E experts, K experts per token,
R = T K rows, V vocabulary, B entries of the vocabulary in a block, N tokens of the head.
"""

from collections.abc import Mapping
from typing import NamedTuple

from moesaic.kernels.inspection import TARGETS


class Work(NamedTuple):
    what: str
    flops: str
    bytes: str


# Layer of a 7B model and head of a 1B one: the first shape is that of SonicMoE's profile (arXiv 2512.14080, Figure 6).
LAYER = {"T": 24576, "D": 1536, "F": 256, "G": 512, "E": 128, "K": 8, "R": 24576 * 8}
HEAD = {"N": 8192, "D": 2048, "V": 50304, "B": 7296}

WORK: dict[str, Work] = {
    "topk": Work("top-K of scores", "0", "4*T*E + 12*T*K"),
    "permute": Work("metadata of routing", "0", "8*R + 3*8*R + 4*E"),
    "up": Work("up-projection, activation: H and A", "2*R*D*G", "2*T*D + 2*E*D*G + 2*R*G + 2*R*F + 8*R"),
    "down": Work("down-projection: Y", "2*R*D*F", "2*R*F + 2*E*D*F + 2*R*D"),
    "combine": Work("weighted sum of a token's rows", "0", "2*R*D + 12*R + 2*T*D"),
    "dactivation": Work("dA' and, from H, A', dH, dS", "2*R*D*F", "2*T*D + 2*E*D*F + 4*R*G + 2*R*F + 12*R"),
    "dx": Work("dX of each row", "2*R*D*G", "2*R*G + 2*E*D*G + 2*R*D"),
    "dw_up": Work("dW1", "2*R*D*G", "2*T*D + 2*R*G + 2*E*D*G + 8*R"),
    "dw_down": Work("dW2", "2*R*D*F", "2*T*D + 2*R*F + 2*E*D*F + 8*R"),
    "dcombine": Work("sum of a token's dX", "0", "2*R*D + 8*R + 2*T*D"),
    "head_forward": Work("logits to log-sum-exp", "2*N*D*V", "2*N*D + 2*V*D + 8*N*32"),
    "head_gradient": Work("gradient of the logits", "2*N*D*V", "2*N*D*(V/B) + 2*V*D + 2*N*V"),
    "head_dx": Work("dx, block by block", "2*N*D*V", "2*N*V + 2*V*D + 8*N*D*(V/B - 1) + 2*N*D"),
    "head_dw": Work("dW of the head", "2*N*D*V", "2*N*V + 2*N*D*(V/B) + 2*V*D"),
}


def amount(formula: str, shape: Mapping[str, int]) -> float:
    return float(eval(formula, {"__builtins__": {}}, dict(shape)))


def seconds(work: Work, shape: Mapping[str, int], target: str) -> float:
    """The least time, on one GPU of a target in bf16."""
    limits = TARGETS[target]
    return max(
        amount(work.flops, shape) / (limits.tflops * 1e12), amount(work.bytes, shape) / (limits.terabytes * 1e12)
    )


def table() -> str:
    """Markdown: every kernel's work at the shapes above, and the least microseconds on each target; * where memory limits."""
    heads = ["kernel", "FLOPs", "bytes", "GFLOP", "MB", *(f"{t.part}, us" for t in TARGETS.values())]
    lines = [heads, ["---"] * len(heads)]
    for name, work in WORK.items():
        shape = HEAD if name.startswith("head") else LAYER
        flops, moved = amount(work.flops, shape), amount(work.bytes, shape)
        times = []
        for target, limits in TARGETS.items():
            memory = moved / limits.terabytes > flops / limits.tflops
            times.append(f"{seconds(work, shape, target) * 1e6:.0f}{'*' if memory else ''}")
        lines.append(
            [work.what, f"`{work.flops}`", f"`{work.bytes}`", f"{flops / 1e9:.0f}", f"{moved / 1e6:.0f}", *times]
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
