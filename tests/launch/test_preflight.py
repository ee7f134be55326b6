"""Preflight on real gloo ranks: all is well; and what is broken on one rank, from outside of the code, is found and named."""

import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from moesaic.launch import cli, preflight
from moesaic.parallel import hardware, probe
from tests.launch.launches import ROOT, launch
from tests.parallel.ranks import run_ranks

KNOBS = "model.d_model=32 model.n_layers=2 model.n_heads=2 model.n_experts=4 model.d_expert=32 train.seq_len=64".split()


def lines(text: str) -> dict[str, list[str]]:
    """Lines of a report, level and all, by check."""
    found: dict[str, list[str]] = {}
    for level, check, rest in re.findall(r"^(ok|warn|FAIL) +(\w+) +(.*)$", text, re.M):
        found.setdefault(check, []).append(f"{level} {rest}")
    return found


def test_two_ranks_that_are_well(tmp_path: Path):
    program = ROOT / "launch" / "preflight.py"
    with launch(tmp_path, ["recipe=tiny_moe", "run_dir=runs/a"], program=program) as running:
        assert running.wait() == 0, running.text()
        found = lines(running.text())
    assert list(found) == [
        "versions",
        "settings",
        "devices",
        "memory",
        "disk",
        "clocks",
        "exchange",
        "products",
        "links",
    ]
    assert not any(line.startswith("FAIL") for told in found.values() for line in told)
    assert f"torch {torch.__version__}" in found["versions"][0]
    (told,) = found["links"][:1]
    assert re.search(r"intra: 1 link, [\d.e+]+ GB/s, [\d.e+]+ us; cpu has 1.5 GB/s, 100 us", told), told
    assert not (tmp_path / "runs").exists(), "it leaves nothing behind"


def broken(folder: str) -> list[str]:
    """All that may go wrong at once: rank 1's clock runs ahead, its products have a wrong bit, its version of Python is another,
    rows from it arrive changed, it sees another disk, has little memory, more threads than cores, and a slow setting."""
    rank, said = dist.get_rank(), []
    now, mm, exchange = time.time, torch.mm, dist.all_to_all_single
    join = preflight.storage.join

    def wrong_bit(*args, **kwargs):
        out = mm(*args, **kwargs)
        out.view(torch.int32)[7, 3] ^= 1
        return out

    def wrong_rows(out, sent, *args, **kwargs):
        sent[-1, 0] += 1  # of the last rank's rows, the last
        return exchange(out, sent, *args, **kwargs)

    patches = [
        mock.patch.object(time, "time", side_effect=lambda: now() + 5),
        mock.patch.object(torch, "mm", wrong_bit),
        mock.patch.object(dist, "all_to_all_single", wrong_rows),
        mock.patch.object(preflight.platform, "python_version", return_value="2.7"),
        mock.patch.object(preflight, "available", return_value=1000),
        mock.patch.object(torch, "get_num_threads", return_value=10_000),
        mock.patch.dict(preflight.os.environ, {"CUDA_LAUNCH_BLOCKING": "1"}),
        mock.patch.object(preflight.storage, "join", lambda root, *names: join(root + "/mine", *names)),
    ]
    if rank == 1:
        for patch in patches:
            patch.start()
    config = cli.compose(["recipe=tiny_moe", f"run_dir={folder}", *KNOBS])
    place = preflight.Place(
        config, torch.device("cpu"), "cpu", hardware.load("cpu"), probe.gather(socket.gethostname())
    )
    with mock.patch.object(preflight.os, "sched_getaffinity", return_value=range(64)):
        preflight.run(place, said.append)
    for patch in patches if rank == 1 else []:
        patch.stop()
    return said


