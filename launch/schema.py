"""The configuration of a run. Hydra validates against these dataclasses: an unknown key is an error.

`Config` is the root of recipes/train.yaml. A field's docstring entry says what the knob means; `check` holds the rules that
join several knobs. The model's own part is moesaic.moe.config, that of the ranks moesaic.parallel.config.
"""

import math
import os
from dataclasses import dataclass, field

from moesaic.moe.config import ModelConfig, require
from moesaic.moe.precision import PrecisionConfig
from moesaic.parallel.config import ParallelConfig, shared_experts


@dataclass
class TrainConfig:
    """The loop.

    steps             optimizer steps in all; a resumed run stops at the same one
    seed              of initial weights and of the order of the data
    global_batch      sequences of one optimizer step, over all ranks
    micro_batch       sequences a rank takes at once (null: as many as fit 16,384 tokens, the share split evenly)
    seq_len           tokens of a sequence
    log_every         steps between progress lines and records of metrics.jsonl
    checkpoint_every  steps between checkpoints (0: only the last step's)
    keep_checkpoints  newest checkpoints that are kept
    checkpoint_dir    where they are, a folder or a URL that fsspec knows, s3://bucket/run (null: run_dir/checkpoints); all ranks
                      must see the same
    async_checkpoint  train on while a checkpoint is written, from a copy in host memory; the last one is waited for
    checkpoint_on_error   of a checkpoint that can't be written. continue: told, and training goes on; stop: the run ends. Where
                      the last one can't be, it ends with an error in any case
    eval_every        steps between evaluations, and one at the end (0: never, not at the end either)
    eval_batches      batches of global_batch held-out sequences in one evaluation (fewer where the set is smaller)
    sample            tokens of text generated when the run ends (0: none)
    max_skipped       steps in a row whose loss or gradient is not finite, each of which is left out, before the run ends
    spike             a jump of the loss: standard deviations above the median of the last 128 steps' (0: none is looked for)
    on_spike          log: jumps are told and counted. rewind: the run also goes back to its newest checkpoint, and past the data
                      it read since
    max_rewinds       returns to the same checkpoint before the run ends
    tiles             sizes that the experts' kernels work in: table (moesaic.kernels.tiles), autotune (timed on this GPU, minutes
                      the first time, then from ~/.cache/moesaic/tiles), or the path of a record, such as another run's
                      tiles.json. A run keeps its own in run_dir/tiles.json, and a resumed one reads them there
    """

    steps: int = 1000
    seed: int = 0
    global_batch: int = 32
    micro_batch: int | None = None
    seq_len: int = 512
    log_every: int = 10
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    checkpoint_dir: str | None = None
    async_checkpoint: bool = True
    checkpoint_on_error: str = "continue"
    eval_every: int = 100
    eval_batches: int = 16
    sample: int = 0
    max_skipped: int = 10
    spike: float = 10.0
    on_spike: str = "log"
    max_rewinds: int = 3
    tiles: str = "table"


@dataclass
class OptimConfig:
    """AdamW with decoupled weight decay, none on norms, biases and other vectors.

    lr             peak learning rate
    beta1, beta2   of AdamW's means of gradients and of their squares
    eps            added to the root of the latter
    weight_decay   times the learning rate, the share of a weight that a step takes away
    schedule       cosine: to lr_min_ratio at the last step; wsd: constant, then linear to lr_min_ratio over the last decay_ratio
    warmup         steps of linear warm-up, clamped to train.steps
    lr_min_ratio   the last learning rate over the peak
    decay_ratio    share of the steps over which wsd falls
    clip           largest global gradient norm (0: no clipping)
    """

    lr: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    schedule: str = "cosine"
    warmup: int = 100
    lr_min_ratio: float = 0.1
    decay_ratio: float = 0.2
    clip: float = 1.0


