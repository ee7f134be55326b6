"""Other libraries' expert parallelism held to their own single process, as `make parity` holds ours, on the same cells.

    python benchmarks/peers_parity.py                       # about five minutes on two cores
    python benchmarks/peers_parity.py --only transformers

transformers: Qwen3-MoE, saved, and loaded by `from_pretrained(distributed_config=DistributedConfig(...))`, which needs
accelerate; gradients are clipped by what its Trainer clips with. DeepSpeed: `deepspeed.moe.layer.MoE` in a small decoder, with
parameter groups by its `split_params_into_different_moe_groups_for_optimizer`, nothing dropped and nothing random in its gate, so
that a single process can repeat it. Both take the mean over ranks: the loss they get is this rank's part of the token mean, times
the ranks.

A peer's single process is its model without any of its parallelism, by plain torch; it replays the micro-batches of the ranks in
turn. Compared over three steps, in fp32: losses, every parameter's whole gradient, norm before clipping, weights, rows an expert
gets, and the ranks with each other. The tolerance is that of `make parity`, for both sides. A batch without sequences crashes
transformers' attention even in one process: here the rank gets a sequence whose targets are all ignored instead.

Letters: L MoE layers, E experts, B sequences, S positions, V vocabulary, D model width, F expert width.
"""

import argparse
import json
import math
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the matrix, which is among the tests

import compare
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.launch.batches import micro_batches
from moesaic.launch.data import train_batch
from moesaic.parallel.apply import total
from moesaic.parallel.zero import import_deepspeed
from tests.parallel.cells import LAYOUTS, WORKLOADS, Cell
from tests.parallel.parity import (
    CPU,
    STEPS,
    TOLERANCE,
    Named,
    Samples,
    check_workload,
    norm_of,
    pools,
    relative,
    run_cell,
    whole,
    wishes,
)
from tests.parallel.pool import Pool, RanksFailed

BALANCE = 0.1  # what the peer's own balance loss is multiplied with
SHARED: dict[str, Any] = {"lr": 2e-3, "eps": 1e-3, "weight_decay": 0.1}  # AdamW's; eps as in the matrix
BY_NAME = {layout.name: layout for layout in LAYOUTS}


@dataclass(frozen=True)
class Setting:
    """A layout of a peer: ours of the same name, the peer's own words for it, and the ranks that share an expert."""

    peer: str
    layout: str
    knobs: tuple[tuple[str, int], ...]

    @property
    def cells(self) -> list[Cell]:
        return [Cell(BY_NAME[self.layout], workload) for workload in WORKLOADS]


def setting(peer: str, layout: str, **knobs: int) -> Setting:
    return Setting(peer, layout, tuple(knobs.items()))


SETTINGS = (
    setting("transformers", "FSDP 2", fsdp_size=2),
    setting("transformers", "EP 2", fsdp_size=2, ep_size=2),
    setting("transformers", "EP 2 x FSDP 2", fsdp_size=4, ep_size=2),
    setting("transformers", "EP 4, 2 experts a rank", fsdp_size=4, ep_size=4),
    setting("transformers", "HSDP 2 x 2, EP 2", fsdp_size=2, dp_replicate_size=2, ep_size=2),
    *(setting("deepspeed", f"ZeRO-{stage}", stage=stage, ep_size=1) for stage in range(4)),
    *(setting("deepspeed", f"ZeRO-{stage}, EP 2", stage=stage, ep_size=2) for stage in range(4)),
    *(setting("deepspeed", f"ZeRO-{stage}, EP 2 x FSDP 2", stage=stage, ep_size=2) for stage in range(4)),
)


# ---------------------------------------------------------------- models


