"""Bytes of dispatch that the fused path's kernels count on four ranks, against what others send for the same routing.

    python benchmarks/fused_bytes.py

Peers, computed from the routing: FlashMoE sends a row for each slot, without padding (its kernels copy routed rows alone; here
with room for all, so that it drops none), and a padded all-to-all, each pair of ranks as many rows as the largest pair has.
Forward and backward of one layer; a count that is not that of the routing ends the program.
"""

import os
import socket

import compare
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moesaic.kernels.fused_ep import PHASES
from moesaic.moe.config import ModelConfig, RouterConfig
from moesaic.moe.experts import Experts
from moesaic.moe.router import topk_routing
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.fused import FusedPath, Space

RANKS, TOKENS, D, F, EXPERTS, K = 4, 48, 32, 16, 16, 4
LOADS = {"uniform": 0.0, "Zipf 1.2": 1.2}


def ids_of(skew: float, rank: int) -> torch.Tensor:
    likely = torch.arange(1, EXPERTS + 1).float() ** -skew
    return torch.multinomial(likely.expand(TOKENS, -1), K, generator=torch.Generator().manual_seed(rank))


def rank_main(rank: int, port: int, results: "mp.SimpleQueue") -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    config = ModelConfig(d_model=D, n_heads=2, n_experts=EXPERTS, d_expert=F, router=RouterConfig(top_k=K))
    experts = Experts(config)
    for name, weight in list(experts.named_parameters()):
        part = torch.randn(EXPERTS // RANKS, *weight.shape[1:])
        setattr(experts, name, torch.nn.Parameter(part))
    sent = []
    for skew in LOADS.values():
        space = Space(dist.group.WORLD, config, ParallelConfig(expert_path="fused"), torch.float32, torch.device("cpu"))
        path = FusedPath(space)
        ids = ids_of(skew, rank)
        x = torch.randn(TOKENS, D, requires_grad=True)
        path(x, topk_routing(ids, torch.rand(TOKENS, K), EXPERTS), experts).sum().backward()
        sent.append(int(path.counters_WP[:, PHASES.index("dispatch")].sum()))
    results.put((rank, sent))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    context = mp.spawn(rank_main, (port, results), nprocs=RANKS, join=False)
    got = [results.get()[1] for _ in range(RANKS)]
    while not context.join():
        pass
    for i, (load, skew) in enumerate(LOADS.items()):
        ours, row = sum(sent[i] for sent in got), 4 * D * 3  # X, dO, and X again
        owner = [ids_of(skew, rank) // (EXPERTS // RANKS) for rank in range(RANKS)]
        pairs = [(a, b) for a in range(RANKS) for b in range(RANKS) if a != b]
        slots = {(a, b): int((owner[a] == b).sum()) for a, b in pairs}
        tokens = sum(int((owner[a] == b).any(dim=1).sum()) for a, b in pairs)
        assert ours == tokens * row, (ours, tokens * row)
        case = f"{load}: {RANKS} ranks, T {TOKENS} each, D {D}, E {EXPERTS}, K {K}, fp32"
        peers = {"a row a slot (FlashMoE)": sum(slots.values()), "padded all-to-all": len(pairs) * max(slots.values())}
        for name, rows in peers.items():
            compare.report("fused_bytes", case, ours, rows * row, name, "bytes", more_is_better=False)


if __name__ == "__main__":
    main()
