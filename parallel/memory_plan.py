"""Bytes that a rank needs, by category and by layer: by formula, held to moesaic.parallel.dry_run.

What is kept for backward is listed tensor by tensor; the lists are those of the GPU's way with the `torch` backend, whose
temporaries are larger than the kernels'. Temporaries are those of the places where memory peaks: the output head at the end of
forward, and the backward of the last block while nearly everything is still kept, or of the one before it.

Letters: T tokens of a micro-batch, D width, F expert width, G width of the experts' pre-activation, K experts per token, E
experts, e on a rank, H heads, J key-value heads, C width of a head, V vocabulary, b bytes of an activation.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from moesaic.kernels.cross_entropy import CHUNK_BYTES, LEAST_ROWS
from moesaic.kernels.symmetric import Regions, starts
from moesaic.moe.config import ModelConfig
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.fused import heap_regions
from moesaic.parallel.layout import (
    BYTES,
    ZERO_LIVE,
    Group,
    Layout,
    dense_held,
    groups_by_kind,
    load_of,
    root_group,
    row_bytes,
    shapes_of_block,
)

# Of what is allocated, memory that no tensor uses: torch's allocator rounds up and splits. An allowance, not measured here.
FRAGMENTATION = 0.05
BUCKET = 2**25  # values that ZeRO reduces or gathers at once: moesaic.parallel.zero


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, the fullest.

    weights, gradients, moments  fp32, this rank's shards; of dense parameters what ZeRO keeps, its copy for the update included
    kept_LN       what each layer keeps for backward: kept[l]
    head          what the output head and the embedding keep
    gathered      weights of other ranks that are whole where memory peaks
    temporary     what else lives there for a while
    heap          of the fused expert path, see moesaic.kernels.symmetric
    """

    weights: int
    gradients: int
    moments: int
    kept: tuple[int, ...]
    live: int
    head: int
    gathered: int
    temporary: int
    heap: int = 0

    @property
    def tensors(self) -> int:
        """The most that lives at once."""
        return sum(self.categories().values()) - self.fragmentation

    @property
    def fragmentation(self) -> int:
        parts = (self.weights, self.gradients, self.moments, self.live, self.head, self.gathered, self.temporary)
        return round(FRAGMENTATION * sum(parts))

    @property
    def total(self) -> int:
        return sum(self.categories().values())

    def categories(self) -> dict[str, int]:
        return {
            "weights": self.weights, "gradients": self.gradients, "optimizer": self.moments, "activations": self.live,
            "embedding and head": self.head, "gathered weights": self.gathered, "temporary": self.temporary,
            "symmetric heap": self.heap, "fragmentation": self.fragmentation,
        }  # fmt: skip


