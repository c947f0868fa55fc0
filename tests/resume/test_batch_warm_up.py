"""Batch warm-up: only the update boundaries move. Columns, state, resume and elasticity stay as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gptb_ds.checkpoint.format import checkpoint_folder, read_manifest
from gptb_ds.checkpoint.reader import CheckpointReader
from tests.harness.training import file_checksums, losses, metrics, rewind, train

# 8 lanes x 6 columns are 48 tokens: 3 windows of 4 updates, 3 of 2, 4 of one.
WINDOWS = ["4:144", "2:288", "1"]
COMMON = {
    "train__updates_per_window": WINDOWS,
    "train__updates": 22,
    "run__save_every": 1,
    "run__eval_every": 7,
    "optim__beta2_half_life": 300,
    "model__dropout": 0.1,
}
EDGES = [4, 8, 12, 14, 16, 18, 19, 20, 21, 22]  # updates made at each window's edge


@pytest.fixture(scope="module")
def straight(store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("warm-up") / "straight"
    train(run, store, ranks=2, stage=2, **COMMON)
    return run


def counters(run: Path) -> list[tuple[int, int]]:
    """(update, tokens) of each metrics line of an update."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["update"], line["tokens"]) for line in lines if "loss" in line]


@pytest.mark.slow
def test_updates_and_tokens_count_what_they_say(straight: Path):
    tokens = [*range(12, 145, 12), *range(168, 289, 24), *range(336, 481, 48)]
    assert counters(straight) == list(enumerate(tokens, 1))
    for windows, update in enumerate(EDGES, 1):
        manifest = read_manifest(checkpoint_folder(straight, update))
        assert (manifest.step, manifest.tokens) == (update, 48 * windows)
    evaluated = [json.loads(line)["update"] for line in metrics(straight) if "eval_loss" in line]
    assert evaluated == [0, 8, 14, 21, 22]  # at the edge of the window that holds every seventh update


@pytest.mark.slow
def test_the_columns_are_those_of_a_run_without_it(straight: Path, store, tmp_path: Path):
    train(tmp_path / "plain", store, train__updates=10, run__eval_every=0)
    ours, plain = (
        CheckpointReader(checkpoint_folder(run, step)).lanes(0, 8, (3, 16))
        for run, step in ((straight, 22), (tmp_path / "plain", 10))
    )
    assert torch.equal(ours["ordinal"], plain["ordinal"]) and torch.equal(ours["offset"], plain["offset"])


@pytest.mark.slow
@pytest.mark.parametrize("step", [8, 12, 18])
def test_resumed_before_at_and_after_a_change_equals_straight(straight: Path, step, store, tmp_path: Path):
    resumed = rewind(straight, tmp_path / "resumed", step)
    train(resumed, store, ranks=2, stage=2, **COMMON)
    assert metrics(resumed) == metrics(straight)
    assert file_checksums(resumed, 22) == file_checksums(straight, 22)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "stage", "groups"), [(1, 3, 1), (2, 0, 4)])
def test_an_update_has_the_same_lanes_on_any_ranks_and_in_any_groups(store, tmp_path: Path, ranks, stage, groups):
    options = COMMON | {"model__dropout": 0.0, "run__eval_every": 0, "run__save_every": 12}
    train(tmp_path / "reference", store, ranks=2, stage=2, **options)
    train(tmp_path / "other", store, ranks=ranks, stage=stage, train__lane_groups=groups, **options)
    resumed = rewind(tmp_path / "reference", tmp_path / "resumed", 12)
    train(resumed, store, ranks=ranks, stage=stage, train__lane_groups=groups, **options)
    want = losses(tmp_path / "reference")
    for run in (tmp_path / "other", resumed):
        found = losses(run)
        assert found.keys() == want.keys()
        for update, loss in want.items():
            assert found[update] == pytest.approx(loss, rel=2e-5), f"update {update} of {run.name}"


@pytest.mark.slow
def test_updates_that_follow_the_measured_noise_are_resumed_exactly(store, tmp_path: Path):
    options = {
        "ranks": 2,
        "train__updates_per_window": "auto:4",
        "train__measure_noise": "true",
        "train__tokens": 48 * 40,
        "optim__warmup_tokens": 96,
        "run__save_every": 48,
        "run__eval_every": 0,
    }
    train(tmp_path / "straight", store, **options)
    lines = [json.loads(line) for line in metrics(tmp_path / "straight")]
    assert {"noise_scale"} <= lines[-2].keys()
    sizes = [
        b[1] - a[1]
        for a, b in zip([(0, 0), *counters(tmp_path / "straight")], counters(tmp_path / "straight"), strict=False)
    ]
    assert sizes[0] == 12 and sizes == sorted(sizes) and sizes[-1] > 12, "updates grew, as the noise allowed"
    resumed = rewind(tmp_path / "straight", tmp_path / "resumed", 48)
    train(resumed, store, **options)
    assert metrics(resumed) == metrics(tmp_path / "straight")


@pytest.mark.slow
def test_noise_of_one_part_cannot_be_measured_and_is_refused(store, tmp_path: Path):
    job = train(tmp_path / "run", store, expect=2, train__measure_noise="true")
    assert "train.lane_groups 2" in job.text()
