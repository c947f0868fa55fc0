"""Columns that a run is told to skip are read and not learnt from, on any ranks and after a resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptb_ds.checkpoint.format import checkpoint_folder
from gptb_ds.checkpoint.reader import CheckpointReader
from tests.harness.training import losses, metrics, rewind, train

# Columns 25 to 29 lie in the fifth window of 6, lanes 2 to 5 on both of two ranks.
SKIP = {"data__skip": ["2-5:25-29"], "run__eval_every": 0}


@pytest.mark.slow
def test_skipped_columns_are_read_but_not_learnt_from(store, tmp_path: Path):
    plain, skipped, resumed = tmp_path / "plain", tmp_path / "skipped", tmp_path / "resumed"
    train(plain, store, ranks=2, stage=1, run__eval_every=0)
    train(skipped, store, ranks=2, stage=1, **SKIP)
    before, after = losses(plain), losses(skipped)
    assert [update for update in before if before[update] != after[update]] == list(range(5, 13))
    ends = [CheckpointReader(checkpoint_folder(run, 12)).lanes(0, 8, (3, 16)) for run in (plain, skipped)]
    assert torch.equal(ends[0]["ordinal"], ends[1]["ordinal"]) and torch.equal(ends[0]["offset"], ends[1]["offset"])
    # By hand, after a spike: from the checkpoint before it.
    rewind(plain, resumed, 4)
    job = train(resumed, store, ranks=2, stage=1, **SKIP)
    assert "data.skip [] -> ['2-5:25-29']" in job.text(0)
    assert metrics(resumed) == metrics(skipped)
    train(tmp_path / "one", store, ranks=1, stage=3, **SKIP)
    for update, loss in after.items():
        assert losses(tmp_path / "one")[update] == pytest.approx(loss, rel=2e-5)