def memory_of(model: ModelConfig, layout: Layout) -> Memory:
    moe = model.n_dense_layers < model.n_layers
    heap = starts(heap_of(model, layout))[1] if layout.hops == "fused" and moe else 0
    groups, root = groups_by_kind(model, layout), root_group(model, layout)
    layers = [layer < model.n_dense_layers for layer in range(model.n_layers)]
    held = root.held + sum(g.held for dense in layers for g in groups[dense])
    kept_by_kind = {dense: kept_by_block(model, layout, dense) for dense in groups}
    kept = [kept_by_kind[dense] for dense in layers]
    most = max(_moments(model, layout, kept), key=lambda moment: moment.size)
    head = _kept_by_head(model, layout)
    if layout.zero is None:
        made = most.gradients if layout.micro_batches == 1 else 4 * held
        return Memory(4 * held, made, 8 * held, tuple(kept), most.kept, head, most.gathered, most.temporary, heap)
    # At stage 3 `dense` is this rank's share, below it all; ZeRO updates a copy of the share, and reduces by buckets.
    dense = dense_held(model, layout)
    stage, share = layout.zero, -(-dense // (1 if layout.zero in (0, 3) else layout.world))
    copy = share if stage else 0
    grads = (dense if stage < 2 else 0) + copy
    gathered = most.gathered + (4 * min(dense * layout.world, ZERO_LIVE) if stage == 3 else 0)
    temporary = most.temporary + 4 * (BUCKET if stage == 3 else min(BUCKET, dense))
    experts = held - dense
    return Memory(
        4 * (held + copy), 4 * (experts + grads), 8 * (experts + share), tuple(kept), most.kept, head, gathered, temporary,
        heap,
    )  # fmt: skip


@dataclass(frozen=True)
class _Moment:
    """Bytes at one place of a micro-batch. gradients: shards that it made so far; kept: of the layers, for backward."""

    where: str
    gradients: int
    kept: int
    gathered: int
    temporary: int

    @property
    def size(self) -> int:
        return self.gradients + self.kept + self.gathered + self.temporary


def _moments(model: ModelConfig, layout: Layout, kept: list[int]) -> Iterator[_Moment]:
    """The places where memory may be most: the output head, and backward block by block, as FSDP2 goes there with the order of
    moesaic.parallel.fsdp.prefetch (torch 2.13):

    1. At its start, a block's own group is copied out of the buffer in which it came. Then the block before is asked for:
       buffers for all its groups. The experts are copied out where they are first used.
    2. A group whose gradients are there lets its weights go. Then the buffer goes in which the group before it was summed, and
       its own is taken, in fp32, for the gradients that are there in the type of compute. So in a dense block the sum of the
       block after it stays to the end, beside weights and gradients of its own; in a MoE block until the experts have theirs.
    3. What the sum leaves on this rank stays: gradients.

    The gradient of a block's output is in the place of what the head kept, and that of the head's weight, too.
    """
    groups, root = groups_by_kind(model, layout), root_group(model, layout)
    kinds = [groups[layer < model.n_dense_layers] for layer in range(model.n_layers)]
    works = {dense: _work_of(model, layout, dense) for dense in groups}
    never, stay = layout.reshard == "never", _whole([root])
    # Gradients of all micro-batches but the first are added to those that are there already, and so are all of ZeRO's.
    first = layout.micro_batches == 1 and layout.zero is None

    def shards(*of: Group) -> int:
        return 4 * sum(g.held for g in of) if first else 0

    def summed(where: str, group: Group, gradients: int, kept: int, gathered: int, rest: int) -> _Moment:
        """fp32 sums beside gradients in their own type, or beside the sums' shard and what FSDP2 keeps longer than it needs: of
        several ranks the last gradient, of one a copy that is divided by 1. Gradients not cut along dimension 0 are copied."""
        sums, own = _whole([group], 4), _whole([group], layout.width)
        last = layout.width * math.prod(group.shapes[-1])
        late = last if group.ranks > 1 else sums
        shard = 0 if first else 4 * group.held
        more = max(own + last * (group.dims[-1] > 0) - shards(group), shard + late)
        return _Moment(where, gradients + shards(group), kept, gathered, rest + sums + more)

    buffer = _whole(_sent(kinds[-1][-1:]))  # in which the last group came: it goes when another comes
    whole = sum(map(_whole, kinds)) if never else 0
    yield _Moment("head", 0, sum(kept), stay + whole, _at_head(model, layout) + buffer)

    made = sums = 0
    for i in reversed(range(model.n_layers)):
        if [id(kind) for kind in kinds[max(0, i - 2) : i + 3]] == [id(kinds[i])] * 5:
            made += shards(*kinds[i])  # among equals, where memory rises or falls evenly: the ends have the most
            continue
        work, (own, *inner) = works[i < model.n_dense_layers], kinds[i]
        below, hold = sum(kept[:i]), stay + _whole([own])
        ahead = sum(map(_whole, kinds[:i])) if never else _whole(_sent(kinds[i - 1])) if i else 0
        came = _whole(inner) if never else _whole(_sent([own, *inner]))
        yield _Moment(f"start {i}", made, below + work.start, hold + came, sums)
        if inner:
            experts, all_here = inner[-1], hold + ahead + _whole(inner)
            copy = 0 if never else _whole(_sent([experts]))
            yield _Moment(f"experts {i}", made, below + work.whole, all_here, sums + max(work.experts, copy))
            through, others = below + work.whole - work.kept, all_here - _whole([experts])
            yield summed(f"experts' sum {i}", experts, made, through, others, work.rows)
            made, sums = made + shards(experts), _whole([experts], 4)
        yield _Moment(f"feed-forward {i}", made, below + work.rest, hold + ahead, sums + work.feed_forward)
        if inner:
            made, sums = made + shards(*inner[:-1]), _whole(inner[:1], 4)
        yield _Moment(f"attention {i}", made, below + work.attended, hold + ahead, sums + work.attention)
        yield _Moment(f"end {i}", made, below, hold + ahead, sums + _whole([own], layout.width))
        yield summed(f"sum {i}", own, made, below, stay + ahead, 0)
        made, sums = made + shards(own), _whole([own], 4)

    output, table = layout.width * layout.tokens * model.d_model, layout.width * model.vocab_size * model.d_model
    # A tied weight has two gradients and their sum; the head's is counted there.
    twice = table * (2 if model.tie_embeddings else 1)
    yield _Moment("embedding", made, 0, stay, sums + twice - output)
    yield summed("root", root, made, 0, 0, -table - 2 * output)  # of what the head kept, nothing is left


def _sent(groups: list[Group]) -> list[Group]:
    """Those that come from other ranks, in a buffer."""
    return [g for g in groups if g.ranks > 1]


@dataclass(frozen=True)
class _Work:
    """Bytes of a block in backward, its output and weights left out. What is there of what it kept or makes again: at the
    `start`; in the experts, `whole`, of which they let a part go, `kept`; in the `rest` before attention; in attention,
    `attended`. Temporary: in the `experts`, and their `rows` that go back; in the `feed_forward`, dense or shared; in
    `attention`."""

    start: int
    whole: int
    kept: int
    rest: int
    attended: int
    experts: int
    rows: int
    feed_forward: int
    attention: int


def _work_of(model: ModelConfig, layout: Layout, dense: bool) -> _Work:
    t, b, d = layout.tokens, layout.width, model.d_model
    own = shapes_of_block(model, dense)
    output = t * b * d
    start = kept_by_block(model, layout, dense) - output
    whole = kept_by_block(model, dataclasses.replace(layout, remat="none"), dense) - output
    experts = 0 if dense else _kept_by_experts(model, layout)
    rest = whole - experts
    if layout.remat == "selective" and not dense:  # the experts' backward comes first
        experts += output * _stay(layout)
        rest, whole = rest + start - experts, start
    elif layout.remat != "none":
        rest, whole = rest + start, whole + start
    # Gradients of weights that are made before attention's: of the feed-forward and of attention's output.
    weights = sum(math.prod(shape) for name, shape in own.items() if re.match(r"ffn\.(shared\.)?w_", name))
    mla, h, c, m = model.attention == "mla", model.n_heads, model.head_width, model.mla
    queries, out = (h * m.qk_head_dim, h * m.v_head_dim) if mla else (h * c, h * c)
    others = queries + out if mla else 2 * model.kv_heads * c  # keys and values
    width = model.d_dense if dense else model.d_shared * (not layout.shared)
    # Of latent attention made again, the queries before they are rotated live as long as the others.
    again = t * queries if mla and layout.remat != "none" else 0
    return _Work(
        start=start, whole=whole, kept=experts, rest=rest, attended=kept_by_attention(model, layout) - output,
        experts=0 if dense else backward_of_experts(model, layout),
        rows=0 if layout.hops == "local" or _inside(layout) else b * _came(model, layout) * d,
        feed_forward=b * max(2 * t * width + weights // 3, again),
        attention=b * (t * (queries + others + out) + weights + math.prod(own["attention.wo.weight"])),
    )  # fmt: skip


def heap_of(model: ModelConfig, layout: Layout) -> Regions:
    """Of the fused path: as much as moesaic.parallel.fused reserves for a micro-batch."""
    knobs = ParallelConfig(
        expert_path="fused", fused_keep=layout.keep, max_recv_tokens_factor=layout.limit, fused_shared=layout.shared > 0
    )
    compute = {"fp32": torch.float32, "bf16": torch.bfloat16}[layout.compute]
    return heap_regions(
        model, knobs, layout.expert, layout.tokens, compute, layout.target, layout.low, layout.nodes, layout.numbers
    )


def _inside(layout: Layout) -> bool:
    """Whether experts are computed inside of the fused kernels."""
    return layout.hops == "fused" and not layout.apart


def _came(model: ModelConfig, layout: Layout) -> int:
    """Rows that experts compute with: a token's once, or apart from the fused kernels once for each of its experts here."""
    load = load_of(model, layout)
    return load.computed if layout.hops == "fused" else load.received


def _passed_on(model: ModelConfig, layout: Layout) -> int:
    """Of the fused path over several nodes: rows that come to the fullest rank from all of them, the kernel's inputs there."""
    if layout.hops != "fused" or layout.nodes == 1:
        return 0
    return math.ceil(load_of(model, layout).node_rows * layout.nodes * layout.imbalance)


def _whole(groups: list[Group], each: int | None = None) -> int:
    """Bytes of gathered parameters, or of `each` for one. One rank that computes in fp32 uses what it keeps."""
    return sum(g.padded * (each or BYTES[g.compute]) for g in groups if g.ranks > 1 or g.compute != "fp32")


def _kept_by_head(model: ModelConfig, layout: Layout) -> int:
    """The embedding's output, the head's gradients, which forward makes, and the rotary tables."""
    t, b, d = layout.tokens, layout.width, model.d_model
    return b * (2 * t * d + model.vocab_size * d) + 16 * layout.seq_len * model.rotary_width // 2


def _at_head(model: ModelConfig, layout: Layout) -> int:
    """Of a chunk its logits in fp32 and as they are computed, or their gradient; the chunk's part of the weight's gradient, and
    that in fp32, less what is counted as kept; the normed input."""
    t, b, d, v = layout.tokens, layout.width, model.d_model, model.vocab_size
    rows = min(t, max(LEAST_ROWS, CHUNK_BYTES // (4 * v)))
    return (8 - b) * rows * v + 4 * v * d + b * t * d


def kept_by_block(model: ModelConfig, layout: Layout, dense: bool) -> int:
    """Bytes that a block keeps for backward. Its input is the output of the block before, and is counted there."""
    t, b, d = layout.tokens, layout.width, model.d_model
    if layout.remat == "full":
        indices = 0 if dense or _stay(layout) else _indices(model, layout)
        return t * b * d + (0 if dense else _decided(model, layout)) + indices
    if layout.remat == "selective" and not dense:
        inputs = t * b * d if _stay(layout) else 0  # of the experts; rows that travelled are counted with the rest
        return t * b * d + inputs + _decided(model, layout) + _kept_by_experts(model, layout)
    if layout.remat == "selective":
        return t * b * d
    rest = kept_by_attention(model, layout) + t * (b * d + 4)  # the norm before the feed-forward
    if dense:
        return rest + t * b * (d + 4 * model.d_dense)
    beside = model.d_shared > 0 and not layout.shared
    shared = t * b * (d + 4 * model.d_shared) if beside else t * b * d * _stay(layout)
    return rest + _kept_by_router(model, layout) + shared + _kept_by_experts(model, layout)


def kept_by_attention(model: ModelConfig, layout: Layout) -> int:
    """Block input, its norm, projections, heads that are normed and rotated, outputs, and one number a row of each."""
    t, b, d, h = layout.tokens, layout.width, model.d_model, model.n_heads
    if model.attention == "mla":
        m = model.mla
        queries = m.q_lora_rank or 0
        made = 2 * queries + 2 * m.kv_lora_rank + m.qk_rope_head_dim
        made += h * (m.qk_nope_head_dim + m.v_head_dim)
        used = 2 * h * m.qk_head_dim + h * m.v_head_dim
        return t * (b * (2 * d + made + used) + 4 * (h + 2 + (queries > 0)))
    c, j = model.head_width, model.kv_heads
    norms = {"none": 0, "head": h + j, "full": 2}[model.qk_norm]
    return t * (b * (2 * d + (h + 2 * j) * c + (h + j) * c + h * c) + 4 * (h + 1 + norms))


def _kept_by_router(model: ModelConfig, layout: Layout) -> int:
    """Input in fp32, logits and scores, choices, their weights, and sums of a token."""
    k, sums = model.router.top_k, 2 + model.router.renormalize
    wide = 0 if layout.compute == "fp32" and model.d_shared else 4 * model.d_model
    return layout.tokens * (wide + 8 * model.n_experts + 12 * k + 4 * sums)


def _stay(layout: Layout) -> bool:
    """Whether the experts' inputs are this rank's own tokens."""
    return layout.hops == "local" or (_inside(layout) and layout.nodes == 1)


def _decided(model: ModelConfig, layout: Layout) -> int:
    """What recomputation keeps of a layer's choices beside the numbers of rows: experts, and of slots that came, theirs, and
    their weights."""
    came = 0 if _stay(layout) else 12 * load_of(model, layout).computed
    again = 2 if layout.hops == "two_hop" else 1
    return layout.tokens * 8 * model.router.top_k * again + came


def _indices(model: ModelConfig, layout: Layout) -> int:
    """Row and slot numbers, int64, of the way out and back."""
    load, k, t = load_of(model, layout), model.router.top_k, layout.tokens
    if layout.hops == "fused" and layout.nodes > 1:
        sent = load.node_rows * layout.nodes
        return 8 * (2 * sent + 2 * t + t * k + 3 * load.computed + _passed_on(model, layout))
    if _stay(layout):
        return t * (k + layout.shared) * (24 if layout.hops == "local" else 36)
    ranks = layout.expert
    sent = 8 * (2 * load.rows * ranks + t * k)
    nodes = 8 * load.node_rows * (ranks // layout.expert_node) * (2 + (layout.hops == "two_hop"))
    again = 8 * t * k * (layout.hops == "two_hop")
    return sent + nodes + again + 8 * (3 * load.computed + load.received) + 8 * t


def _kept_by_experts(model: ModelConfig, layout: Layout) -> int:
    """Rows that came, the pre-activation, weights, and the numbers of rows."""
    load, b = load_of(model, layout), layout.width
    g = model.d_expert * (1 if model.activation == "relu2" else 2)
    if _inside(layout):  # h, and the rows, for as many as there is room for
        room = heap_of(model, layout)["rows"][0][0]
        row = b * model.d_model
        if layout.dispatch == "fp8":  # codes and scales, in whole 16 bytes
            row = -(-sum(row_bytes("fp8", model.d_model, b)) // 16) * 16
        passed_on = _passed_on(model, layout) * b * model.d_model
        return room * (b * g + (row if layout.keep else 0)) + passed_on + _indices(model, layout)
    came = 0 if layout.hops == "local" else _came(model, layout) * b * model.d_model
    return came + load.computed * b * (g + 1) + _indices(model, layout)


def backward_of_experts(model: ModelConfig, layout: Layout) -> int:
    """Temporaries of the experts' backward, beside the gradients of their outputs: of slots the row's gradient and tensors as
    wide as an expert, three of them fp32, or that of h and the second weight's gradient; then what h's gradient makes."""
    t, b, d, f = layout.tokens, layout.width, model.d_model, model.d_expert
    load = load_of(model, layout)
    g = f * (1 if model.activation == "relu2" else 2)
    r, n, e = load.computed, _came(model, layout), model.n_experts // layout.expert
    if _inside(layout):  # dh, a, parts of dS, the gradients of X and the weights
        room = heap_of(model, layout)["rows"][0][0]
        inputs = _passed_on(model, layout)
        e += layout.shared * (2 if layout.shared > 1 else 1)  # several are made of a shared expert's matrices by a copy
        return b * (room * (g + f) + 2 * (inputs or t) * d - t * d + e * d * (g + f))
    # A result is made in chunks of columns of the rows, added up for each input, and joined where there are several.
    chunk = min(r * d, model.chunk_mib * 2**20 // b)
    made = max(chunk + n * d, 2 * n * d if chunk < r * d else 0)
    first = max(r * (d + 3 * f + 12 // b * f), r * (d + 4 * f + g) + e * d * f)
    second = r * g + e * d * (g + f) + max(r * d, made)
    again = r * f + made if layout.remat == "full" else 0  # the experts' output, before their backward
    return b * (max(first, second, again) + n * d)
