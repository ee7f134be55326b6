"""The launcher that every scheduler's script ends in, and the scripts and manifests: what can be checked without a cluster."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import yaml

from tests.launch.launches import ROOT, Place, losses

CLUSTERS = ROOT / "launch" / "clusters"
LAUNCH = CLUSTERS / "launch.sh"
SCRIPTS = [path for path in sorted(CLUSTERS.rglob("*")) if path.suffix in (".sh", ".sbatch")]
MANIFESTS = {path.stem: path for path in sorted((CLUSTERS / "kubernetes").iterdir())}
SCHEMAS = json.loads((ROOT / "tests/launch/cluster_schemas.json").read_text())


def launch(folder: Path, *knobs: str, **settings: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "PET_", "RANK", "WORLD_SIZE"))}
    environment = kept | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | settings
    return subprocess.run([LAUNCH, *knobs], cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def shown(folder: Path, *knobs: str, **settings: str) -> list[str]:
    """What launch.sh would start: a Python that prints its arguments and the variables meant for torch."""
    python = folder / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@" "$PYTORCH_ALLOC_CONF" "$TORCH_DISABLE_SHARE_RDZV_TCP_STORE"\n')
    python.chmod(0o755)
    done = launch(folder, *knobs, PYTHON=str(python), **settings)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_one_node_for_real(place: Place, tmp_path: Path) -> None:
    knobs = [k for k in place.knobs("", "train.steps=3", "train.eval_every=0") if not k.startswith("run_dir=")]
    done = launch(tmp_path, *knobs, RUN_DIR=str(tmp_path / "run"), RANKS_PER_NODE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [step for step, *_ in losses(tmp_path / "run")] == [1, 2, 3]


def test_several_nodes_meet_at_the_first(tmp_path: Path) -> None:
    words = shown(
        tmp_path, "data.files=a b", RUN_DIR="runs/x", RECIPE="7b_moe", NODES="2:4", HEAD="n0", PORT="29401", JOB_ID="7",
        RANKS_PER_NODE="8", MAX_RESTARTS="5", SHUTDOWN_TIMEOUT="60",
    )  # fmt: skip
    text = " ".join(words)
    for part in (
        "-m torch.distributed.run --nnodes 2:4 --rdzv-backend c10d --rdzv-endpoint n0:29401 --rdzv-id 7 ",
        "--nproc-per-node 8 --max-restarts 5 --shutdown-timeout 60 ",
        f"{ROOT}/launch/train.py recipe=7b_moe run_dir=runs/x ",
    ):
        assert part in text
    assert words[-3:-1] == ["data.files=a b", "expandable_segments:True"], "a knob with a space stays one"
    chosen = shown(tmp_path, RUN_DIR="runs/x", RANKS_PER_NODE="1", PYTORCH_CUDA_ALLOC_CONF="backend:native")
    assert chosen[-2] == "backend:native"
    assert {"SIGTERM", "SIGUSR1"} <= set(words[words.index("--signals-to-handle") + 1].split(",")) and words[-1] == "1"


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({}, "error: RUN_DIR=: must name the run's folder, the same at every restart"),
        ({"RUN_DIR": "r", "NODES": "two"}, "error: NODES=two: must be a number of nodes, or two as in 2:4"),
        ({"RUN_DIR": "r", "NODES": "2"}, "error: HEAD=: must name the first node where NODES=2"),
        ({"RUN_DIR": "r", "RANKS_PER_NODE": "0"}, "error: RANKS_PER_NODE=0: must be gpu or a number above 0"),
        pytest.param(
            {"RUN_DIR": "r"},
            "error: RANKS_PER_NODE=gpu: there is no GPU here; give a number of ranks",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
        ({"RUN_DIR": "r", "MAX_RESTARTS": "-1"}, "error: MAX_RESTARTS=-1: must be a whole number"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, settings: dict[str, str], line: str) -> None:
    done = launch(tmp_path, **settings)
    assert (done.returncode, done.stderr.strip(), done.stdout) == (2, line, "")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_syntax(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)


def test_settings_are_in_one_place() -> None:
    """Defaults stand in settings.sh alone, each is used, and torchrun is started by launch.sh alone."""
    names = re.findall(r'^: "\$\{(\w+):=', (CLUSTERS / "settings.sh").read_text(), re.MULTILINE)
    assert len(names) == len(set(names)) > 5
    assert [name for name in names if not re.search(rf"\b{name}\b", LAUNCH.read_text())] == []
    for path in CLUSTERS.rglob("*"):
        if path.is_file() and path.name not in ("settings.sh", "launch.sh"):
            text = path.read_text()
            assert "launch/clusters/launch.sh" in text
            code = "\n".join(line.split("#")[0] for line in text.splitlines())
            assert "torch.distributed" not in code and "torchrun" not in code and "29400" not in code, path


def test_no_module_to_shadow_a_dependency() -> None:
    assert list(CLUSTERS.glob("*.py")) == []


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_fit_their_schemas(name: str) -> None:
    jsonschema.validate(yaml.safe_load(MANIFESTS[name].read_text()), SCHEMAS[name])


def trainer_of_old(manifest: dict[str, Any]) -> None:
    manifest["spec"]["podTemplateOverrides"] = []


def misspelled(manifest: dict[str, Any]) -> None:
    patch = manifest["spec"]["runtimePatches"][0]
    patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJob"] = []


def a_text_of_nodes(manifest: dict[str, Any]) -> None:
    manifest["spec"]["trainer"]["numNodes"] = "2"


@pytest.mark.parametrize("mistake", [trainer_of_old, misspelled, a_text_of_nodes])
def test_schemas_see_mistakes(mistake: Any) -> None:
    manifest = yaml.safe_load(MANIFESTS["trainjob"].read_text())
    mistake(manifest)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, SCHEMAS["trainjob"])


def test_jobset_says_one_number_of_nodes() -> None:
    manifest = yaml.safe_load(MANIFESTS["jobset"].read_text())
    jobs = manifest["spec"]["replicatedJobs"]
    job = jobs[0]["template"]["spec"]
    container = job["template"]["spec"]["containers"][0]
    settings = {entry["name"]: entry["value"] for entry in container["env"]}
    assert settings["NODES"] == str(job["parallelism"]) == str(job["completions"])
    name = manifest["metadata"]["name"]
    assert settings["HEAD"] == f"{name}-{jobs[0]['name']}-0-0.{name}"  # JobSet's name of the first pod
    assert container["command"][0] == LAUNCH.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("name", MANIFESTS)
def test_nccl_has_shared_memory(name: str) -> None:
    """A container's own /dev/shm has 64 MiB (docs.nvidia.com/deeplearning/nccl, troubleshooting)."""
    text = MANIFESTS[name].read_text()
    assert "{name: memory, mountPath: /dev/shm}" in text and "emptyDir: {medium: Memory}" in text


