"""The state's health is measured alike on any ranks and ZeRO stage, and training does not notice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.harness.training import losses, train


def evaluations(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval_loss" in line]


@pytest.mark.slow
def test_health_is_the_same_on_two_ranks_at_stage_3_and_costs_training_nothing(store: Path, tmp_path: Path):
    one, two, without = (tmp_path / name for name in ("one", "two", "without"))
    evaluated = {"run__eval_tokens": 3000, "run__eval_every": 12}
    train(one, store, stage=0, **evaluated)
    train(two, store, ranks=2, stage=3, **evaluated)
    train(without, store, stage=0, run__state_health=False, **evaluated)
    for line, other in zip(evaluations(one), evaluations(two), strict=True):
        assert other.keys() == line.keys()
        known = {key for key, value in line.items() if value is not None}
        assert {"state_norm", "state_worth", "state_swapped", "state_lyapunov", "state_gradient_4"} <= known
        for key in line.keys() - {"state_swapped"}:  # documents change their states with those of the same rank
            assert other[key] == (pytest.approx(line[key], rel=1e-3, abs=1e-5) if key in known else None)
    assert losses(one) == losses(without)
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert "state_norm" not in evaluations(without)[0]
