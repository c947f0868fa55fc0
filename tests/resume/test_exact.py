"""Resuming is exact: on the same ranks, to the last bit."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.harness import faults
from tests.harness.training import file_checksums, losses, metrics, rewind, start, train, wait_for_lines

CASES = [
    pytest.param(stage, ranks, precision, groups, id=f"zero{stage}-{ranks}r-{precision}-{groups}g")
    for stage in (0, 1, 2, 3)
    for ranks in (1, 2)
    for precision in ("fp32", "bf16")
    for groups in (1, 2)
]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "ranks", "precision", "groups"), CASES)
def test_resumed_equals_straight(stage, ranks, precision, groups, store, tmp_path: Path):
    options = {
        "stage": stage,
        "ranks": ranks,
        "train__precision": precision,
        "train__lane_groups": groups,
        "model__dropout": 0.1,
    }
    train(tmp_path / "straight", store, **options)
    resumed = rewind(tmp_path / "straight", tmp_path / "resumed", 4)
    job = train(resumed, store, **options)
    assert "resuming from" in job.text(0)
    assert metrics(resumed) == metrics(tmp_path / "straight")
    for step in (8, 12):
        assert file_checksums(resumed, step) == file_checksums(tmp_path / "straight", step)


@pytest.mark.slow
def test_every_update_is_a_place_to_resume(store, tmp_path: Path):
    """At, before and after ends of documents and of epochs: the corpus is short enough for several epochs."""
    options = {"run__save_every": 1, "train__updates": 12, "data__window": 150, "model__dropout": 0.1}
    train(tmp_path / "straight", store, **options)
    for step in range(1, 12, 2):
        resumed = rewind(tmp_path / "straight", tmp_path / f"from-{step}", step)
        train(resumed, store, **options)
        assert metrics(resumed) == metrics(tmp_path / "straight")
        assert file_checksums(resumed, 12) == file_checksums(tmp_path / "straight", 12)


@pytest.mark.slow
def test_stopped_twice_by_a_signal(store, tmp_path: Path):
    options = {"ranks": 2, "model__dropout": 0.1, "train__updates": 250, "run__save_every": 0, "run__eval_every": 100}
    train(tmp_path / "straight", store, **options)
    run = tmp_path / "stopped"
    for number, rank in ((signal.SIGTERM, 1), (signal.SIGUSR2, 0)):
        job = start(run, store, **options)
        before = len(metrics(run)) if (run / "metrics.jsonl").exists() else 0
        wait_for_lines(run, before + 20, job)
        job.signal(number, rank)
        assert job.wait() == [85, 85], job.text()
        assert f"received {number.name}" in job.text(0)
    train(run, store, **options)
    assert metrics(run) == metrics(tmp_path / "straight")
    assert file_checksums(run, 250) == file_checksums(tmp_path / "straight", 250)
    job = train(run, store, **options)
    assert "done: 250 updates" in job.text(0)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_evaluation_and_samples_leave_training_undisturbed(stage, store, tmp_path: Path):
    options = {"ranks": 2, "stage": stage, "model__dropout": 0.1, "train__updates": 8}
    train(tmp_path / "quiet", store, run__eval_every=0, **options)
    job = train(tmp_path / "busy", store, run__eval_every=1, run__sample_every=2, run__sample_tokens=20, **options)
    assert job.text(0).count("sample after") == 4
    assert losses(tmp_path / "busy") == losses(tmp_path / "quiet")
    assert file_checksums(tmp_path / "busy", 8) == file_checksums(tmp_path / "quiet", 8)


@pytest.mark.slow
def test_a_stop_inside_an_evaluation_is_heard_there(store, tmp_path: Path):
    options = {"ranks": 2, "model__dropout": 0.1, "run__eval_tokens": 400}
    train(tmp_path / "straight", store, **options)
    assert '"eval_loss"' in metrics(tmp_path / "straight")[6]
    run = tmp_path / "stopped"
    # The evaluations of the first start come after updates 0 and 5, those of the second after 5, 10 and 12.
    for update, lines, slow in ((5, 6, 2), (12, 15, 3)):
        job = start(run, store, fault=faults.slow_evaluation(slow), **options)
        wait_for_lines(run, lines, job)  # the evaluation after this update is under way
        job.signal(signal.SIGTERM, 1)
        assert job.wait() == [85, 85], job.text()
        assert f"stopped after update {update}" in job.text(0)
        assert len(metrics(run)) == lines, "the evaluation was broken off"
    for _ in range(2):  # a finished run that is started again evaluates again, and says the same
        train(run, store, **options)
        assert metrics(run) == metrics(tmp_path / "straight")
    assert file_checksums(run, 12) == file_checksums(tmp_path / "straight", 12)
