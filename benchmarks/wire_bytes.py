"""Bytes that expert parallelism sends, measured against a count slot by slot, and how many nodes a token reaches.

    python benchmarks/wire_bytes.py

Four ranks, two a node, run one layer's forward and backward, flat and in two hops, with two of DeepSeek-V3's traits: sigmoid
scores with a bias, and groups of experts. What the paths count where they hand rows to the backend must equal, to the byte, a
count from the routings alone; a difference ends the program. The peers of a line: flat, the K rows a token that a path without
deduplication sends between nodes and inside them; in two hops, the flat path. Then DeepSeek-V3's own router (256 experts, one
group of 32 a node, 4 of 8 groups kept, top 8) and the same without groups route random logits: destination nodes a token,
against K.
"""

import os
import socket
from collections import Counter

import compare
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

from moesaic.moe.config import ModelConfig, RouterConfig
from moesaic.moe.layer import MoE
from moesaic.moe.model import initialize
from moesaic.moe.router import Router, Routing
from moesaic.parallel.expert import AllToAllPath
from moesaic.parallel.two_hop import TwoHopPath

RANKS, NODE, TOKENS, D, EXPERTS, K = 4, 2, 512, 128, 32, 8
CASE = f"{RANKS} ranks, {NODE} a node, T {TOKENS} each, D {D}, E {EXPERTS}, K {K}, fp32, forward + backward of a layer"
HOPS = ("inter", "intra")
Sent = Counter[tuple[str, str]]


def layer_config() -> ModelConfig:
    router = RouterConfig(kind="sigmoid_bias", top_k=K, groups=4, groups_kept=3, renormalize=True)
    return ModelConfig(d_model=D, n_heads=2, n_experts=EXPERTS, d_expert=32, init_std=0.1, router=router)


