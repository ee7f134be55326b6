"""Bytes that a rank needs, by category and by layer: by formula, held to moesaic.parallel.dry_run.

What is kept for backward is listed tensor by tensor; the lists are those of the GPU's way with the `torch` backend, whose
temporaries are larger than the kernels'. Temporaries are those of the places where memory peaks: the output head at the end of
forward, and the backward of the last block while nearly everything is still kept, or of the one before it.

Letters: T tokens of a micro-batch, D width, F expert width, G width of the experts' pre-activation, K experts per token, E
experts, e on a rank, H heads, J key-value heads, C width of a head, V vocabulary, b bytes of an activation.
"""

import dataclasses
import math
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
        parts = (self.weights, self.gradients, self.moments, sum(self.kept), self.head, self.gathered, self.temporary)
        return round(FRAGMENTATION * sum(parts))

    @property
    def total(self) -> int:
        return sum(self.categories().values())

    def categories(self) -> dict[str, int]:
        return {
            "weights": self.weights, "gradients": self.gradients, "optimizer": self.moments, "activations": sum(self.kept),
            "embedding and head": self.head, "gathered weights": self.gathered, "temporary": self.temporary,
            "symmetric heap": self.heap, "fragmentation": self.fragmentation,
        }  # fmt: skip


def memory_of(model: ModelConfig, layout: Layout) -> Memory:
    heap = starts(heap_of(model, layout))[1] if layout.hops == "fused" else 0
    dense_layers, groups = model.n_dense_layers, groups_by_kind(model, layout)
    root = root_group(model, layout)
    layers = [layer < dense_layers for layer in range(model.n_layers)]
    held = root.held + sum(g.held for dense in layers for g in groups[dense])
    kept_by_kind = {dense: kept_by_block(model, layout, dense) for dense in groups}
    kept = [kept_by_kind[dense] for dense in layers]

    never, last = layout.reshard == "never", layers[-1]
    stay = 0 if layout.reshard == "always" else _whole([root])
    stay += sum(_whole(groups[dense]) for dense in layers) if never else 0
    # Of blocks: the one that computes, and the next, whose weights are on their way.
    pair = 0 if never else sum(_whole(groups[dense]) for dense in layers[-2:])
    # Gradients of all micro-batches but the first add up in those that are there already.
    gradients = 4 * held if layout.micro_batches > 1 else 0
    again, work = kept_again(model, layout, last), backward_of_block(model, layout, last)
    summed = _whole(groups[last], 4)
    experts = 0 if last or layout.remat == "full" else _kept_by_experts(model, layout)
    # FSDP2 keeps the buffer in which the last group arrived, until another comes.
    buffer = _whole([g for g in groups[last][-1:] if g.ranks > 1])
    if layout.reshard == "always":
        stay += _whole([root])
    ended = _whole(groups[last])  # whose weights are let go before their gradients are summed
    again_first = 0 if layout.remat == "selective" and not last else again  # the experts' backward comes first
    places = {
        "head": (stay, _at_head(model, layout) + buffer),
        "block": (stay + pair, max(again_first + work, again)),
        "sum": (stay + pair - ended, again - experts + _whole(groups[last], layout.width) + summed),
        "next": (
            stay + pair - (ended if never else 0),
            max(again_first + work, again) + summed - kept[-1] + sum(4 * g.held for g in groups[last]),
        ),
    }
    if root.ranks > 1:  # at the end of backward: the embedding's gradient, and that of the root on its way, in fp32
        made = (0 if model.tie_embeddings else layout.width * model.vocab_size * model.d_model) + 4 * root.padded
        blocks = 0 if layout.micro_batches > 1 else 4 * (held - root.held)
        places["root"] = (0, made + blocks - sum(kept))
    gathered, temporary = max(places.values(), key=sum)
    head = _kept_by_head(model, layout)
    if layout.zero is None:
        return Memory(4 * held, gradients, 8 * held, tuple(kept), head, gathered, temporary, heap)
    # At stage 3 `dense` is this rank's share, below it all; ZeRO updates a copy of the share, and reduces by buckets.
    dense = dense_held(model, layout)
    stage, share = layout.zero, -(-dense // (1 if layout.zero in (0, 3) else layout.world))
    copy = share if stage else 0
    grads = (dense if stage < 2 else 0) + copy
    if stage == 3:
        gathered += 4 * min(dense * layout.world, ZERO_LIVE)
    temporary += 4 * (BUCKET if stage == 3 else min(BUCKET, dense))
    experts = held - dense
    return Memory(
        4 * (held + copy), 4 * (experts + grads), 8 * (experts + share), tuple(kept), head, gathered, temporary, heap
    )


def heap_of(model: ModelConfig, layout: Layout) -> Regions:
    """Of the fused path: as much as moesaic.parallel.fused reserves for a micro-batch."""
    knobs = ParallelConfig(
        expert_path="fused", fused_keep=layout.keep, max_recv_tokens_factor=layout.limit, fused_shared=layout.shared > 0
    )
    compute = {"fp32": torch.float32, "bf16": torch.bfloat16}[layout.compute]
    return heap_regions(model, knobs, layout.expert, layout.tokens, compute, layout.target, nodes=layout.nodes)


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
    """Of a chunk its logits, these in fp32, and their gradient; of the chunk before the last two still, or a part of the weight's
    gradient; the normed input; the weight's gradient in fp32, less what is counted as kept."""
    t, b, d, v = layout.tokens, layout.width, model.d_model, model.vocab_size
    rows = min(t, max(LEAST_ROWS, CHUNK_BYTES // (4 * v)))
    chunk = 4 * rows * v if b == 4 else (8 * rows + max(4 * min(rows, t - rows), b * d)) * v
    return chunk + b * t * d + (4 - b) * v * d


def kept_by_block(model: ModelConfig, layout: Layout, dense: bool) -> int:
    """Bytes that a block keeps for backward. Its input is the output of the block before, and is counted there."""
    t, b, d = layout.tokens, layout.width, model.d_model
    if layout.remat == "full":
        indices = 0 if dense or (layout.hops == "fused" and layout.nodes == 1) else _indices(model, layout)
        return t * b * d + (0 if dense else _decided(model, layout)) + indices
    if layout.remat == "selective" and not dense:
        return t * b * d + _decided(model, layout) + _kept_by_experts(model, layout)
    if layout.remat == "selective":
        return t * b * d
    rest = kept_by_attention(model, layout) + t * (b * d + 4)  # the norm before the feed-forward
    if dense:
        return rest + t * b * (d + 4 * model.d_dense)
    shared = t * b * (d + 4 * model.d_shared) if model.d_shared and not layout.shared else 0
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


def _decided(model: ModelConfig, layout: Layout) -> int:
    """What recomputation keeps of a layer's choices beside the numbers of rows: experts, and of slots that came, theirs, and
    their weights."""
    stays = layout.hops == "local" or (layout.hops == "fused" and layout.nodes == 1)
    came = 0 if stays else 12 * load_of(model, layout).computed
    again = 2 if layout.hops == "two_hop" else 1
    return layout.tokens * 8 * model.router.top_k * again + came


def _indices(model: ModelConfig, layout: Layout) -> int:
    """Row and slot numbers, int64, of the way out and back."""
    load, k, t = load_of(model, layout), model.router.top_k, layout.tokens
    if layout.hops == "fused" and layout.nodes > 1:
        sent = load.node_rows * layout.nodes
        return 8 * (2 * sent + 2 * t + t * k + 3 * load.computed + _passed_on(model, layout))
    if layout.hops in ("local", "fused"):
        return 8 * 2 * t * (k + layout.shared)
    ranks = layout.expert
    sent = 8 * (2 * load.rows * ranks + t * k)
    nodes = 8 * load.node_rows * (ranks // layout.expert_node) * (2 + (layout.hops == "two_hop"))
    again = 8 * t * k * (layout.hops == "two_hop")
    return sent + nodes + again + 8 * (3 * load.computed + load.received) + 8 * t


def _kept_by_experts(model: ModelConfig, layout: Layout) -> int:
    """Rows that came, the pre-activation, weights, and the numbers of rows."""
    load, b = load_of(model, layout), layout.width
    g = model.d_expert * (1 if model.activation == "relu2" else 2)
    if layout.hops == "fused":  # h, and the rows, for as many as there is room for
        room = heap_of(model, layout)["rows"][0][0]
        row = b * model.d_model
        if layout.dispatch == "fp8":  # codes and scales, in whole 16 bytes
            row = -(-sum(row_bytes("fp8", model.d_model, b)) // 16) * 16
        # The kernel's inputs: in one node this rank's, which a shared expert beside it keeps as well.
        beside = model.d_shared > 0 and not layout.shared and layout.remat == "none"
        inputs = (_passed_on(model, layout) or (0 if beside else layout.tokens)) * b * model.d_model
        return room * (b * g + (row if layout.keep else 0)) + inputs + _indices(model, layout)
    came = 0 if layout.hops == "local" else load.received * b * model.d_model
    return came + load.computed * b * (g + 1) + _indices(model, layout)


def kept_again(model: ModelConfig, layout: Layout, dense: bool) -> int:
    """What one block holds while its activations are made again."""
    if layout.remat == "none":
        return 0
    whole = kept_by_block(model, dataclasses.replace(layout, remat="none"), dense)
    return whole - (_kept_by_experts(model, layout) if layout.remat == "selective" and not dense else 0)


def backward_of_block(model: ModelConfig, layout: Layout, dense: bool) -> int:
    """Temporaries of a block's backward where they are most: in a dense feed-forward, or in the experts', beside the gradients
    that come in: the rows' gradients and tensors as wide as an expert, three of them fp32, or the rows and the gradient of h."""
    t, b, d, f = layout.tokens, layout.width, model.d_model, model.d_expert
    if dense:
        return b * t * (3 * d + 5 * model.d_dense)
    load = load_of(model, layout)
    g = f * (1 if model.activation == "relu2" else 2)
    r, n, e = load.computed, load.received, model.n_experts // layout.expert
    if layout.hops == "fused":  # dh, a, parts of dS, the gradients of X and the weights
        room = heap_of(model, layout)["rows"][0][0]
        inputs = _passed_on(model, layout)
        e += layout.shared * (2 if layout.shared > 1 else 1)  # several are made of a shared expert's matrices by a copy
        return b * (room * (g + f) + 2 * (inputs or t) * d + e * d * (g + f))
    first, second = r * (d + 3 * f + 12 // b * f) + e * d * f, r * (d + g) + e * d * (g + f)
    return b * (max(first, second) + n * d + t * d)
