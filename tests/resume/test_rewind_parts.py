"""Going back from a window of several updates, none of which was finite."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import faults
from tests.harness.training import losses, train


@pytest.mark.slow
def test_training_goes_back_before_it_gives_up(store: Path, tmp_path: Path):
    """The third window makes the updates 5 and 6, as many in a row as `train.max_bad_updates` allows at most."""
    options = {"train__updates_per_window": 2, "train__max_bad_updates": 2, "run__eval_every": 0, "run__save_every": 0}
    options |= {"ranks": 2, "fault": faults.infinite_losses}
    job = train(tmp_path / "back", store, run__snapshot_every=2, **options)
    assert "the loss jumped in update 6: back to update 4, to go on past window 2" in job.text(0)
    found = losses(tmp_path / "back")
    assert [update for update, loss in found.items() if loss is None] == [5, 6] and found.keys() == {*range(1, 13)}
    job = train(tmp_path / "without", store, expect=1, **options)
    assert "2 updates in a row were not finite" in job.text(0)
