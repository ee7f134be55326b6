"""A campaign of faults: `make chaos FAULTS=200 SEED=1`, or python -m tests.launch.chaos faults=25 seed=1 from=50 only=kind,kind

Each fault meets a run of its own, of a few seconds: two ranks, a checkpoint every four steps, written while training goes on.
After the fault the same command is given again, as often as it takes, and the run must come to its end. Then

    lost     a checkpoint that was complete before the fault, and not damaged by it, was not there to go on from; or a step that
             a run said it had saved when it was asked to stop
    silent   the fault left no trace in what the run said or how its ranks ended; or the run ended with other bits than one that
             nothing happened to: weights, moments, random states, position, each step's loss and gradient norm (where the
             fault is a gradient or loss that is not a number: than one to which only this happened)

Fault number n depends on the seed and n alone, so `from` goes on where a campaign was left, and one fault can be seen again. It
needs Linux.
"""

import functools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.launch.forks import Forks, Run

STEPS, EVERY, EVALUATE, BATCH = 16, 4, 8, 4
MANY, LONG = 20, 320  # kills of one run, and its steps
WORLD = 2
# Fault -> its share of a campaign.
KINDS: dict[str, float] = {
    "kill all at a random moment": 6,
    "kill all during a save": 6,
    "kill all twenty times": 0.1,
    "kill a rank in a forward pass": 2,
    "kill a rank at a collective": 4,
    "kill a rank while it saves": 4,
    "signal": 4,
    "NaN gradient": 2,
    "NaN gradient, then kill": 1,
    "NaN loss": 1,
    "no space": 3,
    "limit on file size": 2,
    "stall in a collective": 1,
    "stall in a forward pass": 1,
    "byte flipped": 3,
    "file cut short": 2,
    "file removed": 2,
    "file of another step": 1,
    "data changed": 2,
}
LAYOUTS = {"experts divided": [], "all sharded": ["parallel.expert=1"]}


@dataclass
class Case:
    """What happened in one fault: `lost` and `silent` say what was wrong, each empty where nothing was."""

    name: str
    layout: str
    story: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)


