"""Output head and cross entropy in one operation, against the two of torch: time and peak memory of forward and backward.

    python benchmarks/cross_entropy.py

fp32, two threads. Peak: the most bytes of storages alive at once that the operations made, inputs not counted. Where losses or
gradients differ, nothing is timed.
"""

from collections.abc import Callable

import compare
import torch
from torch import Tensor

from moesaic.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from moesaic.kernels.testing import PeakMemory

THREADS, ROUNDS = 2, 9
SHAPES = [(2048, 256, 4096), (4096, 512, 32768)]


def main() -> None:
    compare.warn_if_busy()
    torch.set_num_threads(THREADS)
    for n, d, v in SHAPES:
        torch.manual_seed(0)
        x, w, targets = torch.randn(n, d), torch.randn(v, d) / d**0.5, torch.randint(0, v, (n,))

        def side(
            loss: Callable[..., Tensor], x: Tensor = x, w: Tensor = w, t: Tensor = targets
        ) -> Callable[[], list[Tensor]]:
            def run() -> list[Tensor]:
                leaves = [x.detach().requires_grad_(), w.detach().requires_grad_()]
                value = loss(*leaves, t, -100)
                value.backward()
                return [value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

            return run

        sides = {"ours": side(linear_cross_entropy), "plain": side(linear_cross_entropy_reference)}
        for mine, theirs in zip(sides["ours"](), sides["plain"](), strict=True):
            error = ((mine - theirs).abs().max() / theirs.abs().max()).item()
            if error > 1e-4:
                raise SystemExit(f"losses or gradients differ by {error}; nothing is timed")
        peaks = {}
        for name in sides:
            with PeakMemory() as watch:
                sides[name]()
            peaks[name] = watch.peak / 2**20
        seconds = compare.alternate(sides, ROUNDS)
        case = f"{n} tokens, D {d}, V {v}, fp32, {THREADS} threads, forward + backward"
        peer = "torch linear, then cross_entropy"
        compare.report(
            "cross_entropy", case, n / seconds["ours"], n / seconds["plain"], peer, "tokens/s", more_is_better=True
        )
        compare.report(
            "cross_entropy", case, peaks["ours"], peaks["plain"], peer, "MiB at the peak", more_is_better=False
        )


if __name__ == "__main__":
    main()
