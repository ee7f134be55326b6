"""metrics.jsonl, W&B (each run in a process of its own), the progress line, the stopwatch and peak rates."""

import http.server
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch

from moesaic.launch import metrics
from moesaic.launch.metrics import Meter, MetricsLog, WandbRun, peak_flops, progress_header, progress_line

ROOT = Path(__file__).parents[2]


def lines(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_record_is_on_disk_when_write_returns(tmp_path: Path):
    log = MetricsLog(tmp_path, 0)
    log.write({"step": 1, "loss": 2.5})
    assert lines(tmp_path) == [{"step": 1, "loss": 2.5}]


def test_non_finite_numbers_become_null(tmp_path: Path):
    log = MetricsLog(tmp_path, 0)
    log.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "moe/load": [1.0, -math.inf], "lr": 0.1})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse) == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "moe/load": [1.0, None],
        "lr": 0.1,
    }


def test_resume_drops_later_and_torn_lines_and_appends(tmp_path: Path):
    log = MetricsLog(tmp_path, 0)
    for step in (10, 20, 30):
        log.write({"step": step, "loss": 1.0})
        log.write({"step": step, "val_loss": 2.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2')  # what a SIGKILL leaves; read as a number it would be a step to keep
    log = MetricsLog(tmp_path, 20)
    log.write({"step": 30, "loss": 3.0})
    assert lines(tmp_path) == [
        {"step": 10, "loss": 1.0},
        {"step": 10, "val_loss": 2.0},
        {"step": 20, "loss": 1.0},
        {"step": 20, "val_loss": 2.0},
        {"step": 30, "loss": 3.0},
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_last_line_without_its_newline_is_kept_whole(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\x00\x00\x00\n{"step": 2}')
    log = MetricsLog(tmp_path, 2)
    log.write({"step": 3})
    assert lines(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_a_start_at_step_0_keeps_nothing(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "val_loss": 5.0}\n{"step": 1}\n')
    MetricsLog(tmp_path, 0)
    assert lines(tmp_path) == []


def test_a_kill_while_dropping_lines_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    old = '{"step": 1}\n{"step": 2}\n'
    (tmp_path / "metrics.jsonl").write_text(old)

    def killed(fd: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        MetricsLog(tmp_path, 1)
    assert (tmp_path / "metrics.jsonl").read_text() == old


WANDB_PROGRAM = """
import json, os, sys, time
from pathlib import Path
from moesaic.launch.metrics import start_wandb
from moesaic.launch.schema import Config, WandbConfig

mode, run_dir, first, last, end = sys.argv[1:]
begin = time.monotonic()
config = Config(wandb=WandbConfig(mode=mode, project="proj", name="nom"))
run = start_wandb(config, Path(run_dir), {"train": {"steps": 7}})
for step in range(int(first), int(last)):
    run.log({"step": step, "loss": 10.0 / step, "moe/load_max_over_mean": 1.5, "grad_norm": float("nan")})
if end == "kill":
    time.sleep(2.5)  # more than the interval at which wandb writes
    os.kill(os.getpid(), 9)
run.finish()
print(json.dumps({"wandb": "wandb" in sys.modules, "seconds": time.monotonic() - begin}))
"""


def run_wandb(run_dir: Path, mode: str = "offline", first: int = 1, last: int = 6, end: str = "finish", **env: str):
    """Log steps first..last-1 in a fresh process, as a user without any W&B settings but `env`."""
    home = run_dir.parent / "home"
    home.mkdir(exist_ok=True)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "XDG_", "NETRC"))}
    clean |= {"HOME": str(home), "PYTHONPATH": str(ROOT), "http_proxy": "", "https_proxy": ""}
    return subprocess.run(
        [sys.executable, "-c", WANDB_PROGRAM, mode, str(run_dir), str(first), str(last), end],
        env=clean | env,
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def wandb_records(file: Path) -> list[dict[str, dict]]:
    """The records of a .wandb file, read by W&B's own inspector."""
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_CACHE_DIR": str(file.parent / "cache")}
    found = subprocess.run(inspect, capture_output=True, text=True, env=environment, timeout=60, check=True)
    return [json.loads(line) for line in found.stdout.splitlines()]


def losses(records: list[dict[str, dict]]) -> list[tuple[int, float]]:
    items = [record["history"]["item"] for record in records if record["type"] == "history"]
    return [(item["step"], item["loss"]) for item in items]


def wandb_files(run_dir: Path) -> list[Path]:
    """The .wandb files of a run, oldest first."""
    return sorted(run_dir.glob("wandb/*/*.wandb"), key=lambda path: path.stat().st_mtime)


def test_offline_run_holds_what_was_logged_and_a_resumed_one_continues_it(tmp_path: Path):
    run_dir = tmp_path / "run"
    assert run_wandb(run_dir, end="kill").returncode == -9
    resumed = run_wandb(run_dir, first=4, last=8)
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert resumed.stdout.count("\n") == 1, "wandb wrote to the console"

    before, after = (wandb_records(file) for file in wandb_files(run_dir))
    assert losses(before) == [(step, 10.0 / step) for step in range(1, 6)]
    assert losses(after) == [(step, 10.0 / step) for step in range(4, 8)]
    (first,), (second,) = ([r["run"] for r in records if r["type"] == "run"] for records in (before, after))
    assert first["run_id"] == second["run_id"] == (run_dir / "wandb/id").read_text()
    assert (first["project"], first["display_name"]) == ("proj", "nom")
    assert first["config"]["update"]["train"] == {"steps": 7}
    assert not any("git" in record.get("environment", {}) for record in before)
    axes = [record["metric"] for record in before if record["type"] == "metric"]
    assert any(axis.get("glob_name") == "*" and axis.get("step_metric") == "step" for axis in axes)

    assert all(path.resolve().is_relative_to(run_dir.resolve()) for path in run_dir.rglob("*"))
    assert not list((tmp_path / "home").rglob("*")), "wandb wrote outside of run_dir"


def closed_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.mark.parametrize("key", ["0" * 40, ""], ids=["unreachable", "no-key"])
def test_online_falls_back_to_offline_with_one_line(tmp_path: Path, key: str):
    run_dir = tmp_path / "run"
    found = run_wandb(run_dir, "online", WANDB_BASE_URL=f"http://127.0.0.1:{closed_port()}", WANDB_API_KEY=key)
    assert found.returncode == 0
    assert json.loads(found.stdout)["seconds"] < 35
    (warning,) = found.stderr.splitlines()
    assert warning.startswith("warning: wandb.mode=online: ")
    assert "recording offline" in warning
    (file,) = wandb_files(run_dir)
    assert file.parent.name.startswith("offline-run-")
    assert losses(wandb_records(file)) == [(step, 10.0 / step) for step in range(1, 6)]


def test_a_wandb_process_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    program = tmp_path / "wandb-core"
    shutil.copy(shutil.which("sleep") or "/bin/sleep", program)
    stubborn = subprocess.Popen([program, "100"])
    other = subprocess.Popen(["sleep", "100"])
    try:
        monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(teardown=stubborn.wait))
        metrics._forget_wandb(patience=0.5)
        assert stubborn.wait(timeout=5) == -signal.SIGKILL
        assert other.poll() is None, "killed somebody else's process"
    finally:
        for process in (stubborn, other):
            process.kill()
            process.wait()


class Forbidding(http.server.BaseHTTPRequestHandler):
    """A W&B server that knows the user and forbids everything else."""

    def do_POST(self) -> None:
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["query"]
        allowed = "viewer" in query
        viewer = {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
        body = json.dumps({"data": {"viewer": viewer}} if allowed else {"errors": [{"message": "forbidden"}]}).encode()
        self.send_response(200 if allowed else 403)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_online_run_that_the_server_refuses_falls_back_to_offline(tmp_path: Path):
    """The login succeeds and the run does not start: W&B's process must let go of its id before it can start offline."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Forbidding) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        found = run_wandb(tmp_path / "run", "online", WANDB_BASE_URL=url, WANDB_API_KEY="0" * 40)
        server.shutdown()
    assert found.returncode == 0
    (warning,) = found.stderr.splitlines()
    assert "recording offline" in warning
    offline = [file for file in wandb_files(tmp_path / "run") if file.parent.name.startswith("offline-run-")]
    assert losses(wandb_records(offline[0])) == [(step, 10.0 / step) for step in range(1, 6)]


def test_disabled_does_not_import_wandb(tmp_path: Path):
    found = run_wandb(tmp_path / "run", "disabled")
    assert (found.returncode, found.stderr) == (0, "")
    assert json.loads(found.stdout)["wandb"] is False
    assert not (tmp_path / "run").exists()


def test_a_run_without_wandb_installed_goes_on(tmp_path: Path):
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "wandb.py").write_text("raise ImportError('no wandb here')")
    found = run_wandb(tmp_path / "run", PYTHONPATH=f"{blocked}:{ROOT}")
    assert found.returncode == 0
    (warning,) = found.stderr.splitlines()
    assert warning.endswith("no wandb here; going on without W&B")


def test_the_first_failure_of_wandb_is_told_once_and_raises_nothing(capsys: pytest.CaptureFixture[str]):
    class Broken:
        def log(self, record: object) -> None:
            raise ConnectionResetError("Connection\nlost")

        def finish(self) -> None:
            raise AssertionError("nothing is left to finish")

    run = WandbRun(Broken())
    run.log({"step": 1})
    run.log({"step": 2})
    run.finish()
    assert capsys.readouterr().err == "warning: W&B stopped recording: ConnectionResetError: Connection lost\n"


RECORD = {
    "step": 120,
    "tokens": 120 * 4096,
    "loss": 1.23456,
    "tokens_per_s": 2048.0,
    "mfu": 0.4123,
    "grad_norm": 0.1234,
    "lr": 3e-4,
    "moe/load_max_over_mean": 1.849,
}


def test_progress_line_shows_every_figure_under_its_heading():
    """880 of 1000 steps of 4096 tokens are left, at 2048 tokens/s: 1760 s."""
    line, header = progress_line(RECORD, 1000), progress_header()
    assert line.split() == ["120/1000", "1.2346", "2,048", "41.2%", "1.85", "0.123", "3.00e-04", "0:29:20"]
    assert len(line) == len(header) <= 120
    for value, title in [("41.2%", "MFU"), ("0.123", "grad norm"), ("0:29:20", "time left")]:
        assert line.index(value) + len(value) == header.index(title) + len(title)


def test_progress_lines_of_large_runs_stay_aligned():
    """A million steps of 10^7 tokens are left, at 10^8 tokens/s: 10^5 s."""
    huge = RECORD | {"step": 1_000_000, "tokens": 10**13, "tokens_per_s": 1e8, "loss": math.nan, "grad_norm": math.inf}
    line = progress_line(huge, 2_000_000)
    assert len(line) == len(progress_header())
    assert line.split()[-1] == "27:46:40"


def test_progress_line_without_figures():
    assert progress_line({"step": 0, "tokens_per_s": 0.0}, 10).split() == ["0/10", "-", "0", "-", "-", "-", "-", "-"]


def test_meter_leaves_pauses_out(monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    meter = Meter()
    now = 101.0
    meter.start()
    now = 104.0
    meter.stop()
    now = 150.0
    meter.start()
    now = 152.0
    assert meter.lap() == 5.0
    now = 153.5
    meter.stop()
    now = 190.0
    assert meter.lap() == 1.5
    assert meter.lap() == 0.0


def test_cpu_peak_is_measured_in_fp32_and_moves_no_random_state():
    state = torch.get_rng_state()
    peak, source = peak_flops(torch.device("cpu"), torch.bfloat16)
    assert source == "measured fp32 matrix product"
    assert torch.equal(torch.get_rng_state(), state)
    assert 1e8 < peak < 1e14


def test_measured_peak_is_the_fastest_product_after_the_first(monkeypatch: pytest.MonkeyPatch):
    """The first of five products, which pays for warming up, seems to take no time; the fastest of the rest 0.02 s."""
    now, seconds = 0.0, iter([0.0, 0.2, 0.02, 0.1, 0.04])

    def product(a: torch.Tensor, b: torch.Tensor) -> None:
        nonlocal now
        assert a.shape == b.shape == (1024, 1024)
        assert a.dtype == torch.float32
        now += next(seconds)

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(metrics, "mm", product)
    assert peak_flops(torch.device("cpu"), torch.float32)[0] == pytest.approx(2 * 1024**3 / 0.02)


@pytest.mark.parametrize(
    ("name", "dtype", "peak", "source"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989e12, "published dense bf16 peak of H100"),
        ("NVIDIA H200", torch.bfloat16, 989e12, "published dense bf16 peak of H200"),
        ("NVIDIA B200", torch.float16, 2250e12, "published dense bf16 peak of B200"),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12, "published dense bf16 peak of A100"),
        ("NVIDIA A100 80GB PCIe", torch.bfloat16, 312e12, "published dense bf16 peak of A100"),
        ("AMD Instinct MI300X OAM", torch.bfloat16, 1307e12, "published dense bf16 peak of MI300X"),
        ("AMD Instinct MI325X", torch.bfloat16, 1307e12, "published dense bf16 peak of MI325X"),
        ("AMD Instinct MI355X", torch.bfloat16, 2500e12, "published dense bf16 peak of MI355X"),
        ("NVIDIA H100 PCIe", torch.bfloat16, 1.0, "measured bf16 matrix product"),
        ("NVIDIA H100 NVL", torch.bfloat16, 1.0, "measured bf16 matrix product"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", torch.bfloat16, 1.0, "measured bf16 matrix product"),
        ("NVIDIA GB200", torch.bfloat16, 1.0, "measured bf16 matrix product"),
        ("NVIDIA H100 80GB HBM3", torch.float32, 1.0, "measured fp32 matrix product"),
    ],
)
def test_gpus_by_name(name: str, dtype: torch.dtype, peak: float, source: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(metrics, "_measured_flops", lambda device, dtype: 1.0)
    assert peak_flops(torch.device("cuda", 0), dtype) == (peak, source)
