"""Which runs compile their step, and that a run keeps what was chosen."""

from __future__ import annotations

import pytest
import torch

from gptb_ds.config import ConfigError, load_config, save_config
from gptb_ds.training.compilation import obstacle, with_compilation

CPU = torch.device("cpu")


def config(tmp_path, **over):
    values = {
        "data.path": "store",
        "run.dir": str(tmp_path),
        "model.n_embd": 128,
        "model.n_layer": 1,
        "model.n_head": 4,
    }
    return load_config(None, values | {"train.precision": "fp32"} | over)


@pytest.mark.parametrize(("updates", "chosen"), [(1_000_000_000, "on"), (100, "off")])
def test_long_runs_compile_and_short_ones_do_not(tmp_path, updates, chosen):
    assert with_compilation(config(tmp_path, **{"train.updates": updates}), CPU).train.compile == chosen


def test_what_is_given_stands_and_a_run_keeps_what_it_has(tmp_path):
    assert with_compilation(config(tmp_path, **{"train.compile": "on"}), CPU).train.compile == "on"
    (tmp_path / "config.yaml").write_text(save_config(config(tmp_path, **{"train.compile": True})))
    assert with_compilation(config(tmp_path), CPU).train.compile == "on"
    assert with_compilation(config(tmp_path, **{"run.resume": "never"}), CPU).train.compile == "off"


def test_what_is_to_be_recomputed_cheaply_is_not_compiled(tmp_path):
    """A compiled step would keep what it likes, and the memory that was asked for would not be saved."""
    cheap = {"train.recompute_cheap": True}
    long = config(tmp_path, **{"train.updates": 1_000_000_000} | cheap)
    assert with_compilation(long, CPU).train.compile == "off"
    (tmp_path / "config.yaml").write_text(save_config(config(tmp_path, **{"train.compile": "on"})))
    assert with_compilation(config(tmp_path, **cheap), CPU).train.compile == "off"
    with pytest.raises(ConfigError, match=r"^train.recompute_cheap has no say in a compiled step"):
        config(tmp_path, **{"train.compile": "on"} | cheap)


def test_obstacles_are_named(monkeypatch, tmp_path):
    assert "stage 3" in obstacle(3)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "compiler" in obstacle(1)
