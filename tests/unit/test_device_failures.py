"""What is said when a GPU's memory does not suffice names what would fit, and that does."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
import torch.distributed as dist

from gptb_ds.config import OptimConfig, RunConfig, TrainConfig, load_config
from gptb_ds.model.configuration import GPTBConfig
from gptb_ds.training.device_failures import DeviceFailureError, GpuMemory, named_failures, out_of_memory
from gptb_ds.training.sizes import WindowMemory
from gptb_ds.training.train_state import RunFacts
from tests.harness.window_memory import kept_bytes

GIB = 2**30
GPT2_SMALL = GPTBConfig(num_slots=20, n_positions=20, dropout=0.0)


def facts_of(lanes: int = 1024, window: int = 16, **train: object) -> RunFacts:
    return RunFacts(lanes, window, OptimConfig(), TrainConfig(**train), RunConfig(), None, {}, {})


def test_what_is_named_fits_and_nothing_else_is_named():
    formula = kept_bytes(GPT2_SMALL, 2)
    window = WindowMemory(formula.lane_step, int(formula.lane_state))
    for free, ranks in ((60, 1), (30, 1), (10, 2), (4, 4), (1, 8)):
        line = out_of_memory(
            torch.OutOfMemoryError("CUDA out of memory."), facts_of(), ranks, GpuMemory(80 * GIB, free * GIB, window)
        )
        lanes = 1024 // ranks
        settings = re.findall(r"--train\.(\w+) (\d+)( with --train.recompute_every (\d+))?", line)
        for key, value, _, both in settings:
            groups = int(value) if key == "lane_groups" else 1
            every = int(value) if key == "recompute_every" else int(both or 0)
            assert window.kept(lanes // groups, 16, every) <= 0.9 * free * GIB, line
        assert settings or free == 1, line
        assert f"{free}.00 GiB that weights and optimizer leave of the GPU's 80.00 GiB" in line


def test_the_formula_is_near_what_a_gpu_took():
    """124M, S=20, bf16, 1,024 lanes, K=16 on an H200 (docs/gpu.md), with weights and their gradients: 0.5 GiB."""
    window = kept_bytes(GPT2_SMALL, 2)
    assert window.kept(1024, 16) / GIB + 0.5 == pytest.approx(92.7, rel=0.02)
    assert window.kept(1024, 16, 4) / GIB + 0.5 == pytest.approx(24.9, rel=0.05)


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ("CUDA out of memory. Tried to allocate 2 GiB", "With less:"),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)", "With less:"),
        ("CUDA error: an illegal memory access was encountered\nmore", "CUDA_LAUNCH_BLOCKING=1"),
        (
            "[enforce fail at x.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried to allocate 2 B",
            "With less:",
        ),
        ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", "CUDA_LAUNCH_BLOCKING=1"),
    ],
)
def test_errors_of_a_device_are_one_line(said: str, named: str):
    with pytest.raises(DeviceFailureError) as caught, named_failures(facts_of(), 1):
        raise RuntimeError(said)
    line = str(caught.value)
    assert line.startswith(said.splitlines()[0]) and named in line and "\n" not in line
    assert "data.lanes 1024 on 1 rank(s), data.window 16" in line


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shape mismatch") as caught, named_failures(facts_of(), 1):
        raise RuntimeError("shape mismatch")
    assert type(caught.value) is RuntimeError


def test_an_error_of_a_collective_stays_one_though_it_quotes_the_device():
    """It mostly comes of another rank's end, and is told as that."""
    with pytest.raises(dist.DistError), named_failures(facts_of(), 2):
        raise dist.DistBackendError("NCCL error in: x.cpp:1, unhandled cuda error (run with NCCL_DEBUG=INFO)")


def test_no_setting_is_named_that_the_configuration_refuses():
    error = torch.OutOfMemoryError("CUDA out of memory.")
    for kind, train in (("gptb", {}), ("gptb", {"recompute_cheap": True}), ("gptb", {"compile": "on"}), ("lstm", {})):
        facts = dataclasses.replace(facts_of(**train), can_recompute=kind == "gptb")
        options = re.findall(r"((?:--train\.\w+ \w+ ?)+)", out_of_memory(error, facts, 1))
        assert len(options) == {"gptb": 2 if train else 3, "lstm": 1}[kind]
        for together in options:
            words = together.replace("--", "").split()
            given = {f"train.{key}": value for key, value in train.items()}
            given |= dict(zip(words[::2], words[1::2], strict=True))
            load_config(None, {"data.path": "s", "data.lanes": 1024, "model.kind": kind} | given)
