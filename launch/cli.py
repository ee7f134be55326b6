"""From a command line to a checked `Config`: the one place that talks to Hydra.

A program in this folder ends in `cli.run(main)`. Hydra composes recipes/train.yaml with the groups and overrides of the
command line, the dataclasses of moesaic.launch.schema check the result, and `main` gets a plain `Config`. Whatever is wrong
with what the user typed, or with a recipe, becomes one line on rank 0 and exit code 2 on every rank.
"""

import difflib
import functools
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from moesaic.launch.schema import Config

# Beside this file's folder in a checkout and in an installed package alike. Absolute, so that it is found from any
# working directory, whether a program was started as a file or as a module.
RECIPES = Path(__file__).resolve().parent.parent / "recipes"

GROUPS = ("recipe", "model", "parallel", "data", "precision")  # of recipes/train.yaml

# What Hydra, OmegaConf, a YAML file and a dataclass's own check raise while a configuration is put together.
MISTAKES = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError)

# Seconds that ranks other than 0 wait before they exit, so that torchrun doesn't end rank 0 before it has spoken.
GRACE = 10.0

# Values that mean something to Hydra: none, null, a list or a quoted one, several (or an escape), a function.
HYDRAS_OWN = re.compile(r"""$|null$|[\['"]|.*[,\\]|\w+\(.*\)$""")

TYPES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    int | None: "a whole number, or null",
    float | None: "a number, or null",
    str | None: "text, or null",
    list[str]: "a list of texts: [a,b]",
    list[float]: "a list of numbers: [0.7,0.3]",
}

ConfigStore.instance().store(name="schema", node=Config)


class UserError(ValueError):
    """A mistake of the user's, in one line that names the knob, its value and the rule: no traceback, exit code 2."""

    code = 2


def run(main: Callable[[Config], None], in_jobs: bool = False) -> None:
    """Call `main` with the configuration of this process's command line (once per job with `--multirun`). `in_jobs`: a command
    line that asks for moesaic.launch.sweep starts launch/train.py in jobs of their own instead.

    Exits with code 2 after a mistake in the command line or a recipe, or a `UserError` raised by `main`. Any other
    exception of `main` goes through.
    """
    inside_main = False

    @functools.wraps(main)  # Hydra names the program after the file of the function it is given
    def job(composed: DictConfig) -> None:
        nonlocal inside_main
        try:
            config = checked(composed)
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                config.run_dir = str(Path(config.run_dir) / str(HydraConfig.get().job.num))
        except MISTAKES as error:
            _exit(_explain(error))
        try:
            inside_main = True
            main(config)
            inside_main = False
        except UserError as error:
            _exit(str(error), error.code)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors instead of printing them and exiting with 1
    parser = get_args_parser()
    parser.error = _exit  # type: ignore[method-assign]
    parser.parse_args()
    from moesaic.launch import sweep  # it imports this module

    try:
        sys.argv[1:] = [as_typed(argument) for argument in sys.argv[1:]]
        task: Callable[[DictConfig], None] = job
        kind = sweep.launcher(sys.argv[1:])
        if kind:
            if not in_jobs:
                raise UserError(f"hydra/launcher={kind}: only launch/train.py can be started so")
            sys.argv[1:] = sweep.prepare(kind, sys.argv[1:])
            task = sweep.start_ranks
        with sweep.one_line(kind):
            hydra.main(version_base="1.3", config_path=str(RECIPES), config_name="train")(task)()
    except MISTAKES as error:
        if inside_main:
            raise
        _exit(_explain(error))


def compose(overrides: Sequence[str] = ()) -> Config:
    """The configuration of a command line, e.g. `compose(["recipe=7b_moe", "train.steps=10"])`. Raises `UserError`."""
    try:
        with hydra.initialize_config_dir(str(RECIPES), version_base="1.3"):
            return checked(hydra.compose("train", [as_typed(override) for override in overrides]))
    except MISTAKES as error:
        raise UserError(_explain(error)) from error


def from_dict(values: dict[str, Any]) -> Config:
    """The configuration that `dataclasses.asdict` made `values` of; what is missing has its default. Raises `UserError`."""
    try:
        return checked(OmegaConf.merge(OmegaConf.structured(Config), values))
    except MISTAKES as error:
        raise UserError(_explain(error)) from error


def load(path: str | Path) -> Config:
    """The configuration that `save` wrote. Raises `UserError` that names the file if it is missing or holds something else."""
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
        if not isinstance(values, dict):
            raise UserError("must hold the knobs of a run")
        return from_dict({str(name): value for name, value in values.items()})
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except MISTAKES as error:
        raise UserError(f"{path}: {_explain(error)}") from error


def save(config: Config, path: str | Path) -> None:
    """Write every knob with its value as YAML. A reader finds the old file or the new one, never half of one."""
    partial = Path(f"{path}.partial")
    OmegaConf.save(OmegaConf.structured(config), partial)
    partial.replace(path)


