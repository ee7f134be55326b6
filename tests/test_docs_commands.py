"""Every shell command of README.md and docs/*.md is run, or says to its reader what it needs that is not here.

A page is run from its top to its end in a copy of the repository: its files that are named in their first line are written, its
diffs applied, its commands run by a process that has imported everything. Training is shortened: few steps, short sequences, of
recipes for GPUs a small model, two ranks instead of eight; of srun, sbatch and the clusters' scripts, what they would start. What
the commands read (a corpus, a tokenizer, published models, earlier runs) is small here, and lies where they look for it.

Not run but looked at otherwise, each for a reason that is given below: make's targets, benchmarks, tests that are run anyway. A
comment "# Needs a cluster", "# Needs 8 GPUs" or "# Needs the network" in a block, or "(needs …)" in a sentence, is for the
reader; a program that is not here must have it.
"""

import dataclasses
import json
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.run import get_args_parser

from tests.launch.forks import Forks
from tests.test_structure import imports

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Pages that a test of their own runs, word for word.
RUN_ELSEWHERE = {"first_model.md": "tests/launch/test_first_model.py"}
PROGRAMS = "cd export git hf kubectl ls make pip pytest python sbatch sky source srun tail torchrun wandb".split()
SCRIPTS = ("launch/clusters/launch.sh", "launch/clusters/ray/train.sh")
NEEDS = re.compile(r"needs (?:a cluster|an? (?:\w+ )?GPU|\d+ GPUs|the network)", re.I)

# Each of these takes minutes to hours, or runs what is here already. `make -n` shows that the target is there and that its recipe
# reads well; what it runs or measures is run by these tests in a small form.
TARGETS = {
    "install": ".ci/run", "check": ".ci/run", "test": "tests/conftest.py", "bench": "benchmarks/compare.py",
    "train": "tests/launch/test_train.py", "docs": "tests/test_docs_site.py", "chaos": "tests/launch/test_chaos.py",
    "kernels": "tests/kernels/test_targets.py", "model-check": "tests/kernels/spin.py",
    "test-gpu": "tests/kernels/test_gpu.py", "bench-gpu": "tests/kernels/test_bench.py",
    "parity": "tests/parallel/test_parity.py", "reshard": "tests/parallel/test_reshard.py",
    "fused-schedules": "tests/kernels/test_fused_schedules.py", "test-slurm": "tests/launch/test_slurm.py",
    "study-rounding": "tests/kernels/test_rounding.py", "study-precision": "tests/parallel/test_precision.py",
}  # fmt: skip

SMALL = {
    "7b_moe": "d_model=32 n_layers=2 n_heads=2 n_experts=16 d_expert=16 d_shared=32 vocab_size=640",
    "olmoe_7b": "d_model=32 n_layers=2 n_heads=2 n_experts=16 d_expert=16 vocab_size=640",
    "39m_fine": "vocab_size=640",
}


@dataclass
class Block:
    language: str
    text: str
    line: int


@dataclass
class Command:
    """`marked`: the page tells what it needs."""

    page: str
    line: int
    text: str
    marked: bool

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def blocks(text: str) -> Iterator[Block]:
    for found in re.finditer(r"^```(\w*)\n(.*?)^```", text, re.M | re.S):
        yield Block(found[1], found[2], text[: found.start()].count("\n") + 2)


def commands(page: Path) -> Iterator[Command]:
    """Those of blocks, in which a mark holds for what follows, and those in backticks, whose paragraph may hold one."""
    text = page.read_text()
    for block in blocks(text):
        marked, waiting, quoted = False, "", False
        for i, line in enumerate(block.text.split("\n")):
            if block.language not in ("bash", ""):
                break
            if not waiting and line.startswith("#"):
                marked = marked or bool(NEEDS.search(line))
                continue
            waiting += line.removesuffix("\\") if line.endswith("\\") else f"{line}\n"
            quoted = waiting.count("'") % 2 == 1
            if line.endswith("\\") or quoted or not waiting.strip():
                continue
            command = Command(page.name, block.line + i, waiting.strip(), marked)
            waiting = ""
            if block.language == "bash":
                yield command
            else:
                assert words(command.text)[:1] == [] or words(command.text)[0] not in PROGRAMS, (
                    f"{command}: tag it ```bash"
                )
    plain = re.sub(r"^```.*?^```", lambda found: "\n" * found[0].count("\n"), text, flags=re.M | re.S)
    for found in re.finditer(r"`([^`]+)`", plain):
        command_text = " ".join(found[1].split())
        if " " in command_text and (words(command_text)[:1] or [""])[0] in [*PROGRAMS, *SCRIPTS]:
            start, end = plain.rfind("\n\n", 0, found.start()), plain.find("\n\n", found.end())
            paragraph = plain[max(0, start) : end if end > 0 else len(plain)]
            yield Command(
                page.name, plain[: found.start()].count("\n") + 1, command_text, bool(NEEDS.search(paragraph))
            )


