"""Bytes one MoE layer's experts keep for backward, bf16, on the 12 shapes of SonicMoE's Table 9b, against others' formulas.

    python benchmarks/activation_memory.py

Ours is counted by running it: autograd's saved tensors, each storage once, on tensors without memory; index vectors and router
weights included, parameters not. The peers were not run; they are formulas of what their sources keep, for T tokens, width d,
expert width n, K experts per token:

    ScatterMoE     2Td + 6TKn + 2TKd    input, both halves and the activation, and the outputs row by row
    MoMoE          2Td + 4TKn + 2TKd    (github.com/tilde-research/MoMoE-impl, save_percent 100)
    torchtitan     8TKn + 6TKd          gathered input, three products, outputs and their fp32 copy

No peer's index vectors are counted. Another line compares the peak of a real forward and backward (fp32, CPU, a small
shape) with that of the specification, plain torch under autograd.
"""

import compare
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moesaic.kernels.permute import sort_slots
from moesaic.kernels.testing import PeakMemory, saved_bytes
from moesaic.moe import experts as module
from moesaic.moe.router import count_rows

MODELS = {"1.4B": (40960, 768), "7B": (24576, 1536), "30B": (32768, 4096), "120B": (32768, 4096)}
# n, E, K
SHAPES = {
    "1.4B": [(256, 128, 8), (512, 64, 4), (1024, 32, 2)],
    "7B": [(256, 128, 8), (512, 64, 4), (1024, 32, 2)],
    "30B": [(256, 256, 16), (512, 128, 8), (1024, 64, 4)],
    "120B": [(512, 256, 16), (1024, 128, 8), (2048, 64, 4)],
}
PEERS = {
    "ScatterMoE, formula": lambda t, d, n, k: 2 * t * d + 6 * t * k * n + 2 * t * k * d,
    "MoMoE, formula": lambda t, d, n, k: 2 * t * d + 4 * t * k * n + 2 * t * k * d,
    "torchtitan eager, formula": lambda t, d, n, k: 8 * t * k * n + 6 * t * k * d,
}


def ours(t: int, d: int, n: int, experts: int, k: int) -> int:
    module._forward_loop = module._forward_grouped  # what runs on CUDA
    with FakeTensorMode():
        x = torch.empty(t, d, dtype=torch.bfloat16, requires_grad=True)
        weights = torch.empty(t * k, requires_grad=True)
        w_up = torch.empty(experts, 2 * n, d, dtype=torch.bfloat16, requires_grad=True)
        w_down = torch.empty(experts, d, n, dtype=torch.bfloat16, requires_grad=True)
        ids = torch.zeros(t * k, dtype=torch.int64)
        rows = sort_slots(torch.arange(t).repeat_interleave(k), ids, count_rows(ids, experts), t, k)
        return saved_bytes(
            lambda: module._ExpertsOp.apply(x, weights, w_up, w_down, None, None, rows, "swiglu", 256), (w_up, w_down)
        )


def peaks() -> None:
    t, d, n, experts, k = 4096, 512, 64, 8, 4
    ids = torch.randint(0, experts, (t * k,))
    rows = sort_slots(torch.arange(t).repeat_interleave(k), ids, count_rows(ids, experts), t, k)
    found = []
    for experts_op in (module._ExpertsOp.apply, lambda *arguments: module.experts_reference(*arguments[:-1])):
        x, weights = torch.randn(t, d, requires_grad=True), torch.rand(t * k, requires_grad=True)
        w_up = torch.randn(experts, 2 * n, d, requires_grad=True)
        w_down = torch.randn(experts, d, n, requires_grad=True)
        with PeakMemory() as watch:
            experts_op(x, weights, w_up, w_down, None, None, rows, "swiglu", 256).sum().backward()
        found.append(watch.peak / 2**20)
    case = f"peak of forward + backward, T {t}, D {d}, F {n}, E {experts}, K {k}, fp32, on a CPU"
    compare.report("activation_memory", case, *found, "plain torch", "MiB", more_is_better=False)


def main() -> None:
    peaks()
    for model, (t, d) in MODELS.items():
        for n, experts, k in SHAPES[model]:
            mine = ours(t, d, n, experts, k) / 2**20
            for name, formula in PEERS.items():
                case = f"{model}: T {t}, d {d}, n {n}, E {experts}, K {k}, bf16"
                theirs = formula(t, d, n, k) / 2**20
                compare.report("activation_memory", case, mine, theirs, name, "MiB", more_is_better=False)


if __name__ == "__main__":
    main()
