"""Sizes that a run leaves to the machine: what a window keeps, the recomputation that fits, the knee of the lanes."""

from __future__ import annotations

import pytest
import torch

from gptb_ds.config import Config, ConfigError, load_config, save_config
from gptb_ds.training import sizes
from gptb_ds.training.sizes import (
    WindowMemory,
    choose_recompute,
    knee,
    measure_memory,
    memory_line,
    most_lanes,
    with_sizes,
)
from tests.harness.models import small_gptb
from tests.harness.stores import numbered_documents, write_store

CPU = torch.device("cpu")


@pytest.fixture
def config(tmp_path):
    def make(**over: object) -> Config:
        values = {
            "data.path": str(write_store(tmp_path, numbered_documents([50] * 9))),
            "run.dir": str(tmp_path / "run"),
        }
        shape = {"model.n_embd": 16, "model.n_layer": 1, "model.n_head": 2, "model.num_slots": 4, "data.window": 8}
        values |= {"train.precision": "fp32"}
        return load_config(None, values | shape | {key.replace("__", "."): value for key, value in over.items()})

    return make


def decide(config: Config, ranks: int = 1) -> tuple[Config, list[str]]:
    said: list[str] = []
    return with_sizes(config, CPU, ranks, ranks, said.append), said


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_two_small_windows_keep_tells_of_a_large_one(precision):
    model = small_gptb()
    memory = measure_memory(model, CPU, precision)
    large = model.to({"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    assert memory.kept(16, 12, 0) == pytest.approx(sizes._kept_bytes(large, 16, 12), rel=0.1)


def test_recomputation_that_fits():
    memory = WindowMemory(column=100.0, state=10)
    everything = memory.kept(4, 64, 0)
    assert choose_recompute(memory, 4, 64, everything) == 0
    assert choose_recompute(memory, 4, 64, everything - 1) == 32
    assert choose_recompute(memory, 4, 64, memory.kept(4, 64, 8)) == 8
    # Nothing fits: what keeps least.
    least = choose_recompute(memory, 4, 64, 0)
    assert memory.kept(4, 64, least) == min(memory.kept(4, 64, every) for every in (1, 2, 4, 8, 16, 32))


def test_the_knee_is_the_fewest_lanes_that_nearly_reach_the_best_rate():
    assert knee({1: 10.0, 2: 20.0, 4: 36.0, 8: 39.0, 16: 40.0}) == 4


def test_lanes_are_measured_once_and_then_fixed(config, tmp_path, monkeypatch):
    found, said = decide(config(data__lanes="auto", train__lane_groups=2), ranks=3)
    assert found.data.lanes % 6 == 0
    assert said[0].startswith(f"data.lanes auto: {found.data.lanes} lanes")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(save_config(found))
    monkeypatch.setattr(sizes, "lane_rates", lambda *args: pytest.fail("measured again"))
    again, said = decide(config(data__lanes="auto", train__lane_groups=2), ranks=3)
    assert again.data.lanes == found.data.lanes
    assert not said


def test_recomputation_is_off_where_all_fits_and_on_where_it_does_not(config, monkeypatch):
    assert decide(config(train__recompute_every="auto"))[0].train.recompute_every == 0
    monkeypatch.setattr(sizes, "free_memory", lambda *args: 300_000.0)
    found, said = decide(config(train__recompute_every="auto", data__window=64))
    assert 0 < found.train.recompute_every < 64
    assert said == [f"train.recompute_every auto: {found.train.recompute_every}"]


def test_a_model_to_compare_with_recomputes_nothing(config):
    found, _ = decide(config(train__recompute_every="auto", model__kind="lstm"))
    assert found.train.recompute_every == 0


def test_numbers_that_stand_for_auto_can_not_be_given(config):
    for key, value in (("data__lanes", 0), ("train__recompute_every", -1), ("data__lanes", "some")):
        with pytest.raises(ConfigError, match=key.replace("__", r"\.")):
            config(**{key: value})


def test_the_most_lanes_fit_with_the_recomputation_that_was_given():
    memory = WindowMemory(column=100.0, state=10)
    for window, every in ((64, 0), (64, 16), (64, 4), (8, 1)):
        lanes = most_lanes(memory, window, every, usable=1e6)
        assert memory.kept(lanes, window, every) <= 1e6
        assert memory.kept(lanes, 4, 0) <= 1e6  # a trial of speed has four columns, and recomputes nothing
        assert max(memory.kept(lanes + 1, window, every), memory.kept(lanes + 1, 4, 0)) > 1e6
    assert most_lanes(memory, 64, 16, usable=-1.0) == 1
    assert most_lanes(memory, 64, -1, usable=1e6) == most_lanes(memory, 64, 2, usable=1e6)  # "auto": what keeps least


def test_columns_to_skip_are_looked_at_when_the_lanes_are_known(config, monkeypatch):
    monkeypatch.setattr(sizes, "lane_rates", lambda *args: {4: 1.0})
    found, _ = decide(config(data__lanes="auto", data__skip="0-3:2-4"))
    assert found.data.skips() == ((range(4), range(2, 5)),)
    with pytest.raises(ValueError, match=r"data.skip '0-4:2-4': .* with lanes of 0 to 3 and columns that ascend"):
        decide(config(data__lanes="auto", data__skip="0-4:2-4"))
    with pytest.raises(ConfigError, match="with columns that ascend"):
        config(data__lanes="auto", data__skip="0-4:4-2")


def test_the_estimate_is_said():
    line = memory_line(WindowMemory(2**20, 1000), lanes=64, window=16, every=0, free=2.0**31)
    assert line == (
        "memory a rank: about 1.0 GiB kept for the backward pass (64 lanes x 16 columns, 1.0 MiB each) of 2.0 GiB free"
    )
