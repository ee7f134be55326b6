"""What the parity matrix is made of: layouts, workloads, the other axes, and which of their combinations exist.

A layout, or a value of an axis, is one line here. `Cell.config` turns a cell into the configuration of a run, by the knobs that a
user would turn.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations, product
from typing import Any

from hypothesis import strategies as st

from moesaic.kernels.rounding import RULES
from moesaic.launch.schema import Config, OptimConfig, TrainConfig
from moesaic.moe.config import MLAConfig, ModelConfig, RouterConfig
from moesaic.parallel.config import ParallelConfig


@dataclass(frozen=True)
class Layout:
    """A way to spread the model: ranks, the knobs of `parallel` that say how, and the routed experts of a layer."""

    name: str
    world: int
    knobs: tuple[tuple[str, Any], ...] = ()
    experts: int = 8

    @property
    def expert(self) -> int:
        return int(dict(self.knobs)["expert"])

    @property
    def shared(self) -> bool:
        """Whether it needs a shared expert."""
        return bool(dict(self.knobs).get("fused_shared"))


def layout(name: str, world: int, experts: int = 8, **knobs: Any) -> Layout:
    return Layout(name, world, tuple(({"expert": "1"} | knobs).items()), experts)


LAYOUTS = (
    layout("one rank", 1),
    layout("FSDP 2", 2),
    layout("FSDP 4", 4),
    layout("HSDP 2 x 2", 4, replicate=2),
    layout("4 copies", 4, replicate=4),
    layout("EP 2", 2, expert="2"),
    layout("EP 2 x FSDP 2", 4, expert="2"),
    layout(
        "EP 2 x FSDP 2, 3 experts a rank", 4, experts=6, expert="2"
    ),  # sharded within each expert: 2 does not divide 3
    layout("EP 4, 2 experts a rank", 4, expert="4"),
    layout("EP 4, 1 expert a rank", 4, experts=4, expert="4"),
    layout("EP 4 in two hops, 2 experts a rank", 4, expert="4", expert_path="two_hop", node_size="2"),
    layout("EP 4 in two hops, 1 expert a rank", 4, experts=4, expert="4", expert_path="two_hop", node_size="2"),
    layout("HSDP 2 x 2, EP 2", 4, expert="2", replicate=2),  # two copies of the experts
    layout("4 copies, EP 2", 4, expert="2", replicate=4),
    layout("HSDP 2 x 2, EP 4", 4, expert="4", replicate=2),  # two copies of all but the experts
    layout("EP 2, fused", 2, expert="2", expert_path="fused"),
    layout("EP 2, fused, shared in the queue", 2, expert="2", expert_path="fused", fused_shared=True),  # always has one
    layout("ZeRO-2, EP 2 x FSDP 2, fused", 4, expert="2", expert_path="fused", engine="deepspeed", zero_stage=2),
    layout("EP 4, fused, in two nodes", 4, expert="4", expert_path="fused", node_size="2"),
    *(layout(f"ZeRO-{stage}", 2, engine="deepspeed", zero_stage=stage) for stage in range(4)),
    *(layout(f"ZeRO-{stage}, EP 2", 2, expert="2", engine="deepspeed", zero_stage=stage) for stage in range(4)),
    *(
        layout(f"ZeRO-{stage}, EP 2 x FSDP 2", 4, expert="2", engine="deepspeed", zero_stage=stage)
        for stage in range(4)
    ),
    layout(
        "ZeRO-2, EP 4 in two hops",
        4,
        expert="4",
        expert_path="two_hop",
        node_size="2",
        engine="deepspeed",
        zero_stage=2,
    ),
)

# What the knobs refuse as a whole, whatever the rest of the cell.
REFUSED = (layout("ZeRO-2, HSDP 2 x 2", 4, replicate=2, engine="deepspeed", zero_stage=2),)

# Each is a distribution of tokens over experts or ranks; `moesaic` sees tokens and weights alone. See tests.parallel.parity.
WORKLOADS = ("uniform", "zipf", "one expert", "experts without a token", "a rank that receives nothing",
             "an empty remainder", "T prime")  # fmt: skip
UNEVEN = WORKLOADS[1:5]

# The other axes. Every value but the first of an axis is the exception; the first ones together are the default cell.
AXES: dict[str, tuple[Any, ...]] = {
    "path": ("auto", "local", "all_to_all"),
    "remat": ("none", "selective", "full"),
    "reshard": ("auto", "always", "never"),
    "accumulation": (1, 2),
    "router": ("softmax_topk", "renormalized", "sigmoid_bias", "sigmoid_bias in groups", "expert_choice"),
    "rows": ("none", *RULES, "capacity"),
    "balance": ("micro_batch", "sequence", "global", "layers"),
    "shared": (False, True),
    "tied": (False, True),
    "model": ("plain", "dense layer", "MLA", "biases", "top 4", "odd"),
}

ROUTER: dict[str, dict[str, Any]] = {
    "softmax_topk": {},
    "renormalized": dict(renormalize=True),
    "sigmoid_bias": dict(kind="sigmoid_bias", renormalize=True, scale=2.5, bias_rate=0.01),
    "sigmoid_bias in groups": dict(
        kind="sigmoid_bias", renormalize=True, scale=2.5, bias_rate=0.01, groups=2, groups_kept=1
    ),
    "expert_choice": dict(kind="expert_choice", renormalize=True),
}
MODEL: dict[str, dict[str, Any]] = {
    "plain": {},
    "dense layer": dict(n_dense_layers=1, d_dense=40, n_kv_heads=2, qk_norm="full"),
    "MLA": dict(attention="mla", mla=MLAConfig(
        q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=6,
    )),
    "biases": dict(expert_bias=True, activation="relu2", qk_norm="head"),
    "top 4": {},
    "odd": dict(d_model=34, n_heads=1, d_expert=21, activation="relu2", expert_bias=True),  # nothing that 4 divides
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One cell of the matrix. `sequence` positions in each of `sequences` sequences are a rank's micro-batch, unless the
    workload says otherwise."""

    layout: Layout
    workload: str = "uniform"
    path: str = "auto"
    remat: str = "none"
    reshard: str = "auto"
    accumulation: int = 1
    router: str = "softmax_topk"
    rows: str = "none"
    balance: str = "micro_batch"
    shared: bool = False
    tied: bool = False
    model: str = "plain"
    sequence: int = 16
    sequences: int = 3
    d_model: int = 32
    d_expert: int = 20
    clip: float = 0.1
    seed: int = 2

    def __str__(self) -> str:
        default = Cell(self.layout)
        changed = [f"{n}={v}" for n, v in asdict(self).items() if n != "layout" and v != getattr(default, n)]
        return "; ".join([self.layout.name, *changed])

    def reference(self) -> "Cell":
        """The same for all layouts of as many ranks: what one process computes."""
        return replace(self, layout=Layout("", self.layout.world, (), self.layout.experts), path="auto",
                       remat="none", reshard="auto", shared=self.shared or self.layout.shared)  # fmt: skip

    @property
    def top_k(self) -> int:
        if self.workload == "one expert":
            return 1
        return 4 if self.model == "top 4" else 2

    def config(self) -> Config:
        """Raises ValueError where a knob refuses."""
        sequence = 13 if self.workload == "T prime" else self.sequence
        micro = 1 if self.workload in ("T prime", "an empty remainder") else self.sequences
        batch = micro * self.accumulation * self.layout.world
        rows = {} if self.rows == "none" else dict(rounding=self.rows, rounding_tile=4)
        if self.rows == "capacity":
            rows = dict(capacity_factor=0.8)
        router = RouterConfig(
            **(dict(top_k=self.top_k, balance_over=self.balance, balance_coef=0.1, z_coef=0.01) | ROUTER[self.router]
               | rows)
        )  # fmt: skip
        model: dict[str, Any] = dict(
            vocab_size=61, d_model=self.d_model, n_layers=2, n_heads=4, n_experts=self.layout.experts,
            d_expert=self.d_expert, init_std=0.1, tie_embeddings=self.tied, router=router,
        ) | MODEL[self.model]  # fmt: skip
        if self.shared or self.layout.shared:
            model["d_shared"] = 2 * model["d_expert"]
        return Config(
            model=ModelConfig(**model),
            train=TrainConfig(
                steps=3, seed=self.seed, seq_len=sequence, micro_batch=micro, eval_every=0,
                global_batch=batch - 1 if self.workload == "an empty remainder" and batch > 1 else batch,
            ),
            # At eps 1e-8 rounding noise is divided by itself.
            optim=OptimConfig(lr=2e-3, eps=1e-3, warmup=0, clip=self.clip),
            parallel=ParallelConfig(
                **({"expert_path": self.path, "remat": self.remat, "reshard": self.reshard} | dict(self.layout.knobs))
            ),
        )  # fmt: skip


