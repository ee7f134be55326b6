"""Latent attention against transformers' DeepSeek-V3, and packed documents against each document by itself."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import flex_attention as flex
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from moesaic.moe import attention as attention_module
from moesaic.moe.attention import (
    BLOCK,
    QUERIES,
    LatentAttention,
    attend,
    block_mask,
    document_ids,
    document_lengths,
    document_mask,
    rotary_table,
    rotate,
)
from moesaic.moe.config import MLAConfig, ModelConfig, RouterConfig, YarnConfig
from moesaic.moe.model import Transformer, build

CPU = torch.device("cpu")
SEPARATOR = 96
YARN = YarnConfig(factor=8.0, original_max_position_embeddings=64, mscale=0.7, mscale_all_dim=1.2)


def small(attention: str, **changes: object) -> ModelConfig:
    base: dict[str, object] = dict(
        vocab_size=97, d_model=40, n_layers=2, n_heads=4, n_experts=6, d_expert=20, init_std=0.1,
        router=RouterConfig(top_k=2), attention=attention,
    )  # fmt: skip
    if attention == "mla":
        base["mla"] = MLAConfig(q_lora_rank=14, kv_lora_rank=18, qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=12)
    else:
        base |= {"n_kv_heads": 2, "qk_norm": "head", "head_dim": 12}
    return ModelConfig(**(base | changes))  # type: ignore[arg-type]


def near(got: Tensor, want: Tensor, tolerance: float) -> bool:
    return bool((got - want).abs().max() <= tolerance * want.abs().max())


# ---------------------------------------------------------------- latent attention


def transformers_config(config: ModelConfig) -> DeepseekV3Config:
    mla, yarn = config.mla, config.yarn
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if yarn.factor > 1:
        rope |= {
            "rope_type": "yarn", "factor": yarn.factor, "mscale": yarn.mscale, "mscale_all_dim": yarn.mscale_all_dim,
            "original_max_position_embeddings": yarn.original_max_position_embeddings,
            "beta_fast": yarn.beta_fast, "beta_slow": yarn.beta_slow,
        }  # fmt: skip
    return DeepseekV3Config(
        hidden_size=config.d_model, num_attention_heads=config.n_heads, num_key_value_heads=config.n_heads,
        q_lora_rank=mla.q_lora_rank, kv_lora_rank=mla.kv_lora_rank, qk_nope_head_dim=mla.qk_nope_head_dim,
        qk_rope_head_dim=mla.qk_rope_head_dim, v_head_dim=mla.v_head_dim, rope_interleave=mla.rope_interleave,
        rope_parameters=rope, max_position_embeddings=512, attn_implementation="eager",
    )  # fmt: skip


NAMES = {
    "wq": "q_proj", "wq_a": "q_a_proj", "q_norm": "q_a_layernorm", "wq_b": "q_b_proj", "wkv_a": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm", "wkv_b": "kv_b_proj", "wo": "o_proj",
}  # fmt: skip


@pytest.mark.parametrize("yarn", [YarnConfig(), YARN], ids=["plain", "yarn"])
@pytest.mark.parametrize("rope_interleave", [True, False], ids=["interleaved", "halves"])
@pytest.mark.parametrize("q_lora_rank", [None, 14])
@pytest.mark.parametrize("v_head_dim", [12, 20])
def test_latent_attention_equals_transformers(
    q_lora_rank: int | None, rope_interleave: bool, yarn: YarnConfig, v_head_dim: int
) -> None:
    mla = MLAConfig(
        q_lora_rank=q_lora_rank, kv_lora_rank=18, qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=v_head_dim,
        rope_interleave=rope_interleave,
    )  # fmt: skip
    config = small("mla", mla=mla, yarn=yarn)
    ours = LatentAttention(config)
    theirs = DeepseekV3Attention(transformers_config(config), layer_idx=0)
    pairs = {name: (getattr(ours, name), getattr(theirs, NAMES[name])) for name, _ in ours.named_children()}
    with torch.no_grad():
        for mine, other in pairs.values():
            other.weight.copy_(nn.init.normal_(mine.weight, std=0.3))

    x = torch.randn(2, 23, 40)
    cos, sin = rotary_table(23, config.rotary_width, config.rope_theta, CPU, config.yarn)
    got = ours(x, cos, sin)
    table = DeepseekV3RotaryEmbedding(theirs.config)(x, torch.arange(23)[None])
    causal = torch.full((23, 23), -torch.inf).triu(1)[None, None]
    want = theirs(x, table, causal)[0]
    assert near(got, want, 1e-6)

    gradient = torch.randn_like(got)
    got.backward(gradient)
    want.backward(gradient)
    assert len(pairs) == sum(1 for _ in theirs.parameters())
    for name, (mine, other) in pairs.items():
        assert near(mine.weight.grad, other.weight.grad, 1e-4), name


@pytest.mark.parametrize("yarn", [
    YarnConfig(factor=40, mscale=1.0, mscale_all_dim=1.0), YarnConfig(factor=4, original_max_position_embeddings=32768),
    YarnConfig(factor=2.5, original_max_position_embeddings=512, beta_fast=16, beta_slow=2), YARN,
], ids=["deepseek", "qwen", "other", "short"])  # fmt: skip
@pytest.mark.parametrize("width", [6, 64])
def test_yarn_equals_transformers(width: int, yarn: YarnConfig) -> None:
    config = small("mla", mla=MLAConfig(qk_rope_head_dim=width), yarn=yarn)
    theirs_config = transformers_config(config)
    if yarn.mscale_all_dim == 0:  # what a configuration without it means
        del theirs_config.rope_parameters["mscale_all_dim"], theirs_config.rope_parameters["mscale"]
    want = DeepseekV3RotaryEmbedding(theirs_config)(torch.zeros(1), torch.arange(300)[None])
    got = rotary_table(300, width, config.rope_theta, CPU, yarn)
    sign = torch.ones(width)
    sign[: width // 2] = -1
    torch.testing.assert_close(got[0], want[0][0], rtol=0, atol=1e-4)  # their angles are fp32
    torch.testing.assert_close(got[1], want[1][0] * sign, rtol=0, atol=1e-4)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_in_low_precision(interleaved: bool) -> None:
    tables = rotary_table(9, 8, 100.0, CPU)
    x = torch.randn(2, 9, 3, 8).bfloat16()
    got = rotate(x, *tables, interleaved)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, rotate(x.float(), *tables, interleaved).bfloat16(), rtol=0, atol=0)


def test_a_score_depends_on_distance_alone() -> None:
    cos, sin = rotary_table(40, 8, 100.0, CPU)
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    for interleaved in (False, True):
        rows = [rotate(x.expand(1, 40, 1, 8), cos, sin, interleaved)[0, :, 0] for x in (q, k)]
        scores = rows[0] @ rows[1].T
        torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1], rtol=1e-4, atol=1e-5)
        assert scores[:, 0].std() > 0.01


# ---------------------------------------------------------------- causal attention on a CPU


@pytest.mark.parametrize("kept", [0, 10_000], ids=["made again", "kept"])
@pytest.mark.parametrize(("length", "heads", "kv_heads", "width", "v_width"), [
    (1, 2, 2, 8, 8), (QUERIES - 1, 4, 2, 8, 6), (QUERIES, 3, 3, 6, 10), (QUERIES + 1, 6, 2, 5, 5), (3 * QUERIES + 17, 4, 1, 8, 8),
])  # fmt: skip
def test_causal_attention_in_blocks_equals_all_scores(
    length: int, heads: int, kv_heads: int, width: int, v_width: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_module, "KEPT", kept)
    q, k, v, dy = (
        torch.randn(2, length, h, w)
        for h, w in [(heads, width), (kv_heads, width), (kv_heads, v_width), (heads, v_width)]
    )
    ours = [x.clone().requires_grad_() for x in (q, k, v)]
    got = attend(*ours, None, 0.3)
    got.backward(dy)

    theirs = [x.double().requires_grad_() for x in (q, k, v)]
    k64, v64 = (x.repeat_interleave(heads // kv_heads, dim=2) for x in theirs[1:])
    scores = 0.3 * torch.einsum("bshc,bthc->bhst", theirs[0], k64)
    scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
    want = torch.einsum("bhst,bthc->bshc", scores.softmax(dim=-1), v64)
    want.backward(dy.double())
    assert near(got, want, 1e-5)
    for x, y in zip(ours, theirs, strict=True):
        # The first token sees itself alone: its query has no gradient, and no relative error.
        assert x.grad is not None and y.grad is not None
        assert (x.grad - y.grad).abs().max() <= 1e-5 * y.grad.abs().max() + 1e-7 * (length == 1)


def test_long_sequences_keep_no_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to KEPT positions the probabilities of the lower triangle's blocks are kept, beyond it nothing of S x S."""
    length = 4 * QUERIES
    for kept, blocks in ((length, 1 + 2 + 3 + 4), (length - 1, 0)):
        monkeypatch.setattr(attention_module, "KEPT", kept)
        sizes: list[int] = []

        def pack(x: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(x.numel())
            return x

        q, k, v = (torch.randn(1, length, 2, 4, requires_grad=True) for _ in range(3))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            attend(q, k, v, None, 1.0)
        assert sum(sizes) == 3 * q.numel() + 2 * blocks * QUERIES**2


# ---------------------------------------------------------------- documents


def test_document_ids() -> None:
    s = SEPARATOR
    tokens = torch.tensor([[1, 2, s, 3, s, s, 4, 5], [s, 1, 1, 1, 1, 1, 1, s], [1, 1, 1, 1, 1, 1, 1, 1]])
    ids = document_ids(tokens, s)
    assert ids.tolist() == [[0, 0, 1, 1, 2, 3, 3, 3], [1, 1, 1, 1, 1, 1, 1, 2], [0] * 8]
    assert document_lengths(ids) == (2, 2, 1, 3, 7, 1, 8)
    assert document_lengths(ids[2:]) is None
    assert document_lengths(ids[:, :1]) is None
    assert document_ids(tokens[:0], s).shape == (0, 8)
    assert document_mask(ids[:0]) is None
    assert document_mask(ids[:0].to("meta")) is None


# Lengths of the documents of three sequences of 24 tokens: of one token, ending with the sequence, one whole sequence.
PACKED = [[1, 1, 9, 13], [24], [23, 1]]


def packed_batch() -> tuple[Tensor, Tensor]:
    """tokens_BS and targets_BS: documents of `PACKED`, each but a sequence's first opened by the separator."""
    tokens = torch.randint(0, SEPARATOR, (3, 24))
    for row, lengths in zip(tokens, PACKED, strict=True):
        row[torch.tensor(lengths).cumsum(0)[:-1]] = SEPARATOR
    return tokens, torch.randint(0, 97, (3, 24))


@pytest.mark.parametrize("attention", ["gqa", "mla"])
def test_packed_documents_equal_each_by_itself(attention: str) -> None:
    model = build(small(attention), 3, CPU)
    tokens, targets = packed_batch()
    documents = document_ids(tokens, SEPARATOR)
    together = model(tokens, documents_BS=documents).logits
    loss = model(tokens, targets, documents).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    alone = torch.zeros(())
    for b, lengths in enumerate(PACKED):
        start = 0
        for length in lengths:
            part = (slice(b, b + 1), slice(start, start + length))
            assert near(together[part], model(tokens[part]).logits, 1e-5)
            alone = alone + model(tokens[part], targets[part]).loss
            start += length
    alone.backward()
    torch.testing.assert_close(loss, alone, rtol=1e-6, atol=0)
    for name, parameter in model.named_parameters():
        assert near(gradients[name], parameter.grad, 1e-4), name


@pytest.mark.parametrize("attention", ["gqa", "mla"])
@pytest.mark.parametrize("lengths", [[7, 9], [1, 15], [15, 1], [5, 1, 10]], ids=str)
def test_no_token_sees_another_document(attention: str, lengths: list[int]) -> None:
    # Dense: an expert's product may round otherwise when it has other rows besides a token's, and here bits must be equal.
    model = build(small(attention, n_dense_layers=2, d_dense=30), 0, CPU)
    tokens = torch.randint(0, SEPARATOR, (1, 16))
    ends = torch.tensor(lengths).cumsum(0).tolist()
    tokens[0, ends[:-1]] = SEPARATOR
    documents = document_ids(tokens, SEPARATOR)
    before = model(tokens, documents_BS=documents).logits
    start = 0
    for end in ends:
        changed = tokens.clone()
        changed[0, start] = (tokens[0, start] + 1) % SEPARATOR
        after = model(changed, documents_BS=documents).logits
        assert torch.equal(after[0, :start], before[0, :start]) and torch.equal(after[0, end:], before[0, end:])
        # Not masked, the same change reaches the documents that follow.
        if end < 16:
            assert not near(model(changed).logits[0, end:], model(tokens).logits[0, end:], 1e-5)
        start = end


@pytest.mark.parametrize("attention", ["gqa", "mla"])
def test_one_document_a_sequence_is_plain_attention(attention: str) -> None:
    model = build(small(attention), 0, CPU)
    tokens = torch.randint(0, SEPARATOR, (3, 12))
    tokens[1, 0] = SEPARATOR
    assert torch.equal(model(tokens, documents_BS=document_ids(tokens, SEPARATOR)).logits, model(tokens).logits)


@pytest.mark.parametrize("attention", ["gqa", "mla"])
def test_a_batch_of_no_sequence(attention: str) -> None:
    model = build(small(attention), 0, CPU)
    none = torch.zeros(0, 12, dtype=torch.int64)
    out = model(none, none, document_ids(none, SEPARATOR))
    (out.loss + out.aux).backward()
    assert out.loss == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and (parameter.grad == 0).all(), name


# ---------------------------------------------------------------- flex_attention, which CUDA uses


@pytest.fixture
def flex_with_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """flex_attention, not compiled, on a CPU. It refuses inputs that need a gradient there, although its plain form has
    one; and it warns that it holds all scores."""
    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "_WARNINGS_SHOWN", {"flex_attention_performance"})