def words(text: str) -> list[str]:
    """Without what is set for the command alone."""
    try:
        found = shlex.split(text, comments=True)
    except ValueError:
        return []
    while found and re.fullmatch(r"[A-Z_]+=.*", found[0]):
        found = found[1:]
    return found


class Here:
    """A copy of the repository, and what the pages' commands find in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs = folder, 0
        for name in ("kernels", "moe", "parallel", "launch", "recipes", "moesaic", "benchmarks", "tests", "docs"):
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("Makefile", "pyproject.toml", "constraints.txt", "README.md"):
            shutil.copy(ROOT / name, folder / name)
        self.forks = Forks(folder, folder)
        rng = np.random.default_rng(0)
        vocabulary = "router expert dispatch combine token shard batch gate layer norm the a of and def".split()
        (folder / "corpus").mkdir()
        texts = [" ".join(rng.choice(vocabulary, 60)) for _ in range(120)]
        (folder / "corpus" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        (folder / "corpus" / "a.txt").write_text("\n".join(texts))
        (folder / "prompts.txt").write_text("the router\nthe expert\n")
        self.program(
            "launch/prepare.py", "files=corpus/*.jsonl", "out=prepared", "tokenizer=bpe:300", "val_fraction=0.1"
        )
        for name in ("corpus", "web", "code", "held_out/web", "held_out/code"):
            shutil.copytree(folder / "prepared", folder / "data" / name)
        shutil.copy(folder / "prepared" / "tokenizer.json", folder / "tokenizer.json")
        shape = [f"model.{knob}" for knob in SMALL["olmoe_7b"].split()]
        olmoe = [
            *shape,
            "model.qk_norm=full",
            "model.router.top_k=8",
            "data.files=data/corpus",
            "data.tokenizer=data/corpus",
        ]
        self.train(["recipe=tiny_moe", "run_dir=earlier/olmoe", *olmoe], 2)
        self.program(
            "launch/export.py", "run_dir=earlier/olmoe", "out=models/OLMoE-1B-7B", "family=olmoe", "dtype=fp32"
        )
        self.train(["recipe=tiny_moe", "run_dir=earlier/tiny", "model.d_model=48", "train.checkpoint_every=1"], 2)
        dense_model(folder / "models" / "Llama-2-7b-hf", folder / "models" / "OLMoE-1B-7B" / "tokenizer.json")

    def program(self, path: str, *arguments: str, world: int = 0, **env: str) -> str:
        run = self.forks.program(path, list(arguments), world, **env)
        assert run.wait(200) == [0] * max(1, world), run.text()[-3000:]
        return run.text()

    def train(self, knobs: list[str], world: int) -> None:
        """A shortened launch; the run directory must hold what it trained."""
        given = dict(knob.split("=", 1) for knob in knobs)
        run_dir = given.get("run_dir") or f"runs/unnamed{self.runs}"
        self.runs += 1
        before = steps_done(self.folder / given.get("resume", run_dir))
        steps = before + min(6, int(given.get("train.steps", 2)))
        fused = given.get("parallel.expert_path") == "fused" or given.get("model.experts_backend") == "triton"
        more = [
            f"run_dir={run_dir}", f"train.steps={before + 1 if fused else steps}", f"train.seq_len={8 if fused else 32}",
            f"train.global_batch={min(4, int(given.get('train.global_batch', 4)))}",
            *"train.checkpoint_every=2 train.log_every=1 train.eval_batches=1 train.sample=0 optim.warmup=1".split(),
            "wandb.mode=disabled", *self.smaller(knobs, world),
        ]  # fmt: skip
        more += [] if "data.files" in given else ["data.files=corpus/*.txt"]
        more += ["model.d_model=32", "model.n_heads=2", "model.d_expert=32", "model.n_layers=2"] if fused else []
        self.program("launch/train.py", *knobs, *more, world=world)
        assert steps_done(self.folder / run_dir) > before

    def smaller(self, knobs: list[str], world: int) -> list[str]:
        """What makes a run for GPUs one for `world` ranks here."""
        given = dict(knob.split("=", 1) for knob in knobs)
        more = [f"model.{knob}" for knob in SMALL.get(given.get("recipe", ""), "").split()]
        more += (
            [f"parallel.expert={world}"] if int(given.get("parallel.expert", "0").replace("auto", "0")) > world else []
        )
        return [*more, *(["profile_steps=[3,4]"] if "profile_steps" in given else [])]

    def run(self, command: Command) -> None:
        """In the way of its kind; AssertionError where it fails, or can't be run here and the page does not say so."""
        argv = words(command.text.replace("/shared/", f"{self.folder}/"))
        first, rest = argv[0], argv[1:]
        if first == "torchrun" and "launch/" in command.text:
            options = get_args_parser().parse_args([word.replace("$FIRST", "first") for word in rest])
            world = min(int(options.nproc_per_node), 4) if options.nproc_per_node in ("1", "2", "4") else 2
            if "--multirun" in rest:
                self.sweep(options.training_script_args, world)
            elif options.training_script == "launch/train.py":
                self.train(options.training_script_args, world)
            elif options.training_script == "launch/comm_bench.py":
                short = ["largest_mb=0.1", "repeats=1"]
                self.program(options.training_script, *options.training_script_args, *short, world=world)
            else:
                short = ["train.seq_len=32", "hardware=cpu", *self.smaller(options.training_script_args, world)]
                self.program(options.training_script, *options.training_script_args, *short, world=world)
        elif first == "python" and rest[0] == "launch/train.py":
            assert command.marked or not any(word.startswith("hydra/launcher=submitit_slurm") for word in rest)
            self.sweep(rest[1:], 1) if "--multirun" in rest else self.program(*rest)
        elif first == "python" and rest[0].startswith("launch/"):
            self.launch_program(rest, command)
        elif first == "python" and rest[0].startswith("benchmarks/"):
            # A measurement, of tens of seconds to minutes: `make bench` runs it. Here, that all it imports of ours is there.
            for name in imports((ROOT / rest[0]).read_text()):
                if name.startswith("moesaic."):
                    pkgutil.resolve_name(name)
        elif first == "python" and rest[:2] == ["-m", "moesaic.kernels.targets"]:
            self.shell([sys.executable, *rest], TRITON_INTERPRET="0")
        elif first == "pytest":
            # Shipped tests are run anyway; those of the page are run here.
            paths = [word for word in rest if word.startswith("tests/")]
            assert paths and all((self.folder / path).exists() for path in paths)
            if "-k" in rest or not all((ROOT / path).exists() for path in paths):
                self.program(pytest.__file__.replace("__init__", "__main__"), "-p", "no:cacheprovider", *rest)
        elif first == "make":
            target = next(word for word in rest if "=" not in word)
            assert (ROOT / TARGETS[target]).exists()
            self.shell(["make", "-n", "--no-print-directory", *rest])
        elif first == "srun":  # on every node the same, a rank's share of which can be run here
            self.run(dataclasses.replace(command, text=rest[-1]))
            assert command.marked
        elif first == "sbatch" or first in SCRIPTS:
            script = next(i for i, word in enumerate(argv) if word.endswith((".sbatch", ".sh")))
            assert command.marked and (self.folder / argv[script]).exists()
            variables = dict(re.findall(r"([A-Z_]+)=(\S+)", command.text))
            run_dir = variables["RUN_DIR"].replace("/shared/", "")
            shutil.rmtree(self.folder / run_dir, ignore_errors=True)  # another cluster's, in the same page
            recipe = variables.get("RECIPE", "tiny_moe")
            self.train([f"recipe={recipe}", f"run_dir={run_dir}", *argv[script + 1 :]], 2)
        elif first in ("ls", "tail"):
            self.earlier(command.text)
            self.shell([first, *rest])
        else:
            assert first in ("source", "cd", "export") or command.marked, (
                f"{command}: neither run nor marked with what it needs"
            )

    def launch_program(self, argv: list[str], command: Command) -> None:
        sends = argv[0] == "launch/wandb_panels.py" and not any(word.startswith("out=") for word in argv)
        # Tasks would be downloaded; tests/launch/test_evaluation.py has local ones.
        if sends or "tasks=hellaswag" in command.text:
            assert command.marked, f"{command}: needs the network"
            return
        self.earlier(command.text)
        if argv[0] == "launch/plan.py" and "dry_run=true" in argv:
            argv = [*argv, "model.n_layers=2", "nodes=1"]
        for out in [word.partition("=")[2] for word in argv if word.startswith("out=")]:
            shutil.rmtree(self.folder / out, ignore_errors=True)
        self.program(*argv, *(["tokens=10"] if argv[0] == "launch/generate.py" else []))

    def sweep(self, argv: list[str], world: int) -> None:
        """Its points one after another, whatever starts them where the command is meant for."""
        knobs = [word for word in argv if "=" in word and not word.startswith("hydra")]
        for run_dir in [knob.partition("=")[2] for knob in knobs if knob.startswith("run_dir=")]:
            shutil.rmtree(self.folder / run_dir, ignore_errors=True)
        short = (
            "train.steps=1 train.seq_len=16 train.global_batch=2 train.eval_every=0 train.sample=0 wandb.mode=disabled"
        )
        data = [] if any(knob.startswith("data.files=") for knob in knobs) else ["data.files=corpus/*.txt"]
        more = [*short.split(), *data, *self.smaller(knobs, world)]
        self.program("launch/train.py", "--multirun", *knobs, *more, world=world)

    def earlier(self, text: str) -> None:
        """The runs that a command reads and that no command before it made."""
        for path in re.findall(r"runs/\w+", " ".join(re.findall(r"(?:run_dir=|ls |tail -n 3 )(\S+)", text))):
            if not (self.folder / path).exists():
                shutil.copytree(self.folder / "earlier" / "tiny", self.folder / path)

    def shell(self, argv: list[str], **env: str) -> None:
        environment = os.environ | {"PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1"} | env
        done = subprocess.run(argv, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    def write(self, block: Block) -> None:
        """A file of the page, by the comment of its first line; or a diff, applied, for processes that start later."""
        if block.language == "diff":
            # Inside of another repository, git would take the paths for others and say nothing.
            outside = os.environ | {"GIT_CEILING_DIRECTORIES": str(self.folder.parent)}
            subprocess.run(["git", "apply", "-"], cwd=self.folder, env=outside, input=block.text, text=True, check=True)
            self.forks.__exit__(None, None, None)
            self.forks = Forks(self.folder, self.folder)
        elif found := re.match(r"# ([\w/]+\.(?:py|yaml))\n", block.text):
            (self.folder / found[1]).write_text(block.text.partition("\n")[2])


def steps_done(run_dir: Path) -> int:
    """Of the newest checkpoint of a run, or of a folder that holds some."""
    return max([int(path.name.removeprefix("step_")) for path in run_dir.glob("**/step_*")], default=0)


def dense_model(folder: Path, tokenizer: Path) -> None:
    """A Llama of a few thousand random values, as published ones are."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 640,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": False, "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(tokenizer, folder / "tokenizer.json")
    shapes = {"model.embed_tokens": (640, 16), "model.norm": (16,), "lm_head": (640, 16)}
    for i in range(2):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}self_attn.{name}_proj": (16, 16) for name in "qkvo"}
        shapes |= {f"{layer}mlp.{name}_proj": (32, 16) for name in ("gate", "up")} | {f"{layer}mlp.down_proj": (16, 32)}
        shapes |= {f"{layer}{name}_layernorm": (16,) for name in ("input", "post_attention")}
    save_file(
        {f"{name}.weight": torch.randn(shape) * 0.02 for name, shape in shapes.items()}, folder / "model.safetensors"
    )


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("docs")
        for name, value in (
            ("HF_HUB_OFFLINE", "1"),
            ("WANDB_MODE", "disabled"),
            ("XDG_CACHE_HOME", str(folder / "cache")),
        ):
            patch.setenv(name, value)
        patch.setenv("HOME", str(folder))
        place = Here(folder)
        yield place
        place.forks.__exit__(None, None, None)


# In two groups: each process of the tests makes a copy of its own.
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem, marks=pytest.mark.xdist_group(f"docs{i % 2}"))
        for i, page in enumerate(page for page in PAGES if page.name not in RUN_ELSEWHERE)
    ],
)
def test_the_commands_of_a_page(page: Path, here: Here) -> None:
    shutil.rmtree(here.folder / "runs", ignore_errors=True)
    for block in blocks(page.read_text()):
        here.write(block)
    for command in commands(page):
        try:
            here.run(command)
        except (AssertionError, subprocess.CalledProcessError) as error:
            raise AssertionError(f"{command}\n{error}") from error


def test_pages_that_others_run() -> None:
    for page, test in RUN_ELSEWHERE.items():
        assert f'"{page}"' in (ROOT / test).read_text()
        assert not any(command.marked for command in commands(ROOT / "docs" / page))


def test_commands_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "Run `make train` or\n`python launch/plan.py\nrecipe=a` first.\n\n"
        "```bash\n# why\nA=1 torchrun a \\\n  b\n# Needs a cluster.\nsbatch c\n```\n\n"
        "`kubectl apply` (needs a cluster)\n\n```text\nmake nothing\n```\n"
    )
    assert [(command.text, command.marked, command.line) for command in commands(page)] == [
        ("A=1 torchrun a   b", False, 8), ("sbatch c", True, 10), ("make train", False, 1),
        ("python launch/plan.py recipe=a", False, 2), ("kubectl apply", True, 13),
    ]  # fmt: skip
    nowhere = object.__new__(Here)
    nowhere.folder = tmp_path
    nowhere.run(Command("page.md", 1, "kubectl apply", marked=True))
    with pytest.raises(AssertionError, match="page.md:1: kubectl apply: neither run nor marked"):
        nowhere.run(Command("page.md", 1, "kubectl apply", marked=False))
    with pytest.raises(KeyError):
        nowhere.run(Command("page.md", 1, "make nothing", marked=False))
    page.write_text("```\nmake all\n```\n")
    with pytest.raises(AssertionError, match="tag it"):
        list(commands(page))
