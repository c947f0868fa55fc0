"""A loss that jumps: training goes back to a snapshot in memory and on past the columns, exactly, on any ranks."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from gptb_ds.checkpoint.format import checkpoint_folders, read_manifest
from gptb_ds.training.loss_jumps import left_out
from tests.harness import faults
from tests.harness.stores import prepare
from tests.harness.training import file_checksums, losses, metrics, rewind, train

UPDATES, WINDOW = 240, 3
COMMON: dict[str, Any] = {
    "data__lanes": 4,
    "data__window": WINDOW,
    "data__seed": 1,  # the poison comes after 190 of the 240 updates
    "train__tokens": UPDATES * 4 * WINDOW,
    "model__dropout": 0.1,
    "run__eval_every": 0,
    "run__save_every": 65,
    "run__log_every": 1000,
}
REWINDING = COMMON | {"run__snapshot_every": 16, "run__jump_deviations": 1.0}


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of one sentence over and over, and a document of which no model can make sense."""
    chooser, folder = random.Random(1), tmp_path_factory.mktemp("poisoned")
    (folder / "texts").mkdir()
    for number in range(40):
        text = "the state of the lane " * chooser.choice([2, 4, 6])
        (folder / "texts" / f"{number:02d}.txt").write_text(text)
    (folder / "texts" / "poison.txt").write_text("".join(chooser.choice("QXZJVK#@!") for _ in range(60)))
    assert prepare("--source", folder / "texts", "--out", folder / "store", "--holdout", "0") == 0
    return folder / "store"


@pytest.fixture(scope="module")
def straight(poisoned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on two ranks that goes back, and is never stopped."""
    run = tmp_path_factory.mktemp("rewound") / "straight"
    job = train(run, poisoned, ranks=2, stage=1, **REWINDING)
    assert "back to update" in job.text(0)
    return run


def end_of(run: Path) -> Path:
    """The folder of its last checkpoint."""
    return checkpoint_folders(run)[0]


def rewinds(run: Path) -> list[list[int]]:
    found: list[list[int]] = read_manifest(end_of(run)).progress["rewinds"]  # type: ignore[assignment]
    return found


def unmarked(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics without the mark of columns that were gone past."""
    return [{k: v for k, v in json.loads(line).items() if k != "rewound"} for line in metrics(run)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "ranks", "options"),
    [
        pytest.param(0, 2, {}, id="zero0"),
        pytest.param(1, 2, {"optim__name": "muon"}, id="zero1-muon"),
        pytest.param(2, 2, {"train__precision": "bf16"}, id="zero2-bf16"),
        pytest.param(3, 2, {"train__lane_groups": 2}, id="zero3-groups"),
        pytest.param(0, 1, {"train__precision": "bf16"}, id="zero0-bf16"),
        pytest.param(3, 1, {"train__precision": "bf16", "train__updates_per_window": 2}, id="zero3-bf16-parts"),
    ],
)
def test_a_run_that_went_back_is_the_run_that_knew_what_to_skip(stage, ranks, options, poisoned, tmp_path: Path):
    """Weights, moments, random state, lanes and metrics, to the last bit: nothing of the poison is left."""
    back, told = tmp_path / "back", tmp_path / "told"
    job = train(back, poisoned, ranks=ranks, stage=stage, **REWINDING | options)
    assert "back to update" in job.text(0)
    columns = [f"0-3:{skip.start}-{skip.stop - 1}" for skip in left_out(rewinds(back), WINDOW)]
    assert len(columns) > 1, "the poison is longer than a window"
    train(told, poisoned, ranks=ranks, stage=stage, data__skip=columns, **COMMON | options)
    assert unmarked(back) == unmarked(told)
    assert all(("rewound" in json.loads(line)) == (json.loads(line)["loss"] is None) for line in metrics(back))
    step = int(end_of(back).name.split("-")[1])
    assert file_checksums(back, step) == file_checksums(told, step)


@pytest.mark.slow
def test_a_resume_does_the_same(straight: Path, poisoned: Path, tmp_path: Path):
    """From before the jump, which comes again, and from amid the columns that are gone past, which are recorded."""
    steps = [int(folder.name.split("-")[1]) for folder in checkpoint_folders(straight)]
    columns = left_out(rewinds(straight), WINDOW)
    assert steps == [240, 195, 130, 65] and any(195 * WINDOW in skip for skip in columns)
    for step in (130, 195):
        resumed = rewind(straight, tmp_path / f"from-{step}", step)
        train(resumed, poisoned, ranks=2, stage=1, **REWINDING)
        assert metrics(resumed) == metrics(straight)
        assert file_checksums(resumed, UPDATES) == file_checksums(straight, UPDATES)


@pytest.mark.slow
def test_other_ranks_go_back_alike(straight: Path, poisoned: Path, tmp_path: Path):
    """Without dropout, which draws from other streams there."""
    options = REWINDING | {"model__dropout": 0.0}
    train(tmp_path / "two", poisoned, ranks=2, stage=1, **options)
    resumed = rewind(tmp_path / "two", tmp_path / "resumed", 130)
    train(resumed, poisoned, ranks=1, stage=3, **options)
    assert rewinds(resumed) == rewinds(tmp_path / "two") != []
    for update, loss in losses(tmp_path / "two").items():
        assert losses(resumed)[update] == (None if loss is None else pytest.approx(loss, rel=1e-4))


@pytest.mark.slow
def test_no_more_rewinds_than_asked_for(straight: Path, poisoned: Path, tmp_path: Path):
    resumed = rewind(straight, tmp_path / "resumed", 130)
    job = train(resumed, poisoned, ranks=2, stage=1, **REWINDING | {"run__max_rewinds": 1})
    assert job.text(0).count("back to update") == 1
    assert "WARNING: the loss jumped in update" in job.text(0) and "run.max_rewinds 1 is reached" in job.text(0)
    assert rewinds(resumed) == rewinds(straight)[:1]


@pytest.mark.slow
def test_an_update_that_is_not_finite_is_gone_back_from(tmp_path: Path):
    """The loss of one rank is infinite once: all ranks go back, to before the documents of a curriculum grew."""
    assert prepare("--source", "task:parity?length=40&count=500", "--out", tmp_path / "store") == 0
    options = COMMON | {"train__tokens": 30 * 4 * WINDOW, "task__grow_at": 0.01, "run__save_every": 0}
    options |= {"ranks": 2, "stage": 2}
    back, told = tmp_path / "back", tmp_path / "told"
    job = train(back, tmp_path / "store", run__snapshot_every=8, fault=faults.one_infinite_loss, **options)
    assert "update 10: documents of up to 8" in job.text(0)
    assert "the loss jumped in update 15: back to update 8, to go on past window 14" in job.text(0)
    train(told, tmp_path / "store", data__skip=f"0-3:{14 * WINDOW}-{15 * WINDOW - 1}", **options)
    assert unmarked(back) == unmarked(told)
    assert [line["update"] for line in unmarked(back) if "loss" in line] == list(range(1, 31))
    assert not any("skipped" in line for line in unmarked(back))
    assert file_checksums(back, 30) == file_checksums(told, 30)
