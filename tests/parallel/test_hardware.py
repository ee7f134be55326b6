"""Files of recipes/hardware: all load, mean what their data sheets say, and mistakes are one line."""

import dataclasses

import pytest
import yaml

from moesaic.kernels.inspection import TARGETS
from moesaic.parallel import hardware
from moesaic.parallel.hardware import FOLDER, Link

GOOD = yaml.safe_load((FOLDER / "h100_sxm.yaml").read_text())


def test_every_file_loads():
    assert {"h100_sxm", "h200", "b200", "gb200_nvl72", "gb300", "mi300x", "mi355x", "cpu"} <= set(hardware.names())
    for name in hardware.names():
        made = hardware.load(name)
        assert made.name == name
        assert made.hops["intra"].bytes_s > made.hops["inter"].bytes_s


@pytest.mark.parametrize("name", ["h100_sxm", "b200", "mi300x", "mi355x"])
def test_it_agrees_with_the_kernels_table(name):
    made, target = hardware.load(name), TARGETS[hardware.load(name).target]
    assert made.processors == target.processors
    assert made.rate("bf16") == pytest.approx(target.tflops * 1e12)
    assert made.bandwidth == pytest.approx(target.terabytes * 1e12, rel=0.05)  # HGX B200: 7.7 of 8


def test_seconds_of_a_link():
    """2 messages of 3 us, and 80 MB at 80% of 50 GB/s: 2 ms."""
    assert Link(50, 3, 0.8).seconds(80e6, 2) == pytest.approx(6e-6 + 2e-3)


def test_a_saved_file_is_read_back(tmp_path):
    made = dataclasses.replace(hardware.load("gb300"), sums=Link(2.0, 30.0), gathers=Link(1.0, 400.0, 0.5))
    hardware.save(made, tmp_path / "gb300.yaml", "measured\nhere")
    assert hardware.load(str(tmp_path / "gb300.yaml")) == made
    assert (tmp_path / "gb300.yaml").read_text().startswith("# measured\n# here\n")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"target": "sm_80"}, "target=sm_80: must be one of"),
        ({"node": 0}, "node=0: must be at least 1"),
        ({"node": "eight"}, "node=eight: must be a whole number"),
        ({"domain": 12}, "domain=12: must be a multiple of node=8"),
        ({"tflops": {"bf16": -1}}, "tflops.bf16=-1: must be positive"),
        ({"tflops": {"int4": 1}}, "tflops.int4: must be one of"),
        ({"tflops": {}}, "tflops: must hold a rate"),
        ({"memory_gib": float("nan")}, "memory_gib=nan: must be positive"),
        ({"speed": 1}, "speed: unknown; known: name, part"),
        ({"sums": {"gb_s": 1, "us": -1}}, "sums.us=-1: must not be negative"),
        ({"gathers": {"gb_s": 1}}, "gathers: missing 1 required"),
        ({"hops": {"intra": {"gb_s": 1, "us": 1}}}, "hops: must be intra and inter"),
        ({"hops": {"intra": {"gb_s": 1}, "inter": {"gb_s": 1, "us": 1}}}, "hops.intra: missing 1 required"),
        ({"hops": {"intra": {"gb_s": 1, "us": 1, "efficiency": 2}, "inter": {"gb_s": 1, "us": 1}}}, "must lie in 0..1"),
    ],
)
def test_mistakes(tmp_path, change, line):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(GOOD | change))
    with pytest.raises(ValueError, match=line) as error:
        hardware.load(str(path))
    assert str(error.value).startswith("hardware=") and "\n" not in str(error.value)


def test_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="hardware=h100: unknown; nearest: h"):
        hardware.load("h100")
    for text in ("- 1", "part: [", "part: x"):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"hardware=.*x\.yaml"):
            hardware.load(str(tmp_path / "x.yaml"))
    with pytest.raises(ValueError, match="precision=fp4: hardware=h100_sxm has fp32, tf32, bf16, fp8"):
        hardware.load("h100_sxm").rate("fp4")