def test_what_is_broken_is_named(tmp_path: Path):
    said, other = run_ranks(broken, 3, tmp_path, str(tmp_path / "run"))[:2]
    assert said == other, "all ranks know"
    found = lines("\n".join(said))
    assert found["versions"][0].startswith("FAIL python differs") and "2.7 (rank 1)" in found["versions"][0]
    assert found["clocks"][0].startswith("warn rank 1") and re.search(r"\+(49|50)\d\d\.\d+ ms", found["clocks"][0])
    assert [line.split(":")[0] for line in found["products"]] == ["FAIL rank 1 (cpu)"]
    assert [re.match(r"FAIL from rank 1 to rank 2 1 of \d+ rows", line) is not None for line in found["exchange"]] == [
        True
    ]
    assert found["disk"][0].startswith("FAIL") and "rank 1" in found["disk"][0]
    assert found["settings"] == ["warn CUDA_LAUNCH_BLOCKING=1 slows every step (rank 1)"]
    assert found["devices"] == ["warn 30000 threads of 3 ranks on 64 cores: set OMP_NUM_THREADS (rank 1)"]
    assert found["memory"][0].startswith("FAIL") and "rank 1 has 0.00 GiB free" in found["memory"][0]
    assert said[-1].startswith("5 failed"), said
    assert not (tmp_path / "run").exists(), "also of what one rank wrote elsewhere nothing is left"


def test_a_product_that_is_wrong_only_in_bits_that_whole_numbers_lack(tmp_path: Path):
    assert run_ranks(slightly_off, 3, tmp_path) == [["rank 2 (chip): a product has other bits than on most ranks"]] * 3


def test_two_that_differ_and_a_device_that_gives_an_error_are_named(tmp_path: Path):
    told, failed = run_ranks(differing, 2, tmp_path)[0]
    assert told == [f"rank {r} (chip): a product has other bits than on another rank" for r in (0, 1)]
    assert failed == ["rank 1 (chip): device-side assert"]


def differing() -> tuple[list[str], list[str]]:
    mm, sick = torch.mm, dist.get_rank() == 1

    def fails(a, b):
        raise RuntimeError("device-side assert\nCompile with more of this")

    with mock.patch.object(torch, "mm", off_in_last_bits if sick else mm):
        told = probe.wrong_products(torch.device("cpu"), torch.float32, "chip", 64, 3)
    with mock.patch.object(torch, "mm", fails if sick else mm):
        return told, probe.wrong_products(torch.device("cpu"), torch.float32, "chip", 64, 3)


def slightly_off() -> list[str]:
    with mock.patch.object(torch, "mm", off_in_last_bits if dist.get_rank() == 2 else torch.mm):
        return probe.wrong_products(torch.device("cpu"), torch.float32, "chip", 64, 3)


