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
    rows from it arrive changed, and it sees another disk."""
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
        mock.patch.object(preflight.storage, "join", lambda root, *names: join(root + "/mine", *names)),
    ]
    if rank == 1:
        for patch in patches:
            patch.start()
    config = cli.compose(["recipe=tiny_moe", f"run_dir={folder}", *KNOBS])
    place = preflight.Place(
        config, torch.device("cpu"), "cpu", hardware.load("cpu"), probe.gather(socket.gethostname())
    )
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
    assert said[-1].startswith("4 failed")


def test_a_product_that_is_wrong_only_in_bits_that_whole_numbers_lack(tmp_path: Path):
    assert run_ranks(slightly_off, 3, tmp_path) == [["rank 2 (chip): a product has other bits than on most ranks"]] * 3


def slightly_off() -> list[str]:
    mm = torch.mm

    def off(a, b):
        out = mm(a, b)
        out[0, 0] += 0 if out[0, 0] == out[0, 0].round() else 1e-5
        return out

    with mock.patch.object(torch, "mm", off if dist.get_rank() == 2 else mm):
        return probe.wrong_products(torch.device("cpu"), torch.float32, "chip", 64, 3)


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
            assert (
                found.stderr == "error: hardware=h100: unknown; nearest: h200\n"
                or "hardware=h100: unknown" in found.stderr
            )
        else:
            assert any(line.startswith("FAIL") and "1e-06 GB free" in line for line in lines(found.stdout)["disk"])