def impossible(values: Mapping[str, Any]) -> str | None:
    """Why these values of axes, not necessarily all, do not go together; None where they do.

    The first kind of reason is a workload that cannot be had; the second a rule of a knob, which
    tests.parallel.test_parity holds to be one: the knob refuses.
    """
    get = values.get
    if get("router") == "expert_choice" and get("workload") in UNEVEN:
        return "expert_choice gives every expert the same number of tokens"
    if get("layout") is not None and get("layout").world == 1 and get("workload") == "an empty remainder":
        return "one rank's batch is never empty"
    if get("workload") == "one expert" and get("model") == "top 4":
        return "a token that visits one expert does not visit four"
    experts = get("layout").experts if get("layout") is not None else 8
    if get("model") == "top 4" and get("workload") in UNEVEN and experts < 8:
        return "four of half the experts are all of them, or more"
    if get("router") == "sigmoid_bias in groups" and get("workload") == "experts without a token" and experts < 6:
        return "of a group of two, both are chosen"
    if get("path", "auto") != "auto" and get("layout") is not None and "expert_path" in dict(get("layout").knobs):
        return "the layout has its own path"
    return refused(values)


def refused(values: Mapping[str, Any]) -> str | None:
    """Rules of knobs."""
    get = values.get
    if get("router") == "expert_choice" and get("rows", "none") != "none":
        return "model.router.kind=expert_choice has no rows to round or to cap"
    if get("router") == "sigmoid_bias in groups" and get("rows", "none") not in ("none", "capacity"):
        return "model.router.rounding would send tokens outside their groups"
    layout = get("layout")
    if layout is None:
        return None
    if layout.shared and get("model") in ("biases", "odd"):
        return "parallel.fused_shared needs model.activation=swiglu"
    if get("path") == "local" and layout.expert > 1 and "expert_path" not in dict(layout.knobs):
        return "parallel.expert_path=local needs parallel.expert=1"
    if get("reshard", "auto") != "auto" and dict(layout.knobs).get("engine") == "deepspeed":
        return "parallel.reshard is a knob of parallel.engine=fsdp"
    if get("router") == "sigmoid_bias in groups" and get("model") == "top 4" and layout.experts < 8:
        return "model.router.groups_kept leaves fewer experts than model.router.top_k"
    return None


