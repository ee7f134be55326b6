"""Degrees of expert parallelism: what `auto` picks, and which mistakes are told."""

import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moesaic.parallel import mesh
from moesaic.parallel.mesh import expert_degree


@pytest.mark.parametrize(
    ("world", "experts", "degree"), [(1, 8, 1), (2, 8, 2), (8, 12, 4), (6, 9, 3), (7, 8, 1), (16, 8, 8)]
)
def test_auto_is_the_largest_common_divisor(world: int, experts: int, degree: int) -> None:
    assert expert_degree("auto", experts, world) == degree


def test_mistakes_name_knob_value_and_rule() -> None:
    with pytest.raises(ValueError, match=r"parallel\.expert=3: must divide the number of ranks, 4"):
        expert_degree("3", 6, 4)
    with pytest.raises(ValueError, match=r"parallel\.expert=4: must divide model\.n_experts=6"):
        expert_degree("4", 6, 8)
    assert expert_degree("2", 6, 8) == 2


@pytest.mark.parametrize(("gpus", "backend", "device"), [(0, "gloo", "cpu"), (8, "cpu:gloo,cuda:nccl", "cuda:3")])
def test_backend_and_device_of_a_rank(gpus: int, backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(dist, "init_process_group", lambda name, **_: chosen.append(name))
    monkeypatch.setattr(mesh, "rendezvous", lambda _: iter([(dist.HashStore(), 3, 8)]))
    monkeypatch.setattr(mesh, "meet", lambda *_: "name")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert mesh.start() == torch.device(device)
    assert chosen == ([torch.device(device), backend] if gpus else [backend])


def test_a_rank_whose_agent_is_gone_does_not_wait_for_it(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        mesh.find_store(0.1)
    with pytest.raises(SystemExit) as stop:
        mesh.find_store(0.1)
    assert stop.value.code == 1
    assert f"127.0.0.1:{port} does not answer" in capsys.readouterr().err
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    mesh.find_store(0.1)