def ids_of(lengths: list[list[int]]) -> Tensor:
    return torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])


DOCUMENTS = {
    "short": [[1, 1, 9, 13], [24], [23, 1]],
    "blocks": [[BLOCK, BLOCK, BLOCK], [3 * BLOCK], [2 * BLOCK + 1, BLOCK - 1], [1] * (3 * BLOCK)],
    "ragged": [[BLOCK + 40, 2 * BLOCK - 30], [BLOCK, 2 * BLOCK + 10], [3 * BLOCK + 10], [5, 3 * BLOCK + 5]],
}


@pytest.mark.parametrize("lengths", DOCUMENTS.values(), ids=DOCUMENTS)
def test_block_mask_equals_the_one_from_every_pair(lengths: list[list[int]]) -> None:
    ids = ids_of(lengths)
    batch, length = ids.shape
    got = block_mask(ids)
    want = flex.create_block_mask(
        lambda b, h, q, k: (q >= k) & (ids[b, q] == ids[b, k]), batch, None, length, length, device="cpu"
    )
    assert got.shape == want.shape and got.BLOCK_SIZE == want.BLOCK_SIZE
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts, indices = (getattr(got, f"{kind}_num_blocks"), getattr(got, f"{kind}_indices"))
        assert torch.equal(counts, getattr(want, f"{kind}_num_blocks")), kind
        listed = torch.arange(indices.shape[-1]) < counts[..., None]
        assert torch.equal(indices[listed], getattr(want, f"{kind}_indices")[listed]), kind