def all_pairs(
    axes: Mapping[str, Sequence[Any]], impossible: Callable[[Mapping[str, Any]], Any], done: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Rows, one value of each axis, that together with the rows `done` hold every possible pair of values of two axes.

    Greedy: a row begins with the first pair that is missing, and each of the other axes, the longest first, takes the value
    that adds most of the missing pairs; of equals the one that was taken least, so that rows differ in more than they must.
    Where that leaves a later axis without a value, the next best is tried.
    """
    names = sorted(axes, key=lambda name: -len(axes[name]))
    missing = {
        ((a, i), (b, j)): None
        for a, b in combinations(names, 2)
        for i, j in product(range(len(axes[a])), range(len(axes[b])))
        if not impossible({a: axes[a][i], b: axes[b][j]})
    }

    def pairs(row: Mapping[str, int]) -> list[tuple[tuple[str, int], tuple[str, int]]]:
        return list(combinations([(name, row[name]) for name in names if name in row], 2))

    def values(row: Mapping[str, int]) -> dict[str, Any]:
        return {name: axes[name][i] for name, i in row.items()}

    def complete(row: dict[str, int], order: list[str]) -> dict[str, int] | None:
        if not order:
            return row
        name = order[0]
        options = [{**row, name: i} for i in range(len(axes[name]))]
        options = [option for option in options if not impossible(values(option))]
        options.sort(key=lambda option: (-sum(pair in missing for pair in pairs(option)), taken[name, option[name]]))
        for option in options:
            if found := complete(option, order[1:]):
                return found
        return None

    taken: Counter[tuple[str, int]] = Counter()
    for row in done:
        for pair in pairs({name: list(axes[name]).index(row[name]) for name in names}):
            missing.pop(pair, None)
    while missing:
        first, second = next(iter(missing))
        row = complete(dict([first, second]), [name for name in names if name not in (first[0], second[0])])
        if row is None:  # no row holds it
            del missing[first, second]
            continue
        for pair in pairs(row):
            missing.pop(pair, None)
        taken.update(row.items())
        yield values(row)


def full_table(layouts: Sequence[Layout] = LAYOUTS) -> list[Cell]:
    """Every layout with every workload, all else by default."""
    cells = [Cell(layout, workload) for layout in layouts for workload in WORKLOADS]
    return [cell for cell in cells if not impossible(vars(cell))]


def pairwise_table(layouts: Sequence[Layout] = LAYOUTS) -> list[Cell]:
    """Cells that, with those of `full_table`, hold every pair of values of two axes that can be had."""
    axes = {"layout": layouts, "workload": WORKLOADS} | AXES
    done = [{name: getattr(cell, name) for name in axes} for cell in full_table(layouts)]
    return [Cell(**row) for row in all_pairs(axes, impossible, done)]


def drawn_cells() -> st.SearchStrategy[Cell]:
    """Any values of the axes that go together, and shapes of any size."""
    numbers = dict(
        sequence=st.integers(2, 20), sequences=st.integers(1, 4), d_model=st.integers(1, 5).map(lambda n: 8 * n),
        d_expert=st.integers(1, 33), clip=st.sampled_from([0.0, 0.05, 100.0]), seed=st.integers(0, 1000),
    )  # fmt: skip

    def more_experts(layout: Any) -> st.SearchStrategy[Any]:
        return st.integers(1, 2).map(lambda n: replace(layout, experts=n * layout.experts))

    layout = st.sampled_from(LAYOUTS).flatmap(more_experts)
    axes = {name: st.sampled_from(values) for name, values in AXES.items()}
    cells = st.builds(Cell, layout=layout, workload=st.sampled_from(WORKLOADS), **axes, **numbers)
    return cells.filter(lambda cell: not impossible(vars(cell)))
