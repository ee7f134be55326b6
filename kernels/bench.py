"""Times of the kernels on a GPU, beside torch's own operations. Nothing is timed that is not right.

    python -m moesaic.kernels.bench [--only NAME]          (make bench-gpu)

Each case's results and gradients are compared with the peer's first; where they differ by more than the tolerance the case is
red: it is not timed, and the command exits 1. (`make test-gpu` compares with fp64.) Times are medians of Triton's do_bench,
which empties L2 before each call, the sides in turns. A line is one JSON object, as of benchmarks/, with the least time of
moesaic.kernels.roofline beside it. Without a GPU the command says so in one line and exits 2.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.kernels.roofline import HEAD, LAYER, WORK, seconds
from moesaic.kernels.tiles import TILES, target_name

DEVICE = "cuda"
ROUNDS = 5
TOLERANCE = 2e-2  # of bf16 results and gradients, relative to their largest


class Case(NamedTuple):
    """`ours` and `peer`: functions without arguments that give results and gradients by name. `parts`: names in roofline.WORK
    whose least times add up to that of what is timed."""

    name: str
    ours: Callable[[], Mapping[str, Tensor]]
    peer: Callable[[], Mapping[str, Tensor]]
    peer_name: str
    parts: tuple[str, ...]
    shape: Mapping[str, int]


def head(device: torch.device, shape: Mapping[str, int] = HEAD) -> Iterator[Case]:
    from moesaic.kernels.cross_entropy_triton import fused_linear_cross_entropy

    n, d, v = shape["N"], shape["D"], shape["V"]
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(n, d, device=device, generator=generator).bfloat16().requires_grad_()
    w = (torch.randn(v, d, device=device, generator=generator) / d**0.5).bfloat16().requires_grad_()
    targets = torch.randint(v, (n,), device=device, generator=generator)

    def side(loss: Callable[[], Tensor]) -> Callable[[], Mapping[str, Tensor]]:
        def run() -> Mapping[str, Tensor]:
            value = loss()
            dx, dw = torch.autograd.grad(value, (x, w))
            return {"loss": value, "dx": dx, "dw": dw}

        return run

    chunk = 2 * n * shape["B"]
    yield Case(
        "output head and cross entropy, forward and backward",
        side(lambda: fused_linear_cross_entropy(x, w, targets, -100, chunk)),
        side(lambda: F.cross_entropy((x @ w.T).float(), targets, reduction="sum")),
        "torch linear, then cross_entropy in fp32",
        ("head_forward", "head_gradient", "head_dx", "head_dw"),
        shape,
    )


def experts(device: torch.device, shape: Mapping[str, int] = LAYER) -> Iterator[Case]:
    """A layer's experts, tokens chosen at random and evenly; then single products of it. The peers are torch's grouped_mm."""
    from moesaic.kernels import experts as kernels
    from moesaic.kernels import grouped_gemm, tiles
    from moesaic.kernels.permute import sort_slots

    t, d, f, g, e, k = (shape[letter] for letter in "TDFGEK")
    generator = torch.Generator(device).manual_seed(0)

    def normal(*sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*sizes, device=device, generator=generator) * scale).bfloat16().requires_grad_()

    x, w_up, w_down = normal(t, d), normal(e, g, d, scale=d**-0.5), normal(e, d, f, scale=f**-0.5)
    scores, chosen = torch.rand(t, e, device=device, generator=generator).topk(k)
    counts = torch.bincount(chosen.flatten(), minlength=e)
    tokens = torch.arange(t, device=device).repeat_interleave(k)
    rows = sort_slots(tokens, chosen.flatten(), counts, t, k)
    weights = (scores / k).flatten()[rows.slot_R].requires_grad_()
    ends, dy = counts.cumsum(0).int(), normal(t, d).detach()

    def composed_up(x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.grouped_mm(x[rows.source_R], w_up.mT, offs=ends)
        return h, F.silu(h[:, :f]) * h[:, f:]

    def composed() -> Tensor:
        y = F.grouped_mm(composed_up(x)[1], w_down.mT, offs=ends).float() * weights[:, None]
        return y[rows.bag].sum(dim=1).bfloat16()

    def differentiated(layer: Callable[[], Tensor]) -> Callable[[], Mapping[str, Tensor]]:
        def run() -> Mapping[str, Tensor]:
            y = layer()
            grads = torch.autograd.grad(y, (x, weights, w_up, w_down), dy)
            return {"y": y, **dict(zip(("dx", "dweights", "dw_up", "dw_down"), grads, strict=True))}

        return run

    arguments = (x, weights, w_up, w_down, None, None, rows.source_R, rows.bag, None, counts, "swiglu")
    parts = ("up", "down", "combine", "dactivation", "dx", "dw_up", "dw_down", "dcombine")
    peer = "torch index, grouped_mm, silu, sum"
    layer = differentiated(lambda: kernels.experts(*arguments))
    yield Case("experts, forward and backward", layer, differentiated(composed), peer, parts, shape)

    x, w_up, w_down = x.detach(), w_up.detach(), w_down.detach()
    up_tile, down_tile = (tiles.gemm_tile(device, "varlen_m", width) for width in (g, d))
    plan = grouped_gemm.schedule(counts, up_tile.m)
    h, a = composed_up(x)
    yield Case(
        "up-projection with SwiGLU",
        lambda: dict(zip("ha", kernels.up(x, rows.source_R, w_up, None, plan, up_tile, "swiglu"), strict=True)),
        lambda: dict(zip("ha", composed_up(x), strict=True)),
        "torch index, grouped_mm, silu",
        ("up",),
        shape,
    )
    yield Case(
        "down-projection",
        lambda: {"y": grouped_gemm.varlen_m(a, w_down, plan, down_tile)[0]},
        lambda: {"y": F.grouped_mm(a, w_down.mT, offs=ends)},
        "torch grouped_mm",
        ("down",),
        shape,
    )
    k_tile = tiles.gemm_tile(device, "varlen_k", d)
    yield Case(
        "weight gradient of the up-projection",
        lambda: {"dw": grouped_gemm.varlen_k(h, x, plan, k_tile, rows.source_R, gather="right")[0]},
        lambda: {"dw": F.grouped_mm(h.mT, x[rows.source_R], offs=ends)},
        "torch index, grouped_mm",
        ("dw_up",),
        shape,
    )


CASES: dict[str, Callable[..., Iterator[Case]]] = {"experts": experts, "head": head}


def wrong(case: Case) -> str | None:
    """Why the case is red, or None."""
    ours, peer = case.ours(), case.peer()
    if ours.keys() != peer.keys():
        return f"results {sorted(ours)}, of the peer {sorted(peer)}"
    for name, want in peer.items():
        got, want = ours[name].double(), want.double()
        error, size = (got - want).abs().max().item(), want.abs().max().item()
        if not error <= TOLERANCE * size:  # also where it is NaN
            return f"{name} is off by {error / size if size else error:.1e} of its size, allowed {TOLERANCE:.0e}"
    return None


def milliseconds(run: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, return_mode="median"))


def times(case: Case) -> tuple[float, float]:
    """Median seconds of (ours, peer), called in turns."""
    ours: list[float] = []
    peer: list[float] = []
    for i in range(ROUNDS):
        for mine in (True, False) if i % 2 == 0 else (False, True):
            (ours if mine else peer).append(milliseconds(case.ours if mine else case.peer) / 1e3)
    return statistics.median(ours), statistics.median(peer)


def no_gpu() -> str | None:
    """The line that says why nothing can run here, or None."""
    if not torch.cuda.is_available():
        return "error: no GPU (torch.cuda.is_available() is False); without one, `make test` interprets the kernels"
    try:
        target_name(torch.device("cuda"))
    except ValueError:
        return f"error: {torch.cuda.get_device_name()}: kernels have tiles for {', '.join(n for n in TILES if n != 'cpu')} only"
    return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="time the kernels on a GPU, beside torch's own operations")
    parser.add_argument("--only", action="append", choices=list(CASES))
    parser.add_argument(
        "--only-check-gpu", action="store_true", help="say whether there is a GPU that they can run on, and end"
    )
    given = parser.parse_args(arguments)
    if line := no_gpu():
        print(line, file=sys.stderr)
        return 2
    if given.only_check_gpu:
        return 0
    device, red = torch.device(DEVICE), 0
    target = target_name(device)
    for name in given.only or CASES:
        for case in CASES[name](device):
            sizes = " ".join(f"{letter}={size}" for letter, size in case.shape.items())
            if why := wrong(case):
                red += 1
                print(f"RED {case.name}, {sizes}: {why}; not timed", file=sys.stderr)
                continue
            ours, peer = times(case)
            least = sum(seconds(WORK[part], case.shape, target) for part in case.parts)
            head = {"benchmark": "kernels", "case": f"{case.name}, {sizes}, bf16, {torch.cuda.get_device_name()}"}
            figures = {
                "ours": ours * 1e3,
                "peer": peer * 1e3,
                "peer_name": case.peer_name,
                "unit": "ms",
                "ratio": peer / ours,
            }
            print(json.dumps(head | figures | {"least": least * 1e3, "of_roofline": least / ours}), flush=True)
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
