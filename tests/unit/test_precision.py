"""`train.precision auto` is decided once, before the run, and kept."""

from __future__ import annotations

import pytest
import torch

from gptb_ds.config import Config, load_config, save_config
from gptb_ds.training import precision
from gptb_ds.training.precision import allow_tf32, faster_on_this_cpu, with_precision

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def config(run, **over) -> Config:
    return load_config(None, {"data.path": "x", "run.dir": str(run), "train.precision": "auto"} | over)


def test_a_precision_that_is_given_stays(tmp_path):
    given = config(tmp_path, **{"train.precision": "fp32"})
    assert with_precision(given, CPU) is given


@pytest.mark.parametrize("faster", ["fp32", "bf16"])
def test_a_cpu_takes_the_faster_one_and_a_resume_keeps_it(faster, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(precision, "faster_on_this_cpu", lambda *shape: asked.append(shape) or faster)
    over = {"data.lanes": 32, "train.lane_groups": 2, "model.num_slots": 5, "model.n_embd": 48}
    decided = with_precision(config(tmp_path, **over), CPU)
    assert decided.train.precision == faster
    assert asked == [(16 * 5, 48)]  # the rows of a lane group, and the width
    (tmp_path / "config.yaml").write_text(save_config(decided))
    monkeypatch.setattr(precision, "faster_on_this_cpu", lambda *shape: pytest.fail("measured again"))
    assert with_precision(config(tmp_path, **over), CPU) == decided


def test_a_new_run_in_the_same_folder_is_decided_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "faster_on_this_cpu", lambda *shape: "fp32")
    (tmp_path / "config.yaml").write_text("train: {precision: bf16}")
    assert with_precision(config(tmp_path, **{"run.resume": "never"}), CPU).train.precision == "fp32"
    assert with_precision(config(tmp_path), CPU).train.precision == "bf16"


def test_the_cpu_is_measured():
    assert faster_on_this_cpu(64, 32) in ("fp32", "bf16")


@pytest.mark.parametrize(("supported", "chosen"), [(True, "bf16"), (False, "fp32")])
def test_a_gpu_takes_bf16_if_it_has_it(supported, chosen, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: supported)
    assert with_precision(config(tmp_path), GPU).train.precision == chosen


def test_fp32_on_a_gpu_multiplies_in_tf32():
    before = torch.get_float32_matmul_precision()
    try:
        assert not allow_tf32(CPU, "fp32") and not allow_tf32(GPU, "bf16")
        assert torch.get_float32_matmul_precision() == before
        assert allow_tf32(GPU, "fp32")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
