"""What runs on CUDA alone, run once without a GPU, with stand-ins for its driver. Elsewhere, beside what they belong to:

parallel/mesh.py start              tests/parallel/test_mesh.py        test_backend_and_device_of_a_rank
parallel/checkpoint.py pin          tests/parallel/test_checkpoint.py  test_memory_for_the_copy_is_locked_once_and_freed
moe/layer.py side_stream, meanwhile tests/moe/test_layer.py            test_one_side_stream_a_device, and the one before
moe/attention.py _turn              tests/kernels/test_rope.py         test_on_cuda_it_is_one_operation
moe/attention.py block_mask         tests/moe/test_attention.py        interpreted, under FakeTensorMode, against torch's own
moe/experts.py by grouped products  tests/moe/test_experts.py, test_memory.py
launch/metrics.py peaks by name     tests/launch/test_metrics.py       test_gpus_by_name
launch/startup.py check_devices     tests/launch/test_train.py
kernels/tiles.py target_name        tests/kernels/test_tiles.py
parallel/fused.py heap, failures    tests/parallel/test_fused.py       test_branch_for_cuda
parallel/trace.py NCCL's recorder   tests/parallel/test_trace.py
parallel/kineto.py                  tests/parallel/test_kineto.py      a written trace
launch/preflight.py memory, NCCL    tests/launch/test_preflight.py     test_a_gpu_that_others_use
"""

import os
import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from moesaic.kernels import autotune, bench, tiles
from moesaic.launch import comm_bench, generate, metrics, mixture, preflight, startup, train
from moesaic.launch.schema import Config
from moesaic.moe import attention, experts
from moesaic.parallel import checkpoint, collectives, engine, fsdp, mesh, probe, zero

CUDA = torch.device("cuda", 0)


class OnGPU(Tensor):
    """A tensor that passes for one of a GPU."""

    is_cuda = True  # type: ignore[assignment]
    device = CUDA  # type: ignore[assignment]


def test_groups_of_fsdp_use_nccls_own_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    for device, own in (("cuda", False), ("cpu", True)):
        sharded = mock.Mock()
        monkeypatch.setattr(fsdp, "fully_shard", lambda *_, sharded=sharded, **__: sharded)
        mesh = mock.Mock(device_type=device)
        mesh.size.return_value = 2
        fsdp._shard(nn.Linear(2, 2), mesh, MixedPrecisionPolicy(param_dtype=torch.bfloat16), None)
        assert sharded.set_custom_all_gather.called == sharded.set_custom_reduce_scatter.called == own
        sharded.set_gradient_divide_factor.assert_called_once_with(1.0)
        sharded.set_force_sum_reduction_for_comms.assert_called_once_with(True)


@pytest.mark.parametrize(("device", "accelerator"), [(CUDA, None), (torch.device("cpu"), "cpu")])
def test_deepspeed_looks_for_the_gpu_itself(
    device: torch.device, accelerator: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", mock.Mock())
    monkeypatch.setattr(os, "environ", {})
    zero.import_deepspeed(device)
    assert os.environ.get("DS_ACCELERATOR") == accelerator


def test_a_save_waits_for_copies_from_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []
    monkeypatch.setattr(checkpoint, "pin", lambda host: events.append(host.numel()))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("waits"))
    values = torch.arange(6.0).view(2, 3)
    piece = SimpleNamespace(bytes=24, dtype="F32", sizes=(2, 3))
    saver = SimpleNamespace(host=None)
    for _ in range(2):
        ((_, copy),) = checkpoint.Saver._copy(saver, [(piece, values.as_subclass(OnGPU))])  # type: ignore[arg-type,list-item]
        assert torch.equal(copy, values)
    assert events == [24, "waits", "waits"], "memory is locked once, and every copy is waited for"


def test_loaded_steps_lie_beside_their_parameters() -> None:
    """AdamW's fused kernel reads them through pointers, on a GPU by the GPU."""
    p = nn.Parameter(torch.empty(2, device="meta"))
    optimizer = torch.optim.AdamW([p])
    engine.make_moments(optimizer, [p])
    engine.set_steps(optimizer, torch.tensor(3.0))
    assert optimizer.state[p]["step"].device == p.device


def test_an_error_of_one_rank_waits_for_no_communicator(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended: list[Any] = []
    monkeypatch.setattr(dist, "destroy_process_group", lambda: ended.append("destroyed"))
    monkeypatch.setattr(os, "_exit", ended.append)

    def program(device: torch.device) -> None:
        try:
            raise RuntimeError("CUDA out of memory")
        finally:
            mesh.end(device)

    for device in (CUDA, torch.device("cpu")):
        mesh.leave_after(lambda device=device: program(device))
        assert "RuntimeError: CUDA out of memory" in capsys.readouterr().err
    mesh.end(CUDA)
    assert ended == [1, "destroyed", 1, "destroyed"]


def test_a_handle_that_was_waited_for_is_let_go() -> None:
    event = collectives.Event(0, "", "", "", "", "", "", 1, [0], 1.0)
    work, recorder = mock.Mock(), collectives.Recorder.__new__(collectives.Recorder)
    recorder.works = {id(work): (work, event)}
    for _ in range(2):
        recorder.waited(work, 0.5)
    assert not recorder.works and event.exposed == 0.5 and event.ended is not None


def test_a_batch_goes_to_the_gpu_from_locked_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    locked = SimpleNamespace(to=lambda *where, **how: asked.append((*where, how)) or "there")
    monkeypatch.setattr(Tensor, "pin_memory", lambda host: asked.append(host.shape) or locked)
    assert train.to_device(np.zeros((0, 3), np.int64), CUDA) == "there"
    assert asked == [(0, 3), (CUDA, {"non_blocking": True})]
    assert train.to_device(np.ones((1, 3), np.int64), torch.device("cpu")).tolist() == [[1, 1, 1]]


def test_flex_attention_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    attention._flex.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda function: ("compiled", function))
    assert attention._flex(True) == ("compiled", attention.flex_attention)
    assert attention._flex(False) is attention.flex_attention
    attention._flex.cache_clear()


