"""Triton kernels that other packages ship, compiled for four targets by the same command as ours, and read the same way.

    python benchmarks/kernels_compile.py [--write]        needs no GPU; about two minutes on two cores

liger-kernel's fused MoE layer, forward and backward, by the configuration that LIGER_FUSED_MOE_AUTOTUNE=0 pins; its cross
entropy, rotary embedding and RMSNorm; torchao's blockwise fp8 product, by the first configuration listed. Their launchers run on
meta tensors, and what they launch is compiled. Nothing is timed: a binary says what limits a kernel, not how fast it is.

A line compares the share of the matrix units' time that the main loop leaves room for (docs/kernels.md says how it is counted)
in two kernels of the same product. `--write` puts the table of all rows into results/kernels_compile.md, with date and versions.
"""

import argparse
import datetime
import importlib.metadata
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import compare
import torch
from torch._library.triton import set_wrap_triton_enabled

from moesaic.kernels import inspection, targets
from moesaic.kernels.targets import Cases, meta

# The layer of docs/kernels.md, and its head.
T, D, F, E, K = 24576, 1536, 256, 128, 8
N, WIDTH, V = 8192, 2048, 50304
PAGE = Path(__file__).parent / "results/kernels_compile.md"
# Ours, the peer's: the same product.
PAIRS = [
    ("experts.up", "fused_up_proj_swiglu", "up-projection and SwiGLU"),
    ("experts.dact", "moe_bwd_down_proj", "dA', dH, dS"),
    ("grouped_gemm.varlen_m", "fused_down_proj", "down-projection"),
    ("grouped_gemm.varlen_k", "moe_bwd_dW1", "dW1"),
]


def liger_moe() -> None:
    from liger_kernel.ops.fused_moe import BLOCK_M_TOKEN, LigerFusedMoEFunction

    x, up, down = (meta(*shape).requires_grad_() for shape in ((T, D), (E, 2 * F, D), (E, D, F)))
    chosen, weights = meta(T, K, dtype=torch.int32), meta(T, K).requires_grad_()
    # It waits for one number, of tiles, which a meta tensor doesn't have.
    with mock.patch.object(torch.Tensor, "item", return_value=T * K // BLOCK_M_TOKEN + E):
        LigerFusedMoEFunction.apply(x, up, down, chosen, weights).sum().backward()


def liger_cross_entropy() -> None:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    x, w = meta(N, WIDTH).requires_grad_(), meta(V, WIDTH).requires_grad_()
    with mock.patch.object(torch.Tensor, "item", return_value=N):
        LigerFusedLinearCrossEntropyFunction.apply(x, w, meta(N, dtype=torch.int64))


def liger_norm() -> None:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    LigerRMSNormFunction.apply(meta(T, D), meta(D), 1e-6)


def liger_rope() -> None:
    from liger_kernel.ops.rope import LigerRopeFunction

    table = meta(1, 4096, 128)
    LigerRopeFunction.apply(meta(6, 24, 4096, 128), meta(6, 24, 4096, 128), table, table)


def torchao_fp8() -> None:
    from torchao.prototype.blockwise_fp8_training import kernels

    fp8 = torch.float8_e4m3fn
    for kernel in (kernels.triton_fp8_gemm_1x128_128x128_kernel, kernels.triton_fp8_gemm_1x128_128x1_kernel):
        kernel.configs = kernel.configs[:1]
    rows, deep, wide = 8192, 2048, 4096
    a, b = meta(rows, deep, dtype=fp8), meta(wide, deep, dtype=fp8).T
    scales = [meta(*shape, dtype=torch.float32).T for shape in ((deep // 128, rows), (wide // 128, deep // 128))]
    # The function behind the operation, which on a meta tensor would launch nothing.
    with set_wrap_triton_enabled(False):
        kernels.triton_fp8_gemm_1x128_128x128._init_fn(a, b, *scales)


def version(package: str) -> str:
    return f"{package} {importlib.metadata.version(package)}"


def compile_cases(target: str) -> Cases:
    os.environ["LIGER_FUSED_MOE_AUTOTUNE"] = "0"  # read when it is imported
    liger, ao = version("liger-kernel"), version("torchao")
    hip = "6.4" if target.startswith("gfx") else None

    def on_target(run: Callable[[], None]) -> Callable[[], None]:
        """As its package runs it there: it asks torch which GPUs it was built for."""
        return mock.patch.object(torch.version, "hip", hip)(run)

    cases = {
        f"{liger}, MoE T {T}, D {D}, F {F}, E {E}, K {K}, bf16": liger_moe,
        f"{liger}, head N {N}, D {WIDTH}, V {V}, bf16": liger_cross_entropy,
        f"{liger}, RMSNorm {T} x {D}, bf16": liger_norm,
        f"{liger}, RoPE 6 x 4096 x 24 x 128, bf16": liger_rope,
        f"{ao}, blockwise fp8": torchao_fp8,
    }
    return {name: on_target(run) for name, run in cases.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    jobs = os.cpu_count() or 1
    theirs = list(targets.compile_all(["kernels_compile"], targets.TARGETS, jobs))
    pairs = {ours.split(".")[0] for ours, _, _ in PAIRS}
    ours = list(targets.compile_all(sorted(pairs & set(targets.modules())), targets.TARGETS, jobs))

    def best(rows: list[Any], kernel: str, target: str) -> float:
        """Of a kernel's bf16 rows without a fault."""
        found = [r.share or 0.0 for r in rows if r.kernel.endswith(kernel) and r.target == target and "bf16" in r.case]
        return max(found, default=0.0)

    for mine, peer, what in PAIRS:
        for target in targets.TARGETS:
            shares = best(ours, mine, target), best(theirs, peer, target)
            if all(shares):
                compare.report(
                    "kernels_compile",
                    f"{what}, {target}",
                    *shares,
                    version("liger-kernel"),
                    "matrix share",
                    more_is_better=True,
                )
    for row in theirs:
        print(row.line(), file=sys.stderr)
    if given.write:
        faults = "".join(f"- {r.target} {r.kernel}: {'; '.join(r.faults())}\n" for r in theirs if r.faults())
        PAGE.write_text(
            f"# Kernels of other packages, compiled by `python benchmarks/kernels_compile.py --write`\n\n"
            f"{datetime.date.today()}, torch {torch.__version__}, {version('triton')}, {version('liger-kernel')}, "
            f"{version('torchao')}. Columns: [docs/kernels.md](../../docs/kernels.md).\n\n{inspection.table(theirs)}\n"
            f"What would fail as a row of ours:\n\n{faults}"
        )


if __name__ == "__main__":
    main()