def test_trainjob_hands_on_what_trainer_tells(tmp_path: Path) -> None:
    trainer = yaml.safe_load(MANIFESTS["trainjob"].read_text())["spec"]["trainer"]
    command = [word.replace("/moesaic/launch", f"{ROOT}/launch") for word in [*trainer["command"], *trainer["args"]]]
    assert not [entry for entry in trainer["env"] if entry["name"].startswith("PET_")]
    assert handed_on(tmp_path, command, {"PET_NNODES": "2", "PET_MASTER_ADDR": "head"})[-1] == trainer["args"][-1]


def test_skypilot_hands_on_its_nodes(tmp_path: Path) -> None:
    task = yaml.safe_load((CLUSTERS / "skypilot" / "train.yaml").read_text())
    assert task.keys() == {"name", "resources", "num_nodes", "workdir", "file_mounts", "envs", "setup", "run"}
    nodes = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": "head\n10.0.0.2", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    assert handed_on(tmp_path, ["bash", "-c", task["run"]], nodes)[-1] == "data.files=/shared/data/corpus"


def handed_on(folder: Path, command: list[str], variables: dict[str, str]) -> list[str]:
    """What launch.sh starts, called by a scheduler's own command and variables."""
    python = folder / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(python), "RUN_DIR": "r"} | variables
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    words = done.stdout.splitlines()
    assert words[words.index("--nnodes") + 1] == "2" and words[words.index("--rdzv-endpoint") + 1] == "head:29400"
    return words