class Campaign:
    def __init__(self, folder: Path, forks: Forks) -> None:
        self.folder, self.forks = folder, forks
        self.references: dict[tuple[Any, ...], Path] = {}
        random_words = random.Random(0)
        words = "router expert dispatch combine token shard batch the a of and".split()
        for name in ("train", "val"):
            (folder / f"{name}.txt").write_text(" ".join(random_words.choice(words) for _ in range(2000)))

    def knobs(self, run_dir: Path, layout: str, data: Path) -> list[str]:
        model = "d_model=16 n_layers=1 n_heads=2 n_experts=4 d_expert=16".split()
        train = f"steps={STEPS} global_batch={BATCH} seq_len=32 checkpoint_every={EVERY} keep_checkpoints=3 eval_every={EVALUATE}"
        return [
            f"run_dir={run_dir}", f"data.files={data}/train.txt", f"data.val_files={data}/val.txt",
            f"data.cache={data}/cache", "wandb.mode=disabled", "optim.warmup=4", "model.router.kind=sigmoid_bias",
            *(f"model.{knob}" for knob in model),
            *(f"train.{knob}" for knob in f"{train} log_every=1 eval_batches=2 sample=0".split()),
            *LAYOUTS[layout],
        ]  # fmt: skip

    def reference(self, layout: str, fault: dict[str, Any] | None, steps: int = STEPS) -> Path:
        """A run that nothing interrupts; with a `fault`, that alone."""
        key = (layout, json.dumps(fault), steps)
        if key not in self.references:
            run_dir = self.folder / f"reference{len(self.references)}"
            run = self.forks.launch([*self.knobs(run_dir, layout, self.folder), f"train.steps={steps}"], WORLD, fault)
            assert run.wait() == [0] * WORLD, run.text()
            self.references[key] = run_dir
        return self.references[key]

    def strike(self, number: int, seed: int, only: list[str]) -> Case:
        rng = random.Random(f"{seed} {number}")
        kinds = [kind for kind in KINDS if not only or kind in only]
        kind = rng.choices(kinds, [KINDS[kind] for kind in kinds])[0]
        case = Case(kind, rng.choice(list(LAYOUTS)))
        place, data = self.folder / f"fault{number}", self.folder
        place.mkdir()
        if kind == "data changed":  # which others go on reading
            data = place
            for text in ("train.txt", "val.txt"):
                shutil.copy2(self.folder / text, place / text)
        run_dir = place / "run"
        knobs = self.knobs(run_dir, case.layout, data)
        end = Strike(self, case, run_dir, knobs, rng)
        reference = end.happen()
        self.go_on(case, run_dir, knobs, end)
        if not case.lost and not case.silent:
            case.silent += differences(run_dir, self.reference(case.layout, reference, end.steps), end.steps)
            shutil.rmtree(place)
        return case

    def go_on(self, case: Case, run_dir: Path, knobs: list[str], strike: "Strike") -> None:
        """Give the command again until the run is at its end; see that it goes on from where it must."""
        for _ in range(3):
            if strike.done:
                return
            run = self.forks.launch([*knobs, *strike.again], WORLD, strike.fault_again)
            codes, text = run.wait(), run.text()
            found = resumed_from(text)
            case.story.append(f"again: from step {found}, codes {codes}")
            if strike.promised is not None and found < strike.promised:
                case.lost.append(f"step {strike.promised} was promised, {found} is where it went on")
            if strike.expect_again and not strike.expect_again(text):
                case.silent.append(f"no word of it in the next launch: {text[-1500:]}")
            strike.promised, strike.expect_again = None, None
            if codes == [0] * WORLD:
                return
        case.lost.append(f"three more launches did not come to the end: {text[-1500:]}")


