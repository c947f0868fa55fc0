"""The proof of ds_configs/: every policy trains on two ranks to the losses of one rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptb_ds.training.deepspeed_policy import read_policy
from tests.harness.launched import CHECKOUT
from tests.harness.training import losses, train

POLICIES = sorted((CHECKOUT / "ds_configs").glob("*.json"))


def test_the_policies_are_those_of_the_docs() -> None:
    table = (CHECKOUT / "docs" / "launch.md").read_text()
    assert len(POLICIES) == 7
    for path in POLICIES:
        assert f"`{path.name}`" in table
        for key in _keys(json.loads(path.read_text())):
            assert f"`{key}`" in table, f"docs/launch.md gives no reason for {key} of {path.name}"


@pytest.mark.slow
@pytest.mark.parametrize("path", POLICIES, ids=lambda path: path.stem)
def test_policy_trains_to_the_losses_of_one_rank(
    path: Path, one_rank: dict[int, float], store: Path, tmp_path: Path
) -> None:
    train(tmp_path / "run", store, ranks=2, policy=read_policy(str(path)))
    assert losses(tmp_path / "run") == pytest.approx(one_rank, rel=1e-5)


@pytest.fixture(scope="module")
def one_rank(store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    run = tmp_path_factory.mktemp("one") / "run"
    train(run, store, policy={"zero_optimization": {"stage": 0}})
    return losses(run)


def _keys(value: dict[str, Any]) -> set[str]:
    inner = [_keys(v) for v in value.values() if isinstance(v, dict)]
    return set(value).union(*inner)