def as_typed(argument: str) -> str:
    """Quote the value of a knob that holds text, so that it arrives as typed: `data.files=~/a/*.txt`, `run_dir=2026_01`.

    Unquoted, Hydra takes the first for a syntax error and the second for the number 202601. A single text for a knob that
    holds a list becomes a list of one. What has a meaning of its own stays Hydra's: null, a list, a quoted value, and sweeps:
    several values with commas, or a function such as `choice(a,b)`. Raises `UserError` for what Hydra would merge, or not name:
    several recipes of a group as one, `precision=[mxfp8,nvfp4]`, or none.
    """
    key, _, value = argument.partition("=")
    if key in GROUPS and (value == "null" or value.startswith("[")):
        raise UserError(f"{argument}: must be one of {', '.join(choices_of(key))}")
    kind = knobs().get(key.lstrip("+"))
    if kind == list[str] and re.fullmatch(r"\[[^\[\]'\"\\]+\]", value):  # [web=a/*.txt,b]: each of the texts
        return f"{key}=[{','.join(repr(one.strip()) for one in value[1:-1].split(','))}]"
    if kind not in (str, str | None, list[str]) or HYDRAS_OWN.match(value) or {"'", '"'} <= set(value):
        return argument
    quoted = f'"{value}"' if "'" in value else f"'{value}'"
    return f"{key}=[{quoted}]" if kind == list[str] else f"{key}={quoted}"


@functools.cache
def knobs() -> dict[str, Any]:
    """Every knob of a run by its name on the command line, with its type: `{"train.steps": int, ...}`."""

    def walk(kind: type, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, hint in get_type_hints(kind).items():
            if is_dataclass(hint):
                assert isinstance(hint, type)
                yield from walk(hint, f"{prefix}{name}.")
            else:
                yield prefix + name, hint

    return dict(walk(Config, ""))


def groups() -> list[str]:
    """The names that choose a file: `recipe`, `model`, ... Of hardware/, plan.py chooses: no run has such a knob."""
    return sorted(path.name for path in RECIPES.iterdir() if path.name != "hardware" and any(path.glob("*.yaml")))


def checked(composed: Any) -> Config:
    """The dataclasses of a composed configuration, with interpolations resolved; making them runs their checks."""

    # A `+key=value` override adds even what the schema doesn't know.
    def names(node: Any, prefix: str) -> Iterator[str]:
        for name, child in node.items():
            if isinstance(child, dict) and child:
                yield from names(child, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}"

    for name in names(OmegaConf.to_container(composed), ""):
        if name not in knobs():
            raise UserError(_unknown(name, name, list(knobs())))
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    return config


def choices_of(group: str) -> list[str]:
    """The names of its recipes."""
    return sorted(path.stem for path in (RECIPES / group).glob("*.yaml"))


def _explain(error: Exception) -> str:
    """The line for one of `MISTAKES`."""
    if isinstance(error, OverrideParseException):
        key, equals, _ = error.override.partition("=")
        if not equals:
            return f"{error.override}: must be written knob=value"
        return f"{error.override}: can't be read; put the value in quotes: \"{key}='...'\""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and "/" in error.missing_cfg_file:
        group, name = error.missing_cfg_file.rsplit("/", 1)
        choices = error.options or choices_of(group)
        return f"{_unknown(f'{group}={name}', name, choices)}; must be one of {', '.join(choices)}"
    # Hydra wraps OmegaConf's exception: that of an override as the cause, that of a file as the context.
    wrapped = (error.__cause__ or error.__context__) if isinstance(error, HydraException) else None
    cause = wrapped if isinstance(wrapped, OmegaConfBaseException) else error
    file = re.match(r"In '(.*)': \w+ raised while composing", str(error))
    return (f"{file[1]}.yaml: " if file else "") + _detail(cause)


def _detail(error: Exception) -> str:
    key = error.full_key if isinstance(error, OmegaConfBaseException) else None
    if key and isinstance(error, ConfigAttributeError | ConfigKeyError):
        return _unknown(key, key, [*knobs(), *groups()])
    if key and isinstance(error, ValidationError):
        told = f"{key}={'null' if error.value is None else error.value}"
        if key in knobs():
            return f"{told}: must be {TYPES[knobs()[key]]}"
        for knob in knobs():
            if knob.startswith(f"{key}."):
                return f"{told}: is a group of knobs, such as {knob}"
    several = re.match(r"(?:Ambiguous value for argument|Sweep parameters) '(.*)'(?:$| requires)", str(error), re.M)
    if several:
        return f"{several[1]}: a sweep needs --multirun; a list is written [a,b], a text that holds a comma \"'a,b'\""
    # OmegaConf appends lines about its own types.
    told = " ".join(str(error).split("\n    full_key")[0].split())
    return f"{key}: {told}" if key else told


def _unknown(told: str, name: str, names: Sequence[str]) -> str:
    """`told` and the name nearest to `name`: with the same last part (for `lr` optim.lr), or else of similar spelling."""
    same = [other for other in names if other.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    nearest = (same or difflib.get_close_matches(name, names, n=1))[:1]
    return f"{told}: unknown" + "".join(f"; nearest: {other}" for other in nearest)


def _exit(message: str, code: int = 2) -> NoReturn:
    """End this rank; rank 0 says why. With 2 and 3, a torchrun that may restart its ranks is ended: they would end so again."""
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if code in (2, 3) and os.environ.get("LOCAL_RANK") == "0" and restarts > 0:
        os.kill(os.getppid(), signal.SIGTERM)
    if rank != 0 and "TORCHELASTIC_RUN_ID" in os.environ:
        # torchrun ends all ranks when the first exits. Whoever is still here after the grace is in a trouble of its own.
        time.sleep(GRACE)
        print(f"error on rank {rank}: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)
