"""The all-to-all expert path in two hops: over the slow links between nodes a token goes once to each node it needs.

    1. to the rank of the same place in each node that holds some of its experts; this rank passes it on
    2. inside that node, to the ranks that hold them
    3. back inside the node, where the rank that passed it on adds up what the node's ranks made of it
    4. one sum from each node comes home, where these are added up

DeepSeek-V3 (arXiv 2412.19437, section 3.2) sends tokens this way, and its router keeps to M = 4 of 8 nodes, so that M rows of a
token instead of its up to K = 8 cross the network; DeepEP has it as kernels (github.com/deepseek-ai/DeepEP, internode).

Bytes, as in moesaic.parallel.expert with nodes for ranks in the first leg (n_w, s_w and so on are those of this rank's tokens
with experts in node w; 8 (1 + L + L e) for counts), and in the second with rows of all N nodes passed on to each rank of the
node (8 N (1 + e) for counts). A token whose expert is in a node, but not on the rank of the same place, travels twice there.

Letters: T tokens of this rank, E experts in all, e on this rank, W ranks of the group, N nodes, L ranks of a node, I rows that
came to this rank to be passed on.
"""

import functools
import math
import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moesaic.kernels.permute import Rows
from moesaic.moe.dispatch import slots_by_expert
from moesaic.moe.experts import Experts
from moesaic.moe.router import Routing
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.expert import (
    AllToAllPath,
    Codec,
    Leg,
    Link,
    Plan,
    absolute,
    arrived,
    fan_out,
    hops,
    moved,
    reached,
    read,
)
from moesaic.parallel.mesh import Meshes
from moesaic.parallel.overload import Limit, limit_of