def count(routings: list[Routing], two_hop: bool) -> Sent:
    """Bytes of all ranks by hop and phase, slot by slot; see the heads of parallel/expert.py and parallel/two_hop.py."""
    sent: Sent = Counter()
    held, row = EXPERTS // RANKS, 4 * D

    def add(a: int, b: int, phases: dict[str, int]) -> None:
        if a != b:
            hop = "intra" if a // NODE == b // NODE else "inter"
            sent.update({(hop, phase): size for phase, size in phases.items()})

    rows = {"dispatch": row, "combine": row, "combine_grad": row, "dispatch_grad": row}
    for a, routing in enumerate(routings):
        for b in range(RANKS):
            if not two_hop:
                add(a, b, {"counts": 8 * (held + 1)})
            elif a % NODE == b % NODE:
                add(a, b, {"counts": 8 * (1 + NODE + NODE * held)})
            elif a // NODE == b // NODE:
                add(a, b, {"counts": 8 * RANKS // NODE * (1 + held)})
        visits = set()
        for token, expert in zip(routing.token_S.tolist(), routing.expert_S.tolist(), strict=True):
            home = expert // held
            visits.add((token, home))
            stops = [a, home // NODE * NODE + a % NODE, home] if two_hop else [a, home]
            for x, y in zip(stops, stops[1:], strict=False):
                add(x, y, {"slots": 8, "slots_grad": 4})
        if two_hop:
            for _, node in {(token, home // NODE) for token, home in visits}:
                add(a, node * NODE + a % NODE, rows)
        for _, home in visits:
            add(home // NODE * NODE + a % NODE if two_hop else a, home, rows)
    return sent


def rank_main(rank: int, port: int, results: "mp.SimpleQueue") -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    layer, mesh = MoE(layer_config()), init_device_mesh("cpu", (RANKS // NODE, NODE))
    initialize(layer, "ffn.", layer_config(), 0, torch.device("cpu"))
    for name, weight in list(layer.experts.named_parameters()):
        setattr(layer.experts, name, torch.nn.Parameter(weight.detach().chunk(RANKS)[rank].clone()))
    torch.manual_seed(rank)
    x = torch.randn(TOKENS, D, requires_grad=True)
    routing = layer.router(x)[0]
    sent = []
    for path in (AllToAllPath(dist.group.WORLD, NODE), TwoHopPath(dist.group.WORLD, mesh)):
        layer.path = path
        layer(x)[0].sum().backward()
        sent.append(dict(path.sent))
    # Lists, for tensors sent between processes live in files that end with their sender.
    results.put((rank, routing.token_S.tolist(), routing.expert_S.tolist(), sent))
    dist.barrier()
    dist.destroy_process_group()


def measure() -> tuple[list[Routing], list[Sent]]:
    """The routings of the ranks, and what all of them sent: flat, then in two hops."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    context = mp.spawn(rank_main, (port, results), nprocs=RANKS, join=False)
    got = sorted(results.get() for _ in range(RANKS))
    while not context.join():
        pass
    sums: list[Sent] = [Counter(), Counter()]
    routings = []
    for _, tokens, experts, sent in got:
        none = torch.zeros((), dtype=torch.int64)
        slots = torch.tensor(tokens), torch.tensor(experts)
        routings.append(Routing(*slots, torch.zeros(0), torch.zeros(0), slots[1], TOKENS, K, none, none))
        for total, part in zip(sums, sent, strict=True):
            total.update(part)
    return routings, sums


def of_hop(sent: Sent, hop: str) -> int:
    return sum(size for (h, _), size in sent.items() if h == hop)


def every_slot(routings: list[Routing], hop: str) -> int:
    """Bytes of rows where each of a token's K slots travels by itself, four times, out and back, forward and backward."""
    held, total = EXPERTS // RANKS, 0
    for a, routing in enumerate(routings):
        for home in (routing.expert_S // held).tolist():
            total += 16 * D * (home != a and (home // NODE == a // NODE) == (hop == "intra"))
    return total


def destination_nodes(groups: int, kept: int) -> tuple[float, int]:
    """Nodes of 32 experts that a token reaches, mean and most, of DeepSeek-V3's router on random logits."""
    router = RouterConfig(kind="sigmoid_bias", top_k=8, groups=groups, groups_kept=kept, renormalize=True)
    layer = Router(ModelConfig(d_model=256, n_heads=2, n_experts=256, router=router))
    torch.nn.init.eye_(layer.weight_ED)  # logits are the input
    routing, _ = layer(torch.randn(20_000, 256, generator=torch.Generator().manual_seed(0)))
    nodes_TK = (routing.expert_S // 32).view(-1, 8).sort(dim=1).values
    nodes_T = 1 + (nodes_TK[:, 1:] != nodes_TK[:, :-1]).sum(dim=1)
    return nodes_T.double().mean().item(), int(nodes_T.max())


def main() -> None:
    routings, measured = measure()
    for sent, two_hop in zip(measured, (False, True), strict=True):
        expected = count(routings, two_hop)
        if sent != expected:
            raise SystemExit(f"two_hop={two_hop}: measured {dict(sent)}, counted {dict(expected)}")
        for hop in HOPS:
            if two_hop:
                peer, name = of_hop(measured[0], hop), "the flat path"
            else:
                peer, name = every_slot(routings, hop), "a row for each slot, without metadata"
            more = {phase: sent[hop, phase] for h, phase in sent if h == hop} | {"counted": of_hop(expected, hop)}
            kind = "two hops" if two_hop else "flat"
            compare.report("wire_bytes", f"{CASE}; {kind}, {hop}", of_hop(sent, hop), peer, name, "bytes",
                           more_is_better=False, **more)  # fmt: skip
    for groups, kept in ((8, 4), (1, 1)):
        mean, most = destination_nodes(groups, kept)
        case = f"nodes a token reaches: E 256, K 8, 8 nodes, groups {groups}, kept {kept}"
        limit = 4 if groups == 8 else 8
        compare.report(
            "wire_bytes", case, mean, limit, "the most there can be", "nodes", more_is_better=False, most=most
        )


if __name__ == "__main__":
    main()