class Strike:
    """One fault meets one run. Afterwards: `promised`, the step that the next launch must go on from; `expect_again`, what the
    next launch must say; `again`, knobs for it."""

    def __init__(self, campaign: Campaign, case: Case, run_dir: Path, knobs: list[str], rng: random.Random) -> None:
        self.forks, self.case, self.run_dir, self.knobs, self.rng = campaign.forks, case, run_dir, knobs, rng
        self.promised: int | None = None
        self.expect_again: Callable[[str], bool] | None = None
        self.again: list[str] = []
        self.fault_again: dict[str, Any] | None = None
        self.done = False
        self.steps = STEPS

    def happen(self) -> dict[str, Any] | None:
        """Returns the fault of the run that this one must end like, none for one that nothing happens to."""
        rng, rank = self.rng, self.rng.randrange(WORLD)
        step = rng.randint(2, STEPS - 1)
        name = self.case.name
        if name == "kill all at a random moment":
            self.kill_when(lambda run: time.sleep(rng.uniform(0.2, 3.0)))
            return None
        if name == "kill all during a save":
            self.kill_when(self.save_begun)
            return None
        if name == "kill all twenty times":
            self.steps = LONG
            self.knobs.append(f"train.steps={LONG}")
            for _ in range(MANY):
                before, soon = (
                    self.promised,
                    max((r["step"] for r in metrics(self.run_dir)), default=0) + rng.randint(1, 12),
                )
                later = functools.partial(wait_for_step, run_dir=self.run_dir, step=soon)
                run = self.kill_when(rng.choice([self.save_begun, later]))
                self.must(run.codes == [-signal.SIGKILL] * WORLD, "was killed too late", run)
                found = resumed_from(run.text())
                if before is not None and "resumed from" in run.text() and found < before:
                    self.case.lost.append(f"step {before} was promised, {found} is where it went on")
            return None
        if name == "kill a rank in a forward pass":
            return self.die({"kind": "kill", "point": "forward", "step": step, "ranks": [rank]})
        if name == "kill a rank at a collective":
            return self.die(
                {"kind": "kill", "point": "collective", "step": step, "n": rng.randint(1, 25), "ranks": [rank]}
            )
        if name == "kill a rank while it saves":
            return self.die({"kind": "kill", "point": "save", "n": rng.randint(1, 20), "ranks": [rank]})
        if name == "signal":
            ranks = rng.choice([[0], [1], [0, 1]])
            point = rng.choice(["forward", "collective", "save", "evaluation"])
            step = {"evaluation": EVALUATE}.get(point, step)
            return self.stop({"kind": rng.choice(["term", "usr1"]), "point": point, "step": step, "ranks": ranks,
                              "n": rng.randint(1, 10)})  # fmt: skip
        if name in ("NaN gradient", "NaN loss"):
            return self.skip(
                {"kind": "nan" if "grad" in name else "nan_loss", "step": rng.choice([3, 7, 10]), "ranks": [rank]}
            )
        if name == "NaN gradient, then kill":
            fault = {"kind": "nan", "step": 3, "ranks": [rank]}
            self.kill_when(lambda run: wait_for_step(run, self.run_dir, rng.randint(5, STEPS - 1)), fault)
            # Where the run was killed before its first checkpoint, the step comes once more, and so must the fault.
            self.fault_again = fault if self.promised is None else None
            return fault
        if name == "no space":
            return self.fail_to_write({"kind": "full", "n": rng.randint(1, 12), "ranks": [rank]})
        if name == "limit on file size":
            return self.fail_to_write({"kind": "limit", "step": step, "bytes": 20_000, "ranks": [rank]})
        if name.startswith("stall"):
            kind = "stop" if "collective" in name else "sleep"
            return self.stall(
                {"kind": kind, "point": "collective", "n": rng.randint(1, 25), "step": step, "ranks": [rank]}
            )
        if name == "data changed":
            return self.change_data(step)
        return self.damage(name)

    # ---------------------------------------------------------------- the runs

    def run(self, fault: dict[str, Any] | None, *more: str) -> Run:
        return self.forks.launch([*self.knobs, *more], WORLD, fault)

    def over(self, run: Run) -> list[int]:
        codes = run.wait()
        self.promised = newest(self.run_dir)
        self.case.story.append(f"codes {codes}, newest checkpoint {self.promised}")
        return codes

    def must(self, holds: bool, what: str, run: Run) -> None:
        if not holds:
            self.case.silent.append(f"{what}: {run.codes} {run.text()[-1500:]}")

    def kill_when(self, wait: Callable[[Run], None], fault: dict[str, Any] | None = None) -> Run:
        run = self.run(fault)
        wait(run)
        run.kill()
        self.over(run)
        return run

    def save_begun(self, run: Run) -> None:
        """Wait for one of the next checkpoints, and then for some of the milliseconds that its files take."""
        there = set(self.run_dir.glob("checkpoints/step_*"))
        for _ in range(self.rng.randint(1, 3)):
            while run.running() and set(self.run_dir.glob("checkpoints/step_*")) <= there:
                time.sleep(0.001)
            there |= set(self.run_dir.glob("checkpoints/step_*"))
        time.sleep(self.rng.choice([0, self.rng.uniform(0, 0.01), self.rng.uniform(0, 0.05)]))

    def die(self, fault: dict[str, Any]) -> None:
        self.case.story.append(str(fault))
        run = self.run(fault)
        codes = run.wait(10)  # the others are ended as torchrun ends them, if they wait
        self.over(run)
        if codes != [0, 0]:  # else the place was never reached
            (rank,) = fault["ranks"]
            self.must(codes[rank] == -signal.SIGKILL and codes[1 - rank] != 0, "others ended well", run)

    def stop(self, fault: dict[str, Any]) -> None:
        self.case.story.append(str(fault))
        run = self.run(fault)
        codes = self.over(run)
        text = run.text()
        stopped = "asked to stop" in text
        self.must(codes == [0, 0], "asked to stop, ranks must end with 0", run)
        self.must(stopped or "final val_loss" in text, "neither stopped nor at the end", run)
        if stopped:
            steps = [r["step"] for r in metrics(self.run_dir)]
            if self.promised != steps[-1]:
                self.case.lost.append(f"stopped after step {steps[-1]}, {self.promised} is saved")

    def skip(self, fault: dict[str, Any]) -> dict[str, Any]:
        self.case.story.append(str(fault))
        run = self.run(fault)
        codes = self.over(run)
        skipped = [r["skipped"] for r in metrics(self.run_dir) if "skipped" in r]
        said = f"step {fault['step']} is left out on all ranks" in run.text()
        self.must(codes == [0, 0] and said and skipped[-1] == 1, "a step must be left out, and told", run)
        self.done = True
        return fault | {"ranks": [0]}  # whichever rank it is, all ranks leave the step out

    def fail_to_write(self, fault: dict[str, Any]) -> None:
        self.case.story.append(str(fault))
        run = self.run(fault)
        self.over(run)
        text = run.text()
        reached = "was not written" in text or "No space left" in text or "File too large" in text
        self.must(reached or run.codes == [0, 0], "no word of a write that failed", run)
        self.must(reached or fault["kind"] == "full", "a limit on file size must show", run)

    def stall(self, fault: dict[str, Any]) -> None:
        self.case.story.append(str(fault))
        run = self.run(fault, "parallel.timeout=1.5")
        end = time.monotonic() + 30
        while run.running() and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(1)  # the last to wait for it may still be leaving
        run.kill(ranks=fault["ranks"])
        codes = self.over(run)
        (rank,) = fault["ranks"]
        if codes != [0, 0]:
            told = f"rank {rank} did not come to" in run.text() and 4 in codes
            self.must(told, "must say which rank did not come", run)

    def change_data(self, step: int) -> None:
        run = self.run(None)
        wait_for_step(run, self.run_dir, self.rng.randint(1, 3))
        shard = self.rng.choice(sorted(self.run_dir.parent.glob("cache/*/*.npy")))
        before = shard.read_bytes()
        changed = bytearray(before)
        changed[self.rng.randrange(200, len(before))] ^= 1
        shard.write_bytes(changed)
        codes = self.over(run)
        shard.write_bytes(before)
        self.must(codes == [3, 3] and f"{shard} was changed" in run.text(), "must name the file that changed", run)
        # Steps since then may have read what was changed; those before were saved.

    def damage(self, name: str) -> None:
        """Let a run come to some checkpoints, then damage the newest one."""
        run = self.run(None)
        wait_for_step(run, self.run_dir, self.rng.randint(2 * EVERY + 1, STEPS))
        run.kill()
        self.over(run)
        complete = checkpoints(self.run_dir)
        if not complete:
            return
        folder, files = complete[-1], sorted(complete[-1].iterdir())
        victim = self.rng.choice(files)
        data = bytearray(victim.read_bytes())
        if name == "byte flipped":
            data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
            victim.write_bytes(data)
        elif name == "file cut short":
            victim.write_bytes(data[: self.rng.choice([0, self.rng.randrange(len(data))])])
        elif name == "file of another step" and len(complete) > 1:
            shutil.copyfile(complete[-2] / victim.name, victim)
        else:
            victim.unlink()
        self.case.story.append(f"{name}: {victim.name} of {folder.name}")
        self.promised = step_of(complete[-2]) if len(complete) > 1 else None
        if len(complete) == 1:  # nothing older: the run refuses to start anew over it, and a person removes it
            again = self.run(None)
            codes = again.wait()
            self.must(
                (codes != [0, 0] and folder.name in again.text()) or victim.name == "manifest.json",
                "must refuse",
                again,
            )
            shutil.rmtree(folder, ignore_errors=True)
            return
        self.expect_again = lambda text: f"{folder.name} is not used" in text


