"""When windows are captured as CUDA graphs, and what is said when they are not."""

from __future__ import annotations

import pytest
import torch

from gptb_ds.config import TrainConfig
from gptb_ds.training.window_graphs import refusal
from tests.harness.models import small_gptb

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


def test_where_windows_can_be_captured():
    plain, dropped = small_gptb(), small_gptb(dropout=0.1)
    assert refusal(plain, GPU, 2) is None
    assert "stage 3" in refusal(plain, GPU, 3)
    assert "dropout" in refusal(dropped, GPU, 1)
    assert "cpu" in refusal(plain, CPU, 1)


@pytest.mark.parametrize(("given", "kept"), [(True, "on"), (False, "off"), ("auto", "auto"), ("on", "on")])
def test_a_switch_is_also_what_yaml_makes_of_on_and_off(given, kept):
    assert TrainConfig(graph=given).graph == kept
