"""The whole model: against transformers' OLMoE, against a plain attention, and the promises of its initial weights."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.moe.attention import Attention, rotary_table
from moesaic.moe.config import ModelConfig, RouterConfig
from moesaic.moe.flops import parameter_counts
from moesaic.moe.model import IGNORED, Transformer, build

CPU = torch.device("cpu")


def small(**changes: object) -> ModelConfig:
    base: dict[str, object] = dict(
        vocab_size=97, d_model=48, n_layers=3, n_heads=4, n_experts=6, d_expert=20, router=RouterConfig(top_k=2)
    )
    return ModelConfig(**(base | changes))  # type: ignore[arg-type]


def olmoe_twin(model: Transformer) -> nn.Module:
    """transformers' OLMoE with the same weights."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    c = model.config
    twin = OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.d_model,
            intermediate_size=c.d_expert,
            num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads,
            num_key_value_heads=c.kv_heads,
            num_experts=c.n_experts,
            num_experts_per_tok=c.router.top_k,
            norm_topk_prob=c.router.renormalize,
            rms_norm_eps=c.norm_eps,
            rope_theta=c.rope_theta,
            attn_implementation="eager",
            pad_token_id=0,
            tie_word_embeddings=False,
        )
    )
    width = c.n_heads * c.head_width
    with torch.no_grad():
        twin.model.embed_tokens.weight.copy_(model.embedding.weight)
        twin.model.norm.weight.copy_(model.norm.weight)
        twin.lm_head.weight.copy_(model.head.weight)
        for ours, theirs in zip(model.blocks, twin.model.layers, strict=True):
            q, k, v = ours.attention.wqkv.weight.split([width, c.kv_heads * c.head_width, c.kv_heads * c.head_width])
            for name, value in (("q_proj", q), ("k_proj", k), ("v_proj", v), ("o_proj", ours.attention.wo.weight)):
                getattr(theirs.self_attn, name).weight.copy_(value)
            theirs.self_attn.q_norm.weight.copy_(ours.attention.q_norm.weight)
            theirs.self_attn.k_norm.weight.copy_(ours.attention.k_norm.weight)
            theirs.input_layernorm.weight.copy_(ours.attention_norm.weight)
            theirs.post_attention_layernorm.weight.copy_(ours.ffn_norm.weight)
            theirs.mlp.gate.weight.copy_(ours.ffn.router.weight_ED)
            theirs.mlp.experts.gate_up_proj.copy_(ours.ffn.experts.w_up_EGD)
            theirs.mlp.experts.down_proj.copy_(ours.ffn.experts.w_down_EDF)
    return twin


@pytest.mark.parametrize(("kv_heads", "renormalize"), [(4, False), (2, True)])
def test_logits_and_gradients_equal_transformers(kv_heads: int, renormalize: bool) -> None:
    router = RouterConfig(top_k=2, renormalize=renormalize)
    model = build(small(qk_norm="full", init_std=0.1, n_kv_heads=kv_heads, router=router), 5, CPU)
    twin = olmoe_twin(model)
    tokens = torch.randint(0, 97, (3, 23))
    got, want = model(tokens).logits, twin(tokens).logits
    assert (got - want).abs().max() / want.abs().max() < 1e-5

    out = model(tokens[:, :-1], tokens[:, 1:])
    loss = out.loss / (3 * 22)
    peer = F.cross_entropy(twin(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, peer, rtol=1e-6, atol=0)
    loss.backward()
    peer.backward()
    width = [4 * 12, kv_heads * 12, kv_heads * 12]
    for i, (ours, theirs) in enumerate(zip(model.blocks, twin.model.layers, strict=True)):
        q, k, v = ours.attention.wqkv.weight.grad.split(width)
        pairs = {
            "q": (q, theirs.self_attn.q_proj.weight), "k": (k, theirs.self_attn.k_proj.weight),
            "v": (v, theirs.self_attn.v_proj.weight), "o": (ours.attention.wo.weight.grad, theirs.self_attn.o_proj.weight),
            "q_norm": (ours.attention.q_norm.weight.grad, theirs.self_attn.q_norm.weight),
            "router": (ours.ffn.router.weight_ED.grad, theirs.mlp.gate.weight),
            "up": (ours.ffn.experts.w_up_EGD.grad, theirs.mlp.experts.gate_up_proj),
            "down": (ours.ffn.experts.w_down_EDF.grad, theirs.mlp.experts.down_proj),
        }  # fmt: skip
        for name, (mine, parameter) in pairs.items():
            assert (mine - parameter.grad).abs().max() / parameter.grad.abs().max() < 1e-4, (i, name)


@pytest.mark.parametrize("qk_norm", ["none", "head", "full"])
def test_attention_against_plain_loops(qk_norm: str) -> None:
    config = small(n_heads=4, n_kv_heads=2, head_dim=8, qk_norm=qk_norm)
    layer = Attention(config).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 7, 48, dtype=torch.float64)
    cos, sin = (t.double() for t in rotary_table(7, 8, config.rope_theta, CPU))
    got = layer(x, cos, sin)

    def norm(values: Tensor, weight: Tensor) -> Tensor:
        return values / (values.square().mean() + config.norm_eps).sqrt() * weight

    def turn(head: Tensor, position: int) -> Tensor:
        pairs = [complex(head[i], head[i + 4]) for i in range(4)]
        turned = [
            p * complex(math.cos(a), math.sin(a))
            for i, p in enumerate(pairs)
            for a in [position * config.rope_theta ** (-2 * i / 8)]
        ]
        return torch.tensor([p.real for p in turned] + [p.imag for p in turned], dtype=torch.float64)

    with torch.no_grad():
        for b in range(2):
            q_all, k_all, v_all = (x[b] @ layer.wqkv.weight.T).split([32, 16, 16], dim=1)
            heads = []
            for h in range(4):
                j = h // 2
                q, k, v = [], [], []
                for s in range(7):
                    qs, ks = q_all[s], k_all[s]
                    if qk_norm == "full":
                        qs, ks = norm(qs, layer.q_norm.weight), norm(ks, layer.k_norm.weight)
                    qs, ks = qs[h * 8 : h * 8 + 8], ks[j * 8 : j * 8 + 8]
                    if qk_norm == "head":
                        qs, ks = norm(qs, layer.q_norm.weight), norm(ks, layer.k_norm.weight)
                    q.append(turn(qs, s))
                    k.append(turn(ks, s))
                    v.append(v_all[s, j * 8 : j * 8 + 8])
                out = []
                for s in range(7):
                    scores = torch.stack([q[s] @ k[i] / math.sqrt(8) for i in range(s + 1)]).softmax(0)
                    out.append(sum(scores[i] * v[i] for i in range(s + 1)))
                heads.append(torch.stack(out))
            want = torch.cat(heads, dim=1) @ layer.wo.weight.T
            torch.testing.assert_close(got[b], want, rtol=1e-5, atol=1e-6 * want.abs().max().item())


