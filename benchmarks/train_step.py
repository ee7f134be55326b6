"""A whole training step against transformers' OLMoE: same shape, same weights, same batches, same optimizer.

    python benchmarks/train_step.py

Forward, loss with the balance loss, backward, clipping to norm 1, AdamW, clearing gradients; one process, two threads, fp32. The
peer runs with each of its expert implementations, SDPA attention and the faster AdamW of PyTorch's two; the line with
`"best": true` is against the fastest of them.

Times are taken with the balance loss on both sides. The two libraries define it differently (transformers multiplies load and
probability after averaging them over layers, ours does so in each layer), so that it would make the losses part; hence the
comparison of losses, 10 steps from the same weights on the same batches, is made without it. Where they part there, nothing
is timed.
"""

import dataclasses
import sys
import time
from collections.abc import Callable

import compare
import torch
import transformers
from torch import Tensor, nn
from transformers import OlmoeConfig, OlmoeForCausalLM

from moesaic.launch.optim import make_optimizer
from moesaic.launch.schema import OptimConfig
from moesaic.moe.config import ModelConfig, RouterConfig
from moesaic.moe.model import Transformer, build

THREADS = 2
STEPS, ROUNDS = 10, 11
SEQUENCES, LENGTH = 4, 512
SHAPE = ModelConfig(
    vocab_size=4096, d_model=256, n_layers=4, n_heads=4, n_experts=32, d_expert=128, qk_norm="full",
    router=RouterConfig(top_k=4, renormalize=False, balance_coef=0.0, z_coef=0.0),
)  # fmt: skip
BALANCE = 0.01
CASE = "D 256, L 4, H 4, E 32, K 4, F 128, V 4096, batch 4x512, fp32, 2 threads"
OPTIM = OptimConfig(lr=1e-3, clip=1.0)
EXPERTS = ("eager", "grouped_mm", "batched_mm")  # the others of transformers 5.23 (deepgemm, sonicmoe) need CUDA
CPU = torch.device("cpu")

Batch = tuple[Tensor, Tensor]


