"""The Triton kernels behind the all-to-all path, on two ranks, against all experts on one in plain torch."""

from pathlib import Path

import torch
import torch.distributed as dist

from moesaic.kernels.testing import launches
from moesaic.moe.dispatch import LocalPath
from moesaic.parallel.expert import AllToAllPath
from tests.parallel.ranks import run_ranks
from tests.parallel.test_expert import difference, experts_of, run

# A rank without rows, one without tokens, slots that nobody uses; every other one with biases.
WORKLOADS = ["idle_rank", "no_tokens", "unused_slots"]


def compare(names: list[str]) -> list[dict[str, float]]:
    """The largest relative differences on this rank, per workload."""
    rank, world = dist.get_rank(), dist.get_world_size()
    results = []
    for i, name in enumerate(names):
        whole, part = experts_of(i % 2 == 1), experts_of(i % 2 == 1, world, rank)
        part.backend = "triton"
        want = run(LocalPath(), whole, name, rank)
        for n, parameter in whole.named_parameters():
            dist.all_reduce(parameter.grad)
            want[n] = parameter.grad.chunk(world)[rank]
        with launches() as kernels:
            got = run(AllToAllPath(dist.group.WORLD), part, name, rank)
        assert {"_place_kernel", "_up_kernel", "_dact_kernel", "_varlen_m_kernel", "_varlen_k_kernel"} <= set(kernels)
        results.append({key: difference(got[key], want[key]) for key in want})
    return results


def test_equals_local_path_in_torch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for rank, results in enumerate(run_ranks(compare, 2, tmp_path, WORKLOADS)):
        for name, errors in zip(WORKLOADS, results, strict=True):
            assert errors and max(errors.values()) < 2e-6, (rank, name, errors)