@pytest.mark.parametrize(("capability", "dtype", "backend"), [
    ((9, 0), torch.bfloat16, "triton"), ((10, 3), torch.float32, "triton"), ((9, 0), torch.float64, "torch"),
    ((8, 0), torch.bfloat16, "torch"),
])  # fmt: skip
def test_kernels_run_the_experts_of_known_gpus(
    capability: tuple[int, int], dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(experts, "known_tile", tiles.known_tile.__wrapped__)  # which is asked once a device
    x = torch.zeros(1, dtype=dtype).as_subclass(OnGPU)
    assert experts.backend_for("auto", x) == backend
    assert experts.backend_for("auto", torch.zeros(1)) == "torch"
    assert experts.backend_for("reference", x) == "reference"


def test_the_memory_that_tensors_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29)
    monkeypatch.setattr(torch, "tensor", lambda value, dtype, device: (value, dtype, device))
    assert metrics.memory_gib(CUDA) == (1.5, torch.float64, CUDA)


def test_a_program_for_each_multiprocessor(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert tiles.processors(CUDA) == 132


def test_a_measured_peak_waits_for_each_product(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []
    monkeypatch.setattr(torch, "Generator", mock.Mock())
    monkeypatch.setattr(torch, "randn", lambda n, m, **_: torch.empty(0).expand(0, 0) if n == m == 8192 else None)
    monkeypatch.setattr(torch, "mm", lambda a, b, out: events.append(a.dtype))
    monkeypatch.setattr(torch.cuda, "synchronize", events.append)
    assert metrics._measured_flops(CUDA, torch.bfloat16) > 0
    assert events[:4] == [torch.bfloat16, CUDA] * 2 and len(events) >= 8


def test_types_and_devices_of_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config()
    assert startup.compute_dtype(config, CUDA) is torch.bfloat16
    assert startup.compute_dtype(config, torch.device("cpu")) is torch.float32

    def stop(model: Any, seed: int, device: torch.device) -> None:
        raise InterruptedError(device)

    monkeypatch.setattr(generate, "newest_checkpoint", lambda run_dir: run_dir)
    monkeypatch.setattr(generate, "load_tokenizer", lambda name: None)
    monkeypatch.setattr(generate.checkpoint, "read_state", lambda path: {"config": {}})
    monkeypatch.setattr(generate.cli, "from_dict", lambda values: config)
    monkeypatch.setattr(generate, "build", stop)
    for gpu, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        with pytest.raises(InterruptedError, match=device):
            generate.main(generate.Options(run_dir="run"))


def test_timed_calls_wait_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collective of launch/comm_bench.py lasts until the device has done it, and so does a message of a probe."""
    events: list[Any] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: events.append("waits"))
    monkeypatch.setattr(torch, "tensor", lambda values, dtype, device: torch.DoubleTensor(values))
    for name in ("barrier", "all_reduce"):
        monkeypatch.setattr(dist, name, lambda *_, name=name: events.append(name))
    assert comm_bench.seconds_of(lambda: events.append("call"), mock.Mock(), CUDA, 2) > 0
    assert events == ["barrier", "waits", "call", "waits"] * 3 + ["all_reduce"]

    events.clear()
    request = SimpleNamespace(wait=lambda: events.append("sent"))
    monkeypatch.setattr(dist, "batch_isend_irecv", lambda work: [request] * len(work))
    probe._do([mock.Mock()] * 2, CUDA)
    assert events == ["sent", "sent", "waits"]


def test_a_cluster_of_gpus_is_probed_with_larger_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    place = preflight.Place(Config(), CUDA, "NVIDIA H100 80GB HBM3", None, ["a"] * 2)
    monkeypatch.setattr(probe, "wrong_products", lambda *what: asked.append(what) or [])
    monkeypatch.setattr(probe, "link_speeds", lambda device, size: asked.append((device, size)) or [])
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    assert [level for level, _ in preflight.products(place)] == ["ok"]
    list(preflight.links(place))
    assert asked == [(CUDA, torch.bfloat16, place.kind, 4096, 50), (CUDA, 64 * 2**20)]


def test_tiles_are_of_one_kind_of_gpu_and_its_memory_running_out_is_no_slow_tile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    shape = autotune.layer_shape(64, 32, 16, 32, 4, 2, 1)
    key = autotune.key_of(CUDA, shape)
    assert (key["device"], key["target"], key["shape"]) == ("NVIDIA H100 PCIe", "sm_90a", shape)

    def full(case: Any) -> str:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench, "experts", lambda device, shape: iter([SimpleNamespace(name="experts")]))
    monkeypatch.setattr(bench, "wrong", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        autotune.search(CUDA, shape)


def test_waits_for_data_are_added_up_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[Any] = []
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda n, dtype, device: devices.append(device) or zeros(n, dtype=dtype))
    monkeypatch.setattr(mixture, "total", lambda values: values)
    ahead, on_gpu = SimpleNamespace(lap=lambda: (1.0, 2.0, 300)), SimpleNamespace(device="cuda")
    figures = mixture.data_figures(ahead, None, Config().train, 0, on_gpu, 4.0, 1, 2)  # type: ignore[arg-type]
    assert figures == {"data/wait": 0.25, "data/tokens_per_s": 150.0} and devices == ["cuda"]