class Side(Protocol):
    """A model in training, alone or spread."""

    def forward(self, tokens_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, S, V), the balance loss, rows per layer and expert, int64 (L, E)."""

    def backward(self, loss: Tensor) -> None: ...

    def gradients(self) -> Named:
        """Whole ones, by the names of the single process. Of experts that others hold, those may be missing."""

    def step(self, clip: float) -> Tensor:
        """The norm before clipping."""

    def weights(self) -> Named: ...


def fill(cell: Cell, name: str, tensor: Tensor) -> None:
    """Initial weights of (seed, name) that make the workload, in the same way as those of the matrix."""
    kind, wish_E = name.rpartition(".")[0].rpartition(".")[2], wishes(cell.workload, cell.layout.experts)
    with torch.no_grad():
        if tensor.ndim == 1:
            tensor.fill_(1.0)
            return
        tensor.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(zlib.crc32(f"{cell.seed} {name}".encode())))
        if kind in ("embed_tokens", "embedding"):
            tensor *= 3
            tensor[:, 0] = 1.5 if wish_E.any() else tensor[:, 0]
        if kind in ("gate", "wg") and wish_E.any():
            tensor[:, 0] = wish_E / 3.5


class Qwen:
    """transformers' Qwen3-MoE: alone, or as `from_pretrained` spread it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), **SHARED)
        self.chosen: list[Tensor] = []
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(lambda _, inputs, outputs: self.chosen.append(outputs[2]))

    def forward(self, tokens_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.chosen.clear()
        out = self.model(input_ids=tokens_BS, use_cache=False, output_router_logits=True)
        counts = [chosen.flatten().bincount(minlength=self.model.config.num_experts) for chosen in self.chosen]
        return out.logits, out.aux_loss, torch.stack(counts)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def gradients(self) -> Named:
        return whole({name: p.grad for name, p in self.model.named_parameters() if p.grad is not None})

    def step(self, clip: float) -> Tensor:
        from transformers.trainer import Trainer
        from transformers.trainer_optimizer import has_mixed_dtensor

        parameters = list(self.model.parameters())
        if has_mixed_dtensor(p.grad for p in parameters if p.grad is not None):
            norm = Trainer._mixed_mesh_grad_norm(None, self.model, clip)  # type: ignore[arg-type]
        else:
            norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return whole({"": norm})[""]

    def weights(self) -> Named:
        return whole(dict(self.model.named_parameters()))


def qwen(cell: Cell) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = cell.config().model
    config = Qwen3MoeConfig(
        vocab_size=model.vocab_size, hidden_size=model.d_model, moe_intermediate_size=model.d_expert,
        num_hidden_layers=model.n_layers, num_attention_heads=model.n_heads, num_key_value_heads=model.n_heads,
        head_dim=model.d_model // model.n_heads, num_experts=model.n_experts, num_experts_per_tok=model.router.top_k,
        norm_topk_prob=cell.top_k > 1, max_position_embeddings=64,
    )  # fmt: skip
    result = Qwen3MoeForCausalLM(config)
    for name, p in result.named_parameters():
        fill(cell, name, p)
    return result


def spread_qwen(cell: Cell, knobs: dict[str, int], folder: str) -> Side:
    from transformers import Qwen3MoeForCausalLM
    from transformers.distributed import DistributedConfig

    return Qwen(Qwen3MoeForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**knobs)))