@dataclass
class DataConfig:
    """What is read.

    source      what is read when `files` is empty. python: the text of the running interpreter's standard library;
                files: nothing, `files` must be given
    files       text, JSONL or Parquet files, glob patterns, folders that launch/prepare.py wrote, .bin files of Megatron or
                nanoGPT, or a datasets: source, which is streamed; given, they are what is read
    weights     of a mixture: one for each of `files`, which may then be NAME=PATH (empty: all of `files` are one source)
    val_files   the same as files for validation, NAME=PATH for a set of its own (empty: val_fraction of the documents of `files`,
                chosen by hash)
    val_fraction  share of the documents of `files`, or of a .bin's tokens, that is held out
    text_key    the field of a JSONL record that holds the text
    tokenizer   bytes, or the path of a Hugging Face tokenizer.json
    cache       folder for token shards made from text files
    """

    source: str = "files"
    files: list[str] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    val_files: list[str] = field(default_factory=list)
    val_fraction: float = 0.05
    text_key: str = "text"
    tokenizer: str = "bytes"
    cache: str = "~/.cache/moesaic"


@dataclass
class WandbConfig:
    """Weights & Biases.

    mode     offline (files under run_dir/wandb, `wandb sync` sends them), online (falls back to offline), disabled
    project  where the run is there
    name     what it is called there (null: W&B makes up a name)
    """

    mode: str = "offline"
    project: str = "moesaic"
    name: str | None = None


@dataclass
class Config:
    """One run.

    name             what the recipe calls itself: in messages, and in the default of run_dir
    run_dir          holds all that it writes
    resume           auto (newest complete checkpoint of run_dir), never, or the path of a run or checkpoint
    init_from        a folder with config.json and safetensors whose weights a run starts from (null: random ones); of no effect
                     on a run that resumes
    model_from_init  take the shape of the model from init_from; false: it must equal that of `model`
    profile          none, or collectives: what each layer's collectives cost, in run_dir/profile, see docs/profiling.md
    profile_steps    the steps that are traced, counted from where this launch begins, 1 being its first
    """

    name: str = "run"
    run_dir: str = "runs/${name}"
    resume: str = "auto"
    init_from: str | None = None
    model_from_init: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    profile: str = "none"
    profile_steps: list[int] = field(default_factory=lambda: [3, 4])

    def __post_init__(self) -> None:
        check(self)
        if self.data.files:  # `recipe=tiny_moe data.files=mine.txt` must not train on the recipe's own corpus
            self.data.source = "files"
        self.run_dir = os.path.expanduser(self.run_dir)  # a shell leaves the ~ of run_dir=~/runs/a alone
        self.resume = os.path.expanduser(self.resume)
        self.train.checkpoint_dir = os.path.expanduser(self.train.checkpoint_dir) if self.train.checkpoint_dir else None
        self.train.tiles = os.path.expanduser(self.train.tiles)
        self.init_from = os.path.expanduser(self.init_from) if self.init_from else None


def _check_fused_shared(p: PrecisionConfig) -> None:
    """What the kernels have for rows of fp8 is not what a shared expert beside them computes."""
    told = "with parallel.fused_shared=true"
    require(p.dispatch == "high", f"precision.dispatch={p.dispatch}: must be high {told}")
    for part in ("experts", "dense"):
        require(not p.quantizes(part),
                f"precision.layers={p.layers}: must be without {part} {told}")  # fmt: skip