def test_a_token_never_sees_a_later_one() -> None:
    model = build(small(), 0, CPU)
    tokens = torch.randint(0, 97, (1, 16))
    changed = tokens.clone()
    changed[0, 9] = (changed[0, 9] + 1) % 97
    one, two = model(tokens).logits, model(changed).logits
    torch.testing.assert_close(one[:, :9], two[:, :9], rtol=1e-5, atol=1e-6)
    assert (one[:, 9] - two[:, 9]).abs().max() > 1e-4


def test_ignored_targets_do_not_count() -> None:
    model = build(small(), 0, CPU)
    tokens = torch.randint(0, 97, (2, 9))
    targets = torch.randint(0, 97, (2, 9))
    whole = model(tokens, targets).loss
    half = targets.clone()
    half[:, ::2] = IGNORED
    rest = targets.clone()
    rest[:, 1::2] = IGNORED
    torch.testing.assert_close(model(tokens, half).loss + model(tokens, rest).loss, whole)


@pytest.mark.parametrize("changes", [
    {}, {"d_shared": 24}, {"n_dense_layers": 1, "d_dense": 40}, {"tie_embeddings": True}, {"n_dense_layers": 3, "d_dense": 8},
    {"n_kv_heads": 1, "head_dim": 10, "qk_norm": "head"},
], ids=str)  # fmt: skip
def test_every_parameter_learns_and_is_counted(changes: dict[str, object]) -> None:
    config = small(**changes)
    model = build(config, 1, CPU)
    tokens = torch.randint(0, 97, (4, 33))
    out = model(tokens[:, :-1], tokens[:, 1:])
    (out.loss / 128 + out.aux).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert parameter_counts(config).total == sum(p.numel() for p in model.parameters())
    assert out.counts.shape == (config.n_layers - config.n_dense_layers, 6)
    assert (out.counts.sum(dim=1) == 4 * 32 * 2).all()


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    one, same, other = (build(small(n_layers=2), seed, CPU) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.head.weight, other.head.weight)
    assert not torch.equal(one.blocks[0].attention.wo.weight, one.blocks[1].attention.wo.weight)
    deeper = build(small(n_layers=3), 3, CPU)
    assert torch.equal(one.blocks[1].attention.wqkv.weight, deeper.blocks[1].attention.wqkv.weight)


def test_initial_weights_have_the_stated_scale() -> None:
    config = small(d_model=96, d_expert=64, n_layers=2, init_std=0.03)
    model = build(config, 0, CPU)
    assert model.embedding.weight.std().item() == pytest.approx(0.03, rel=0.05)
    for weight in (model.blocks[0].attention.wo.weight, model.blocks[1].ffn.experts.w_down_EDF):
        assert weight.std().item() == pytest.approx(0.03 / math.sqrt(2 * 2), rel=0.05)
    assert (model.blocks[0].ffn_norm.weight == 1).all() and (model.norm.weight == 1).all()