class Expert(nn.Module):
    def __init__(self, d_model: int, d_expert: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(d_model, 2 * d_expert, bias=False)
        self.down = nn.Linear(d_expert, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Layer(nn.Module):
    """Causal attention, then DeepSpeed's MoE layer."""

    def __init__(self, cell: Cell, ep_size: int) -> None:
        from deepspeed.moe.layer import MoE

        super().__init__()
        config = cell.config().model
        self.heads = config.n_heads
        self.norm1, self.norm2 = nn.RMSNorm(config.d_model, eps=1e-6), nn.RMSNorm(config.d_model, eps=1e-6)
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)
        self.moe = MoE(
            config.d_model, Expert(config.d_model, config.d_expert), config.n_experts, ep_size, cell.top_k,
            min_capacity=0, drop_tokens=False, use_rts=False, top2_2nd_expert_sampling=False,
        )  # fmt: skip

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, S, D = x_BSD.shape
        q, k, v = self.qkv(self.norm1(x_BSD)).view(B, S, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BSD = x_BSD + self.out(attended.transpose(1, 2).reshape(B, S, D))
        y_BSD, aux, counts_E = self.moe(self.norm2(x_BSD))
        return x_BSD + y_BSD, aux, counts_E


class Decoder(nn.Module):
    """`offset`: the first expert of this rank, whose parameters bear the names of the single process."""

    def __init__(self, cell: Cell, ep_size: int, ep_rank: int) -> None:
        super().__init__()
        config = cell.config().model
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Layer(cell, ep_size) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.d_model, eps=1e-6)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.offset = ep_rank * config.n_experts // ep_size
        for name, p in self.named().items():
            fill(cell, name, p)

    def named(self) -> dict[str, nn.Parameter]:
        def rename(name: str) -> str:
            before, found, after = name.partition("deepspeed_experts.")
            number, _, rest = after.partition(".")
            return f"{before}{found}{int(number) + self.offset}.{rest}" if found else name

        return {rename(name): p for name, p in self.named_parameters()}

    def forward(self, tokens_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, balance, counts = self.embedding(tokens_BS), [], []
        for layer in self.layers:
            x, aux, counts_E = layer(x)
            balance.append(aux)
            counts.append(counts_E)
        return self.head(self.norm(x)), torch.stack(balance).mean(), torch.stack(counts)


class Alone:
    """The decoder in one process, without DeepSpeed's engine."""

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), **SHARED)

    def forward(self, tokens_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.model(tokens_BS)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def gradients(self) -> Named:
        return {name: p.grad.clone() for name, p in self.model.named().items() if p.grad is not None}

    def step(self, clip: float) -> Tensor:
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def weights(self) -> Named:
        return {name: p.detach().clone() for name, p in self.model.named().items()}


class ZeRO:
    """The decoder in DeepSpeed's engine."""

    def __init__(self, cell: Cell, knobs: dict[str, int]) -> None:
        deepspeed = import_deepspeed(CPU)
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

        self.stage, self.tools = knobs["stage"], deepspeed.utils
        self.module = Decoder(cell, knobs["ep_size"], dist.get_rank() % knobs["ep_size"])
        groups = split({"params": list(self.module.parameters()), "name": "parameters"})
        settings = {
            "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": cell.clip,
            "zero_optimization": {"stage": self.stage}, "zero_allow_untested_optimizer": True, "steps_per_print": None,
        }  # fmt: skip
        optimizer = torch.optim.AdamW(groups, **SHARED)
        self.engine, *_ = deepspeed.initialize(model=self.module, optimizer=optimizer, config=settings)
        self.norms: list[Any] = []
        if self.stage == 0:  # its engine clips by this, and forgets what it returns
            from deepspeed.runtime.utils import clip_grad_norm_

            def clipping() -> None:
                self.norms.append(clip_grad_norm_(self.module.parameters(), cell.clip, mpu=self.engine.mpu))

            self.engine.clip_fp32_gradients = clipping

    def forward(self, tokens_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.engine(tokens_BS)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def gradients(self) -> Named:
        found = {name: self.tools.safe_get_full_grad(p) for name, p in self.module.named().items()}
        return {name: gradient.detach().float().clone() for name, gradient in found.items() if gradient is not None}

    def step(self, clip: float) -> Tensor:
        self.engine.step()
        norm = self.norms.pop() if self.stage == 0 else self.engine.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32).reshape(())

    def weights(self) -> Named:
        if self.stage == 3:
            return {n: self.tools.safe_get_full_fp32_param(p).clone() for n, p in self.module.named().items()}
        return {name: p.detach().clone() for name, p in self.module.named().items()}


# ---------------------------------------------------------------- a run


def train(side: Side, cell: Cell, ranks: Sequence[int], rank_mean: int) -> dict[str, Any]:
    """Three steps over the micro-batches of `ranks`; the loss times `rank_mean`, for who takes a mean over ranks."""
    config = cell.config()
    batch, seq_len = config.train.global_batch, config.train.seq_len
    stream: Any = Samples(seq_len, config.model.vocab_size)
    run: dict[str, Any] = {"losses": [], "norms": [], "counts": []}
    for step in range(STEPS):
        loss, counts_LE = torch.zeros(()), torch.zeros(config.model.n_layers, config.model.n_experts, dtype=torch.int64)
        for rank in ranks:
            for first, n in micro_batches(batch, config.train, rank, cell.layout.world):
                rows = torch.from_numpy(train_batch(stream, config.train.seed, step * batch + first, max(n, 1)))
                tokens, targets = rows[:, :-1], rows[:, 1:] if n else torch.full_like(rows[:, 1:], -100)
                logits, balance, counts = side.forward(tokens)
                entropy = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / (batch * seq_len)
                side.backward((entropy + BALANCE * balance * n / batch) * rank_mean)
                loss, counts_LE = loss + entropy.detach(), counts_LE + counts
        if step == 0:
            run["gradients"] = side.gradients()
        run["norms"].append(side.step(cell.clip))
        run["losses"].append(loss)
        run["counts"].append(counts_LE)
    run["weights"] = side.weights()
    return run | {key: torch.stack(run[key]) for key in ("losses", "norms", "counts")}


def on_rank(setting: Setting, cell: Cell, folder: str) -> dict[str, Any]:
    """This rank's run, of which losses and counts are all ranks'."""
    knobs = dict(setting.knobs)
    torch.manual_seed(1)
    side: Side = spread_qwen(cell, knobs, folder) if setting.peer == "transformers" else ZeRO(cell, knobs)
    run = train(side, cell, [dist.get_rank()], dist.get_world_size())
    return run | {key: total(run[key]) for key in ("losses", "counts")}


def alone(peer: str, cell: Cell, folder: str) -> dict[str, Any]:
    """The peer's single process; raises Unfit where the run is not the workload."""
    if peer == "transformers":
        model = qwen(cell)
        model.save_pretrained(folder)
        side: Side = Qwen(model)
    else:
        import_deepspeed(CPU)
        side = Alone(Decoder(cell, 1, 0))
    run = train(side, cell, range(cell.layout.world), 1)
    config = cell.config().train
    ranks = range(cell.layout.world)
    dealt = [[n for _, n in micro_batches(config.global_batch, config, r, cell.layout.world)] for r in ranks]
    check_workload(cell, run["counts"][0], dealt)
    assert norm_of(run["gradients"]) > cell.clip
    return run


# ---------------------------------------------------------------- the verdict


@dataclass
class Verdict:
    """status: green, red, refused (it says that it can't) or fails (another exception). errors: of each kind of
    quantity, the largest difference and where it is."""

    status: str
    errors: dict[str, tuple[float, str]] = field(default_factory=dict)
    reason: str = ""

    @property
    def worst(self) -> float:
        return max((error for error, _ in self.errors.values()), default=math.inf)


def judge(want: dict[str, Any], ranks: list[dict[str, Any]]) -> Verdict:
    got: dict[str, Any] = {key: ranks[0][key] for key in ("losses", "norms", "counts")}
    errors = {"losses": (relative(got["losses"], want["losses"]), "")}
    reasons = []
    for kind in ("gradients", "weights"):
        got[kind] = {name: tensor for run in reversed(ranks) for name, tensor in run[kind].items()}
        found = [(relative(got[kind][n], t) if n in got[kind] else math.inf, n) for n, t in want[kind].items()]
        errors[kind] = max(found)
        if differ := max(
            (relative(run[kind][n], t), n) for run in ranks for n, t in got[kind].items() if n in run[kind]
        )[0]:
            reasons.append(f"ranks differ in {kind}, by {differ:.1e}")
    errors["norms"] = max((relative(run["norms"], want["norms"]), f"rank {i}") for i, run in enumerate(ranks))
    wrong = {kind: error for kind, (error, _) in errors.items() if not error <= TOLERANCE}
    if not torch.equal(got["counts"][0], want["counts"][0]):
        reasons.append("other rows per expert")
    if "gradients" in wrong:
        reasons.append(factors(want["gradients"], got["gradients"]))
    if "norms" in wrong:
        reasons.append(
            "norm of step 1 times " + "; ".join(f"{run['norms'][0] / want['norms'][0]:.4f}" for run in ranks)
        )
    reasons += [f"{kind} differ by {error:.1e} ({errors[kind][1]})" for kind, error in wrong.items() if kind != "norms"]
    return Verdict("red" if reasons else "green", errors, "; ".join(reasons))


def factors(want: Named, got: Named) -> str:
    """What gradients are times, where that is all that is wrong with them: of experts, and of the rest."""
    said = []
    for kind in ("experts", "the rest"):
        names = [n for n in want if ("experts" in n) == (kind == "experts") and n in got]
        ratio = sum((got[n] * want[n]).sum() for n in names) / sum((want[n] ** 2).sum() for n in names)
        exact = max(relative(got[n] / ratio, want[n]) for n in names) <= TOLERANCE
        said.append(f"gradients of {kind}: " + (f"exactly {ratio:.4g} times" if exact else "not even up to a factor"))
    return ", ".join(said)


def compare_peer(setting: Setting, cell: Cell, want: dict[str, Any], folder: str, pool: Pool) -> Verdict:
    try:
        return judge(want, pool.run(on_rank, setting, cell, folder))
    except RanksFailed as error:
        told = {m.trace.strip().splitlines()[-1] for m in error.mistakes.values()} or set(error.lost.values())
        reason = "; ".join(sorted(told))
        return Verdict("refused" if "not supported" in reason else "fails", reason=reason)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", default="", help="peers and layouts whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [s for s in SETTINGS if options.only in f"{s.peer} {s.layout}"]
    table: dict[Setting, dict[str, Verdict]] = {s: {} for s in chosen}
    ours: dict[Cell, Any] = {}
    with pools() as pool, tempfile.TemporaryDirectory() as folder:
        for peer, world, workload in groups(chosen):
            part = [s for s in chosen if s.peer == peer and BY_NAME[s.layout].world == world]
            saved = str(Path(folder) / "model")
            want = alone(peer, Cell(BY_NAME[part[0].layout], workload), saved)
            for s in part:
                cell = Cell(BY_NAME[s.layout], workload)
                verdict = table[s][workload] = compare_peer(s, cell, want, saved, pool(world))
                if cell not in ours:
                    ours[cell] = run_cell(pool(world), cell, times=1)
                tell(s, cell, ours[cell], verdict)
            shutil.rmtree(saved, ignore_errors=True)
    print("\n".join(markdown(table, ours)))


def groups(settings: Sequence[Setting]) -> Iterator[tuple[str, int, str]]:
    """(peer, ranks, workload): one single process serves all layouts of them."""
    for peer, world in dict.fromkeys((s.peer, BY_NAME[s.layout].world) for s in settings):
        for workload in WORKLOADS:
            yield peer, world, workload


def tell(setting: Setting, cell: Cell, ours: Any, peer: Verdict) -> None:
    limited: Callable[[float], float] = lambda error: max(error, TOLERANCE)  # noqa: E731
    line = {
        "benchmark": "peers_parity", "case": f"{cell.layout.name}; {cell.workload}", "ours": compare.rounded(ours.error, 2),
        "peer": compare.rounded(peer.worst, 2) if math.isfinite(peer.worst) else None,
        "peer_name": f"{setting.peer} {version(setting.peer)}", "unit": "largest relative difference from its own single process",
        "ratio": compare.rounded(limited(peer.worst) / limited(ours.error), 3) if math.isfinite(peer.worst) else None,
        "ours_status": ours.status, "peer_status": peer.status, "peer_reason": peer.reason,
        "peer_errors": {kind: compare.rounded(e, 2) if math.isfinite(e) else None for kind, (e, _) in peer.errors.items()},
    }  # fmt: skip
    print(json.dumps(line), flush=True)


def markdown(table: dict[Setting, dict[str, Verdict]], ours: dict[Cell, Any]) -> list[str]:
    def shown(status: str, error: float) -> str:
        number = f"{error:.0e}".replace("e-0", "e-")
        return number if status == "green" else f"**{status}, {number}**" if math.isfinite(error) else f"**{status}**"

    lines = ["", "| layout | side | " + " | ".join(WORKLOADS) + " |", "|---" * (len(WORKLOADS) + 2) + "|"]
    for s, verdicts in table.items():
        cells = [shown(v.status, v.worst) for v in verdicts.values()]
        lines.append(f"| {s.layout} | {s.peer} | " + " | ".join(cells) + " |")
        mine = [ours[Cell(BY_NAME[s.layout], workload)] for workload in verdicts]
        lines.append("| | ours | " + " | ".join(shown(o.status, o.error) for o in mine) + " |")
    return lines


if __name__ == "__main__":
    import peers_parity  # the module of that name is what ranks import functions from

    peers_parity.main()
