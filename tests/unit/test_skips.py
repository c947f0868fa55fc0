"""Columns that are read but not learnt from: which targets of a window stop counting."""

from __future__ import annotations

import pytest
import torch

from gptb_ds.config import ConfigError, DataConfig, load_config
from gptb_ds.data.window import Window

LANES, STEPS = 6, 4


def window(first_column: int) -> Window:
    ids = torch.arange(first_column, first_column + STEPS)[:, None].expand(STEPS, LANES)
    return Window(ids, ids, torch.zeros((STEPS, LANES), dtype=torch.bool))


def test_exactly_the_named_lanes_and_columns_stop_counting_on_any_ranks():
    skips = DataConfig(path=["x"], lanes=LANES, skip=["1-3:5-9", "5:0-2", "0:11"]).skips()
    counted = torch.ones((12, LANES))
    counted[5:10, 1:4], counted[0:3, 5], counted[11, 0] = 0, 0, 0
    for ranks in (1, 2, 3):
        share = LANES // ranks
        for first_column in (0, 4, 8):
            for rank in range(ranks):
                own = window(first_column)
                part = Window(*(t[:, :share] for t in (own.input_ids, own.targets, own.reset)))
                found = part.without(skips, rank * share, first_column).loss_weights
                want = counted[first_column : first_column + STEPS, rank * share : (rank + 1) * share]
                assert torch.equal(found, want), (ranks, rank, first_column)


def test_other_windows_are_left_as_they_are_and_weights_of_the_data_are_kept():
    skips = DataConfig(path=["x"], lanes=LANES, skip="0-1:4-5").skips()
    plain = window(8)
    assert plain.without(skips, 0, 8) is plain
    weights = torch.full((STEPS, LANES), 0.5)
    weighted = Window(plain.input_ids, plain.targets, plain.reset, weights)
    found = weighted.without(skips, 0, 4).loss_weights
    assert found is not None and found[:2, :2].sum() == 0 and found.sum() == 0.5 * (STEPS * LANES - 4)
    assert torch.equal(weights, torch.full((STEPS, LANES), 0.5)), "the window that was given is not changed"


@pytest.mark.parametrize("text", ["5", "0-64:1-2", "3-1:1-2", "1:9-2", "a:b", "1:2:3"])
def test_what_is_no_skip_is_refused_with_an_example(text):
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"data.path": "x", "data.skip": [text]})
    assert f"data.skip '{text}'" in str(caught.value) and "0-15:20000-20479" in str(caught.value)