def test_block_mask_reads_nothing_back_to_the_host() -> None:
    ids = ids_of(DOCUMENTS["ragged"])
    with FakeTensorMode() as mode:  # where a value that is read raises
        assert block_mask(mode.from_tensor(ids)).shape == (4, 1, 3 * BLOCK + 10, 3 * BLOCK + 10)


@pytest.mark.parametrize("lengths", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize(("heads", "kv_heads", "width", "v_width"), [(4, 2, 8, 8), (2, 2, 10, 6)], ids=["gqa", "mla"])
@pytest.mark.usefixtures("flex_with_backward")
def test_flex_and_split_documents_equal_a_dense_mask(
    heads: int, kv_heads: int, width: int, v_width: int, lengths: list[list[int]]
) -> None:
    ids = ids_of(lengths)
    batch, length = ids.shape
    shapes = [(batch, length, heads, width), (batch, length, kv_heads, width), (batch, length, kv_heads, v_width)]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    gradient = torch.randn(batch, length, heads, v_width)

    visible = (ids[:, :, None] == ids[:, None, :]) & torch.ones(length, length, dtype=torch.bool).tril()
    q, k, v = (x.transpose(1, 2) for x in inputs)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None], scale=0.3, enable_gqa=heads != kv_heads)
    want = want.transpose(1, 2)
    wanted = torch.autograd.grad(want, inputs, gradient)
    for mask in (block_mask(ids), document_lengths(ids)):
        got = attend(*inputs, mask, 0.3)
        assert got.shape == want.shape
        assert near(got, want, 2e-6)
        for name, mine, other in zip("qkv", torch.autograd.grad(got, inputs, gradient), wanted, strict=True):
            assert near(mine, other, 1e-5), name


