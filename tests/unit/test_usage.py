"""Metrics and the progress line say what a run makes of its hardware."""

from __future__ import annotations

import math

import pytest
import torch

from gptb_ds.baselines import LSTMBaseline, LSTMConfig
from gptb_ds.distributed.world import World
from gptb_ds.training.flops import flops_per_token
from gptb_ds.training.metrics import Progress
from gptb_ds.training.usage import Usage, usage_of
from tests.harness.models import small_gptb


def test_mfu_is_the_share_of_what_all_ranks_can_do():
    model = small_gptb()
    usage = usage_of(model, World(), "fp32", lanes=4)
    assert usage.token_flops == flops_per_token(model) and usage.said.endswith("of a product measured here")
    two = Usage(usage.device, usage.token_flops, 2 * usage.peak, usage.said)
    found = two.metrics(1000.0)
    assert found["mfu"] == pytest.approx(flops_per_token(model) * 1000 / usage.peak / 2)
    ballast = torch.ones(1 << 26)  # 256 MiB, which stay counted when they are gone
    after = two.metrics(1.0)["memory_gib"]
    assert ballast.numel() and after > 0.25 and after >= found["memory_gib"]


def test_where_the_arithmetic_is_not_counted_mfu_is_left_out():
    usage = usage_of(LSTMBaseline(LSTMConfig(vocab_size=31, n_embd=16, n_layer=1)), World(), "fp32", lanes=4)
    assert set(usage.metrics(1000.0)) == {"memory_gib"}


def test_the_progress_line_says_mfu_memory_and_waits():
    said: list[str] = []
    line = {"update": 1, "loss": 2.0, "grad_norm": 0.5, "lr": 1e-3, "tokens_per_second": 1234.5}
    line |= {"mfu": 0.4123, "memory_gib": 12.34, "wait_fraction": 0.031}
    Progress(2, 0, log_every=1, write=said.append).update(line, 2.0 / math.log(2))
    assert "1,234 tok/s | mfu 41.2% | 12.3 GiB | wait 3% | ETA" in said[0]
