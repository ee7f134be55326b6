"""Degrees and meshes: what `auto` picks, who shares what with whom, and which mistakes are told."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from moesaic.parallel import mesh
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.mesh import expert_degree, make_meshes


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
    with pytest.raises(ValueError, match=r"parallel\.replicate=0: must be at least 1"):
        ParallelConfig(replicate=0)
    with ranks(8), pytest.raises(ValueError, match=r"parallel\.replicate=3: must divide the number of ranks, 8"):
        make_meshes("cpu", 2, 3)
    with ranks(8), pytest.raises(ValueError, match=r"parallel\.expert=3: must divide the number of ranks, 8"):
        make_meshes("cpu", 3, 2)


@contextmanager
def ranks(world: int, rank: int = 0) -> Iterator[None]:
    """This process as one of many, whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("world", "replicate", "expert", "dense", "experts"),
    [
        (8, 1, 1, [8], [8, 1]),
        (8, 1, 4, [8], [2, 4]),
        (8, 2, 2, [2, 4], [2, 2, 2]),
        (8, 2, 4, [2, 4], [2, 1, 4]),
        (8, 4, 4, [4, 2], [2, 1, 4]),  # an expert group spans two dense copies
        (8, 2, 8, [2, 4], [1, 8]),
        (8, 8, 1, [8, 1], [8, 1, 1]),
        (12, 3, 6, [3, 4], [2, 6]),  # neither degree divides the other
        (12, 6, 2, [6, 2], [6, 1, 2]),
        (1, 1, 1, [1], [1, 1]),
    ],
)
def test_meshes(world: int, replicate: int, expert: int, dense: list[int], experts: list[int]) -> None:
    last = world - 1
    with ranks(world, last):
        meshes = make_meshes("cpu", expert, replicate)
        assert meshes.dense.shape == tuple(dense) and meshes.experts.shape == tuple(experts)
        assert meshes.dense.mesh.tolist() == torch.arange(world).view(dense).tolist()
        assert meshes.expert_parallel == expert
        # Neighbours divide the experts; the ranks that hold the same ones lie `expert` apart.
        assert meshes.experts["expert"].mesh.tolist() == list(range(world - expert, world))
        assert meshes.expert_copies.mesh.flatten().tolist() == list(range(expert - 1, world, expert))
        assert meshes.expert_copies.mesh.shape == tuple(experts[:-1])
        neighbours = meshes.dense["shard"].mesh.tolist()
        assert neighbours == list(range(world - world // replicate, world))
        if (world // replicate) % expert == 0:  # one copy of the experts within one of the rest
            sharing = meshes.experts["expert_shard"].mesh.tolist()
            assert set(sharing) <= set(neighbours)
            assert len(sharing) * expert == len(neighbours)


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