def off_in_last_bits(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    out = a @ b
    out[0, 0] += 0 if out[0, 0] == out[0, 0].round() else 1e-5
    return out


@pytest.mark.parametrize("world", [1, 2, 5, 8])
def test_everybody_meets_everybody_once(world: int):
    rounds = probe.pairings(world)
    met = [pair for pairs in rounds for pair in pairs]
    assert sorted(met) == [(a, b) for a in range(world) for b in range(a + 1, world)]
    assert all(len({r for pair in pairs for r in pair}) == 2 * len(pairs) for pairs in rounds)
    assert len(rounds) == (world - 1 if world % 2 == 0 else world) * (world > 1) or world == 1


def test_versions_that_do_not_go_together():
    config = cli.compose(["recipe=tiny_moe"])
    good = {"torch": "2.13.0+cu130", "triton": "3.7.1", "deepspeed": "0.19.8", "nccl": "2.29.3", "machine": "x86_64"}

    def told(engine: str = "fsdp", **other: str) -> list[str]:
        config.parallel.engine = engine
        return [f"{level} {line.split(':')[0]}" for level, line in preflight.bad_pairs(good | other, "3.7.1", config)]

    assert told() == told("deepspeed") == told(nccl="2.30.7", machine="aarch64") == told(deepspeed="0.18.0") == []
    assert told(torch="2.9.1") == ["FAIL torch 2.9.1"]
    assert told(triton="3.9.0") == ["warn triton 3.9.0"]
    assert told("deepspeed", deepspeed="0.18.10") == ["FAIL deepspeed 0.18.10"]
    assert told(nccl="2.29.2") == ["warn nccl 2.29.2"]
    assert told(nccl="2.28.9", machine="aarch64") == ["warn nccl 2.28.9 on aarch64"]
    assert told(nccl="2.21.5") == ["warn nccl 2.21.5"]


def test_a_gpu_that_others_use(monkeypatch: pytest.MonkeyPatch):
    """What is asked of a GPU alone, of one that is made up."""
    config = cli.compose(["recipe=tiny_moe", *KNOBS])
    place = preflight.Place(config, torch.device("cuda", 0), "NVIDIA H100 80GB HBM3", None, ["a"])
    monkeypatch.setattr(preflight, "gather", lambda value: [value])
    monkeypatch.setattr(preflight, "available", lambda: 1000)
    monkeypatch.setattr(preflight, "torch_wants", lambda name: "")
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**20, 80 * 2**30))
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 29, 2))
    assert [line for level, line in preflight.devices(place) if level == "warn"] == [
        "others hold 80.0 of 80.0 GiB of the GPU (rank 0)"
    ]
    gpu, host = preflight.memory(place)
    assert gpu[0] == "FAIL" and "rank 0 has 0.00 GiB free" in gpu[1]
    assert host[0] == "FAIL" and host[1].endswith("train.async_checkpoint=false needs none")
    config.train.async_checkpoint = False
    assert [level for level, _ in preflight.memory(place)] == ["FAIL", "ok"]
    assert "nccl 2.29.2: hangs" in "".join(line for _, line in preflight.versions(place))
    assert preflight.expected("auto", place.device, place.kind).name == "h100_sxm"
    assert preflight.expected("auto", place.device, "NVIDIA GB200").name == "gb200_nvl72"
    assert preflight.expected("auto", place.device, "some other chip") is None


def test_links_are_held_to_the_hardware_and_to_each_other(monkeypatch: pytest.MonkeyPatch):
    machine = hardware.load("h100_sxm")
    place = SimpleNamespace(hosts=["a"] * 8 + ["b"] * 8, hardware=machine, device=torch.device("cpu"))
    speeds = {(a, b): 350e9 if b < 8 or a > 7 else 38e9 for a in range(16) for b in range(a + 1, 16)}
    speeds[2, 9] = 4e9

    def measured(device, size):
        return [probe.Speed(pair, rate, 4e-6) for pair, rate in speeds.items()]

    monkeypatch.setattr(probe, "link_speeds", measured)
    monkeypatch.setattr(dist, "get_world_size", lambda: 16)
    found = list(preflight.links(place))
    assert [level for level, _ in found] == ["ok", "warn", "ok"]
    assert "inter: 64 links, 38 GB/s, 4 us; least 4 GB/s between ranks 2 and 9 (a, b)" in found[0][1]
    assert found[1][1].startswith("inter: 4 GB/s, 4 us between ranks 2 and 9 (a, b): slower")
    speeds.update({pair: 100e9 for pair in speeds if pair != (2, 9)})
    assert [line for level, line in preflight.links(place) if level == "warn" and line.endswith("slow for it")]


def test_a_disk_that_is_too_small_and_a_wrong_name(tmp_path: Path):
    code = f"""
import sys, shutil
from collections import namedtuple
from moesaic.launch import preflight
shutil.disk_usage = lambda path: namedtuple("usage", "free")(1000)
sys.argv[1:] = ["recipe=tiny_moe", "run_dir={tmp_path}/run", *{KNOBS!r}, *sys.argv[1:]]
preflight.program()
"""
    for more, code_wanted in (([], 1), (["hardware=h100"], 2)):
        found = subprocess.run(
            [sys.executable, "-c", code, *more], capture_output=True, text=True, timeout=120, cwd=ROOT
        )
        assert found.returncode == code_wanted, found.stdout + found.stderr
        if more:
            assert found.stderr.startswith("error: hardware=h100: unknown"), found.stderr
        else:
            assert any(line.startswith("FAIL") and "1e-06 GB free" in line for line in lines(found.stdout)["disk"])