def check(c: Config) -> None:
    """Rules on the knobs of the loop, alone and together. Raises `ValueError` naming the knob, its value and the rule."""
    for name in ("name", "run_dir", "resume", "init_from"):
        require(getattr(c, name) != "", f"{name}=: must not be empty")
    for name in (
        "steps",
        "global_batch",
        "seq_len",
        "log_every",
        "keep_checkpoints",
        "eval_batches",
        "max_skipped",
        "max_rewinds",
    ):
        require(getattr(c.train, name) >= 1, f"train.{name}={getattr(c.train, name)}: must be at least 1")
    for name in ("seed", "checkpoint_every", "eval_every", "sample", "spike"):
        require(getattr(c.train, name) >= 0, f"train.{name}={getattr(c.train, name)}: must not be negative")
    for name in ("checkpoint_dir", "tiles"):
        require(getattr(c.train, name) != "", f"train.{name}=: must not be empty")
    require(c.train.checkpoint_on_error in ("continue", "stop"),
            f"train.checkpoint_on_error={c.train.checkpoint_on_error}: must be one of continue, stop")  # fmt: skip
    require(c.train.on_spike in ("log", "rewind"), f"train.on_spike={c.train.on_spike}: must be one of log, rewind")
    require(c.train.on_spike == "log" or c.train.spike > 0,
            f"train.spike={c.train.spike:g}: must be above 0 with train.on_spike=rewind")  # fmt: skip
    require(c.train.seed < 2**32, f"train.seed={c.train.seed}: must be below 2^32")
    require(c.train.micro_batch is None or c.train.micro_batch >= 1,
            f"train.micro_batch={c.train.micro_batch}: must be at least 1, or null")  # fmt: skip
    require(c.train.micro_batch is None or c.train.micro_batch <= c.train.global_batch,
            f"train.micro_batch={c.train.micro_batch}: must not exceed train.global_batch={c.train.global_batch}")  # fmt: skip
    require(c.optim.schedule in ("cosine", "wsd"), f"optim.schedule={c.optim.schedule}: must be one of cosine, wsd")
    for name in ("lr", "eps"):
        require(0 < getattr(c.optim, name) < math.inf, f"optim.{name}={getattr(c.optim, name)}: must be positive")
    for name in ("beta1", "beta2"):
        require(0 <= getattr(c.optim, name) < 1, f"optim.{name}={getattr(c.optim, name)}: must be in 0..1, without 1")
    for name in ("weight_decay", "warmup", "clip"):
        require(getattr(c.optim, name) >= 0, f"optim.{name}={getattr(c.optim, name)}: must not be negative")
    for name in ("lr_min_ratio", "decay_ratio"):
        require(0 <= getattr(c.optim, name) <= 1, f"optim.{name}={getattr(c.optim, name)}: must lie in 0..1")
    require(c.data.source in ("python", "files"), f"data.source={c.data.source}: must be one of python, files")
    weights = c.data.weights
    require(not weights or (len(weights) == len(c.data.files) and all(0 < weight < math.inf for weight in weights)),
            f"data.weights={weights}: must be a positive number for each of the {len(c.data.files)} data.files")  # fmt: skip
    require(0 < c.data.val_fraction < 1, f"data.val_fraction={c.data.val_fraction}: must lie between 0 and 1")
    if c.model.router.kind == "expert_choice":
        for name in ("eval_every", "sample"):
            require(getattr(c.train, name) == 0, f"train.{name}={getattr(c.train, name)}: must be 0 with "
                    "model.router.kind=expert_choice, whose choice depends on later tokens")  # fmt: skip
    expert = c.parallel.expert
    require(expert == "auto" or c.model_from_init or c.model.n_experts % int(expert) == 0,
            f"parallel.expert={expert}: must divide model.n_experts={c.model.n_experts}")  # fmt: skip
    if c.parallel.expert_path == "fused":
        combine = c.precision.combine
        require(combine == "high", f"precision.combine={combine}: must be high with parallel.expert_path=fused")
    if c.parallel.fused_shared:
        _check_fused_shared(c.precision)
        if not c.model_from_init:
            shared_experts(c.model, c.parallel)
    require(c.profile in ("none", "collectives"), f"profile={c.profile}: must be one of none, collectives")
    require(c.profile == "none" or (bool(c.profile_steps) and min(c.profile_steps) >= 1),
            f"profile_steps={c.profile_steps}: must hold steps, the first of a launch being 1")  # fmt: skip
    require(c.profile == "none" or min(c.profile_steps) <= c.train.steps,
            f"profile_steps={c.profile_steps}: must hold one of the run's steps, train.steps={c.train.steps}")  # fmt: skip
    require(c.wandb.mode in ("offline", "online", "disabled"),
            f"wandb.mode={c.wandb.mode}: must be one of offline, online, disabled")  # fmt: skip