@dataclasses.dataclass
class Side:
    """A model, its optimizer, and `losses`: (tokens, targets) -> (cross entropy, mean over tokens; what is differentiated)."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

    def gradients(self, batch: Batch) -> float:
        """Set the gradients of one batch, and return its cross entropy."""
        loss, total = self.losses(*batch)
        total.backward()
        return loss.item()

    def step(self, batch: Batch) -> float:
        loss = self.gradients(batch)
        nn.utils.clip_grad_norm_(self.model.parameters(), OPTIM.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss


def our_side(balance: float) -> Side:
    router = dataclasses.replace(SHAPE.router, balance_coef=balance)
    model = build(dataclasses.replace(SHAPE, router=router), seed=0, device=CPU)

    def losses(tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        out = model(tokens, targets)
        assert out.loss is not None
        loss = out.loss / targets.numel()
        return loss.detach(), loss + out.aux

    return Side(model, make_optimizer(model, OPTIM), losses)


def peer_side(experts: str, optimizer: str, balance: float) -> Side:
    config = OlmoeConfig(
        vocab_size=SHAPE.vocab_size, hidden_size=SHAPE.d_model, intermediate_size=SHAPE.d_expert,
        num_hidden_layers=SHAPE.n_layers, num_attention_heads=SHAPE.n_heads, num_experts=SHAPE.n_experts,
        num_experts_per_tok=SHAPE.router.top_k, norm_topk_prob=SHAPE.router.renormalize, rms_norm_eps=SHAPE.norm_eps,
        output_router_logits=True, router_aux_loss_coef=balance,
        rope_parameters={"rope_type": "default", "rope_theta": SHAPE.rope_theta}, max_position_embeddings=LENGTH,
        use_cache=False, pad_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = OlmoeForCausalLM._from_config(config, attn_implementation="sdpa", experts_implementation=experts)
    assert model.config._experts_implementation == experts and model.config._attn_implementation == "sdpa"
    copy_weights(build(SHAPE, seed=0, device=CPU), model)

    def losses(tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        out = model(input_ids=tokens, labels=targets, shift_labels=targets)
        return (out.loss - config.router_aux_loss_coef * out.aux_loss).detach(), out.loss

    return Side(model, adamw(model, optimizer), losses)


def adamw(model: nn.Module, implementation: str) -> torch.optim.AdamW:
    """The optimizer that `make_optimizer` makes, in the given implementation."""
    groups = [{k: g[k] for k in ("params", "weight_decay")} for g in make_optimizer(model, OPTIM).param_groups]
    betas = (OPTIM.beta1, OPTIM.beta2)
    return torch.optim.AdamW(groups, lr=OPTIM.lr, betas=betas, eps=OPTIM.eps, **{implementation: True})


@torch.no_grad()
def copy_weights(ours: Transformer, peer: OlmoeForCausalLM) -> None:
    """Every parameter of the peer is written, or this fails."""
    values = {
        "model.embed_tokens.weight": ours.embedding.weight,
        "model.norm.weight": ours.norm.weight,
        "lm_head.weight": ours.head.weight,
    }
    for i, block in enumerate(ours.blocks):
        attention, ffn = block.attention, block.ffn
        query, key, value = attention.wqkv.weight.chunk(3)
        values |= {
            f"model.layers.{i}.{name}": parameter
            for name, parameter in {
                "input_layernorm.weight": block.attention_norm.weight,
                "self_attn.q_proj.weight": query,
                "self_attn.k_proj.weight": key,
                "self_attn.v_proj.weight": value,
                "self_attn.q_norm.weight": attention.q_norm.weight,
                "self_attn.k_norm.weight": attention.k_norm.weight,
                "self_attn.o_proj.weight": attention.wo.weight,
                "post_attention_layernorm.weight": block.ffn_norm.weight,
                "mlp.gate.weight": ffn.router.weight_ED,
                "mlp.experts.gate_up_proj": ffn.experts.w_up_EGD,
                "mlp.experts.down_proj": ffn.experts.w_down_EDF,
            }.items()
        }
    peer.load_state_dict(values, strict=True)


def batches(count: int, sequences: int = SEQUENCES, length: int = LENGTH) -> list[Batch]:
    """Tokens drawn by Zipf's law, so that there is something to learn. The same in every call."""
    generator = torch.Generator().manual_seed(1)
    frequency = 1 / torch.arange(1, SHAPE.vocab_size + 1)
    drawn = torch.multinomial(frequency, count * sequences * (length + 1), replacement=True, generator=generator)
    return [(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in drawn.view(count, sequences, length + 1)]


def faster_adamw() -> str:
    """Which of PyTorch's fused and foreach AdamW takes less time for a model of this shape."""
    optimizers = {}
    for name in ("fused", "foreach"):
        model = build(SHAPE, seed=0, device=CPU)
        for p in model.parameters():
            p.grad = torch.full_like(p, 1e-3)
        optimizers[name] = adamw(model, name)
        optimizers[name].step()
    times = compare.alternate({name: optimizer.step for name, optimizer in optimizers.items()}, rounds=11)
    return min(times, key=lambda name: times[name])


def without_hopeless(sides: dict[str, Side]) -> dict[str, Side]:
    """Those that take at most five times as long as the fastest for one short sequence: the others would take minutes."""
    batch = batches(1, 1, 64)[0]
    times = {}
    for name, side in sides.items():
        for _ in range(2):
            start = time.perf_counter()
            side.gradients(batch)
            times[name] = time.perf_counter() - start
            side.model.zero_grad(set_to_none=True)
    kept = {name: side for name, side in sides.items() if times[name] <= 5 * min(times.values())}
    for name in sides.keys() - kept.keys():
        print(f"left out: {name}, {times[name] / min(times.values()):.0f} times the fastest", file=sys.stderr)
    return kept


def check_losses(ours: Side, peers: dict[str, Side]) -> tuple[float, dict[str, float]]:
    """The last cross entropy of each, of `STEPS` steps on the same batches. Ends the program where they part."""
    for step, batch in enumerate(batches(STEPS)):
        loss = ours.step(batch)
        peer_losses = {name: side.step(batch) for name, side in peers.items()}
        for name, peer_loss in peer_losses.items():
            if not abs(loss - peer_loss) <= 1e-4 * abs(peer_loss):
                raise SystemExit(f"step {step}: our loss {loss} and {peer_loss} of {name} differ; nothing is timed")
    return loss, peer_losses


def main() -> None:
    compare.warn_if_busy()
    torch.set_num_threads(THREADS)
    optimizer = faster_adamw()
    peers = without_hopeless({name: peer_side(name, optimizer, balance=0.0) for name in EXPERTS})
    our_loss, peer_losses = check_losses(our_side(balance=0.0), peers)

    def timed(side: Side) -> Callable[[], float]:
        remaining = iter(batches(1 + ROUNDS))
        side.step(next(remaining))
        return lambda: side.step(next(remaining))

    sides = {"ours": our_side(BALANCE)} | {name: peer_side(name, optimizer, BALANCE) for name in peers}
    seconds = compare.alternate({name: timed(side) for name, side in sides.items()}, ROUNDS)
    rates = {name: SEQUENCES * LENGTH / value for name, value in seconds.items()}
    fastest = max(rates[name] for name in peers)
    for name in sorted(peers, key=lambda name: rates[name]):
        compare.report(
            "train_step", CASE, rates["ours"], rates[name],
            f"transformers {transformers.__version__} OLMoE, {name} experts, SDPA, {optimizer} AdamW",
            "tokens/s", more_is_better=True, best=rates[name] == fastest,
            ours_loss=round(our_loss, 5), peer_loss=round(peer_losses[name], 5),
        )  # fmt: skip


if __name__ == "__main__":
    main()