# ---------------------------------------------------------------- what a run left


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def wait_for_step(run: Run, run_dir: Path, step: int) -> None:
    while run.running() and not any(record["step"] >= step for record in metrics(run_dir)):
        time.sleep(0.005)


def step_of(folder: Path) -> int:
    return int(folder.name.partition("_")[2])


def checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoints with a manifest, oldest first: complete, so promised."""
    return sorted(path.parent for path in run_dir.glob("checkpoints/step_*/manifest.json"))


def newest(run_dir: Path) -> int | None:
    return max(map(step_of, checkpoints(run_dir)), default=None)


def resumed_from(text: str) -> int:
    """The step that a launch went on from, 0 where it began anew."""
    lines = [line for line in text.splitlines() if line.startswith("resumed from ")]
    return int(lines[0].partition(": step ")[2].partition(",")[0]) if lines else 0


def differences(run_dir: Path, reference: Path, steps: int = STEPS) -> list[str]:
    """In what a run that has ended differs from its reference; nothing where both are equal in every bit."""
    from tests.launch.launches import tensors

    found = []
    for key in ("loss", "val_loss"):
        left, right = ([(r["step"], r[key], r.get("grad_norm")) for r in metrics(run) if key in r]
                       for run in (run_dir, reference))  # fmt: skip
        if left != right:
            found.append(f"{key}: {sorted(set(left) ^ set(right), key=str)[:4]}")
    ends = [run / "checkpoints" / f"step_{steps:08d}" for run in (run_dir, reference)]
    if not ends[0].is_dir():
        return [*found, "no last checkpoint"]
    left_tensors, right_tensors = map(tensors, ends)
    if left_tensors.keys() != right_tensors.keys():
        found.append("other tensors")
    else:
        found += [
            f"tensor {n}" for n, t in left_tensors.items() if t.numpy().tobytes() != right_tensors[n].numpy().tobytes()
        ]
    states = [json.loads((end / "manifest.json").read_text())["state"] for end in ends]
    found += [k for k in ("step", "samples", "tokens", "health", "world") if states[0][k] != states[1][k]]
    return found


def main(faults: int, seed: int, start: int, only: list[str]) -> int:
    import torch

    torch.set_num_threads(1)
    cases: list[Case] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="moesaic-chaos-") as folder, Forks(Path(folder)) as forks:
        campaign = Campaign(Path(folder), forks)
        for number in range(start, start + faults):
            case = campaign.strike(number, seed, only)
            cases.append(case)
            print(f"{number:4} {case.name}; {case.layout}; {'; '.join(case.story)}", flush=True)
            for word, lines in (("LOST", case.lost), ("SILENT", case.silent)):
                for line in lines:
                    print(f"     {word}: {line}", flush=True)
    for name, count in sorted(Counter(case.name for case in cases).items()):
        print(f"{count:4} {name}")
    lost, silent = sum(bool(case.lost) for case in cases), sum(bool(case.silent) for case in cases)
    print(f"{time.monotonic() - began:.0f} s")
    print(f"{len(cases)} faults, {lost} lost, {silent} silent")
    return int(bool(lost or silent))


if __name__ == "__main__":
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    unknown = options.keys() - {"faults", "seed", "from", "only"}
    if unknown or os.uname().sysname != "Linux":
        sys.exit(f"error: {unknown or os.uname().sysname}: known are faults=N seed=S from=N only=KIND,KIND, on Linux")
    chosen = [kind for kind in options.get("only", "").split(",") if kind]
    if set(chosen) - set(KINDS):
        sys.exit(f"error: only={options['only']}: must be of {', '.join(KINDS)}")
    sys.exit(main(int(options.get("faults", 200)), int(options.get("seed", 0)), int(options.get("from", 0)), chosen))