@pytest.mark.parametrize("attention", ["gqa", "mla"])
@pytest.mark.usefixtures("flex_with_backward")
def test_the_model_with_flex_equals_the_model_without(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(small(attention), 1, CPU)
    tokens, targets = packed_batch()

    def run(model: Transformer) -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        loss = model(tokens, targets, document_ids(tokens, SEPARATOR)).loss
        loss.backward()
        return loss, [p.grad.clone() for p in model.parameters()]

    loss, gradients = run(model)
    monkeypatch.setattr("moesaic.moe.model.document_mask", block_mask)
    flex_loss, flex_gradients = run(model)
    torch.testing.assert_close(flex_loss, loss, rtol=1e-6, atol=0)
    for mine, other in zip(flex_gradients, gradients, strict=True):
        assert near(mine, other, 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["gqa", "mla"])
def test_the_compiled_model_on_a_gpu_equals_the_cpu(attention: str) -> None:
    changes = (
        {"mla": MLAConfig(q_lora_rank=32, kv_lora_rank=32, v_head_dim=64)} if attention == "mla" else {"head_dim": 64}
    )
    model = build(small(attention, **changes), 1, CPU)
    tokens = torch.randint(0, SEPARATOR, (2, 300))
    tokens[0, [0, 40, 200]] = tokens[1, 299] = SEPARATOR
    documents = document_ids(tokens, SEPARATOR)
    want = model(tokens, documents_BS=documents).logits
    model.cuda()
    got = model(tokens.cuda(), documents_BS=documents.cuda()).logits
    assert near(got.cpu(), want, 1e-2)
    got.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(("make", "line"), [
    (lambda: small("mha"), "model.attention=mha: must be one of gqa, mla"),
    (lambda: small("mla", n_kv_heads=2), "model.n_kv_heads=2: has no meaning with model.attention=mla"),
    (lambda: small("mla", qk_norm="head"), "model.qk_norm=head: has no meaning with model.attention=mla"),
    (lambda: MLAConfig(qk_rope_head_dim=7), "model.mla.qk_rope_head_dim=7: must be even"),
    (lambda: MLAConfig(q_lora_rank=0), "model.mla.q_lora_rank=0: must be at least 1"),
    (lambda: YarnConfig(factor=0.5), "model.yarn.factor=0.5: must be at least 1"),
    (lambda: YarnConfig(beta_slow=64), "model.yarn.beta_slow=64: must lie between 0 and model.yarn.beta_fast=32.0"),
], ids=lambda value: value if isinstance(value, str) else "make")  # fmt: skip
def test_mistakes_name_the_knob(make, line: str) -> None:
    with pytest.raises(ValueError, match=f"^{line}"):
        make()


def test_heads_of_latent_attention_need_not_divide_the_width() -> None:
    assert small("mla", d_model=42, n_heads=5).rotary_width == 6
