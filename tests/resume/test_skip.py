"""Columns that a run is told to skip are read and not learnt from, on any ranks and after a resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptb_ds.checkpoint.format import checkpoint_folder
from gptb_ds.checkpoint.reader import CheckpointReader
from tests.harness.training import file_checksums, losses, metrics, rewind, train

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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "ranks", "options"),
    [
        pytest.param(1, 2, {"optim__name": "muon"}, id="zero1-muon"),
        pytest.param(3, 2, {"train__lane_groups": 2}, id="zero3-groups"),
        pytest.param(0, 1, {"train__precision": "bf16", "train__updates_per_window": 2}, id="zero0-bf16-parts"),
    ],
)
def test_an_update_in_which_nothing_counts_changes_no_weight(stage, ranks, options, store, tmp_path: Path):
    """The columns of windows 4 to 7, of all lanes: whole updates. The lanes read on, and a resume is exact."""
    straight, again = tmp_path / "straight", tmp_path / "again"
    options |= {"run__eval_every": 0, "data__skip": "0-7:24-47", "train__tokens": 12 * 48, "ranks": ranks}
    job = train(straight, store, stage=stage, **options)
    assert "skipped" not in job.text(0)
    number = options.get("train__updates_per_window", 1)
    before, after = (file_checksums(straight, windows * number) for windows in (4, 8))
    same = {name for name in before if before[name] == after[name]}
    assert {name.split("-")[0] for name in same if name.endswith("safetensors")} == {"model", "optimizer", "rng"}
    assert [update for update, loss in losses(straight).items() if loss is None] == [
        *range(4 * number + 1, 8 * number + 1)
    ]
    train(rewind(straight, again, 6 * number), store, stage=stage, **options)
    assert metrics(again) == metrics(straight)
    assert file_checksums(again, 12 * number) == file_checksums(straight, 12 * number)