class TwoHopPath(AllToAllPath):
    """`AllToAllPath`, with the same bits, in two exchanges: among the ranks of the same place in each node, and within the
    node.

    `mesh` is 2-D, (node, place), the ranks of `group` in order.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        mesh: DeviceMesh,
        codec: Codec | None = None,
        limit: Limit | None = None,
        layer: str = "",
    ) -> None:
        super().__init__(group, mesh.size(1), codec, limit, layer)
        self.nodes, self.places = mesh.shape
        assert dist.get_process_group_ranks(group) == mesh.mesh.flatten().tolist(), (group, mesh)
        node, place = divmod(self.rank, self.places)
        across = range(place, self.ranks, self.places)
        inside = range(node * self.places, (node + 1) * self.places)
        self.across = Link(mesh.get_group(0), hops(across, self.rank, self.places), layer)
        self.inside = Link(mesh.get_group(1), hops(inside, self.rank, self.places), layer)

    def plan(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Plan:
        nodes, places, ranks, tokens = self.nodes, self.places, self.ranks, routing.tokens
        training = experts.training
        sent = self.exchanged if training else None
        counts_NLe = routing.counts_E.view(nodes, places, -1)
        each = counts_NLe.shape[2]  # experts of a rank
        has_WT = reached(routing.expert_S // each, routing.token_S, ranks, tokens)
        has_NT = has_WT.view(nodes, places, tokens).any(dim=1)
        rows_NL1 = has_WT.sum(dim=1).view(nodes, places, 1)
        slots_N = counts_NLe.flatten(1).sum(dim=1)

        # What is told to another node speaks of each of its ranks, so that sizes of the second leg need no look at the slots.
        ask = torch.cat([has_NT.sum(dim=1, keepdim=True), rows_NL1.flatten(1), counts_NLe.flatten(1)], dim=1)
        told_by = self.across.tell(ask, sent)
        slot_S = slots_by_expert(routing, experts, x_TD)
        told = told_by()
        rows_in_N, passed_NL, told_NLe = told[:, 0], told[:, 1 : 1 + places], told[:, 1 + places :].view_as(counts_NLe)
        pass_on = torch.cat([passed_NL[:, :, None], told_NLe], dim=2).transpose(0, 1)
        came_LNe = self.inside.tell(pass_on, sent)()
        rows_in_L, came_LNe = came_LNe[:, :, 0].sum(dim=1), came_LNe[:, :, 1:]
        loads = self.all_loads(came_LNe.sum(), training)
        out, slots_out, rows_in, slots_in, out2, slots_out2, rows_in2, slots_in2, loads_here = read(
            has_NT.sum(dim=1), slots_N, rows_in_N, told_NLe.flatten(1).sum(dim=1),
            passed_NL.sum(dim=0), told_NLe.sum(dim=(0, 2)), rows_in_L, came_LNe.sum(dim=(1, 2)), loads,
        )  # fmt: skip
        self.check(loads_here)

        source, place_NT, bag, starts = fan_out(has_NT, sum(out))
        slot_S = slot_S[: sum(slots_out)]
        node_S, token_S = routing.expert_S[slot_S] // (each * places), routing.token_S[slot_S]
        slots = routing.expert_S.numel()
        first = Leg(self.across, source, [(bag, starts)], slot_S, slots, out, rows_in, slots_out, slots_in, sent)
        row_S, weights_S = first.send_slots(place_NT[node_S, token_S], routing.weights_S[slot_S])()

        row_S = absolute(row_S, rows_in_N, told_NLe.sum(dim=(1, 2)))
        blocks, passed_B = torch.arange(ranks, device=row_S.device), told_NLe.sum(dim=2).flatten()
        place_S = (blocks % places).repeat_interleave(passed_B, output_size=row_S.numel())
        has_LI = reached(place_S, row_S, places, sum(rows_in))
        source, place_LI, bag, starts = fan_out(has_LI, sum(out2))
        slot_S = moved(passed_B, blocks.view(nodes, places).T.flatten(), row_S.numel())  # by rank of this node
        second = Leg(
            self.inside, source, [(bag, starts)], slot_S, slot_S.numel(), out2, rows_in2, slots_out2, slots_in2, sent
        )
        slots2 = second.send_slots(place_LI[place_S[slot_S], row_S[slot_S]], weights_S[slot_S])

        @functools.cache
        def arrive() -> tuple[Tensor, Rows]:
            row_S, weights_S = slots2()
            row_S = absolute(row_S, rows_in_L, came_LNe.sum(dim=(1, 2)))
            block = torch.arange(came_LNe.numel(), device=row_S.device)
            place_B, node_B, expert_B = block // (nodes * each), block // each % nodes, block % each
            source_B = node_B * places + place_B
            return weights_S, arrived(row_S, expert_B, source_B, came_LNe.flatten(), each, sum(rows_in2))

        return Plan([first, second], arrive)


def node_ranks(node_size: str, degree: int) -> int:
    """How many neighbours among the `degree` ranks of an expert group are in one node, from `parallel.node_size`.

    auto: nodes of as many ranks as torchrun started on this machine; where an expert group may begin in the middle of one, the
    largest number of neighbours that always share one. Raises ValueError where a given number neither divides the group nor
    holds whole groups.
    """
    if node_size == "auto":
        return math.gcd(degree, int(os.environ.get("LOCAL_WORLD_SIZE", degree)))
    size = int(node_size)
    if degree % size and size % degree:
        raise ValueError(f"parallel.node_size={size}: must divide the expert degree, {degree}, or be a multiple of it")
    return min(size, degree)


def communicating_path(name: str, parallel: ParallelConfig, meshes: Meshes) -> Callable[[str], AllToAllPath]:
    """What makes the path `name`, all_to_all or two_hop, of each layer, given the layer's name. Collective.

    Where the ranks of an expert group are in one node, or each in another, two hops would be one and a copy: then it is one.
    """
    group, degree = meshes.experts.get_group("expert"), meshes.expert_parallel
    node = node_ranks(parallel.node_size, degree)

    if name == "all_to_all" or node in (1, degree):
        return lambda layer: AllToAllPath(group, node, limit=limit_of(parallel, layer), layer=layer)
    mesh = nodes_mesh(meshes, node)
    return lambda layer: TwoHopPath(group, mesh["node", "place"], limit=limit_of(parallel, layer), layer=layer)


def nodes_mesh(meshes: Meshes, node: int) -> DeviceMesh:
    """(group, node, place) of all ranks, `node` of each expert group in a node. Collective."""
    degree, names = meshes.expert_parallel, ("group", "node", "place")  # a group's ranks are neighbours
    shape = (dist.get_world_size() // degree, degree // node, node)
    return init_device_mesh(meshes.experts.device_type, shape, mesh_dim_names=names)
