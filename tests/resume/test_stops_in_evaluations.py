"""A request to stop inside the evaluation with which a start begins: no update comes before that evaluation is done."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from gptb_ds.checkpoint.format import checkpoint_folders
from tests.harness import faults
from tests.harness.processes import wait_until
from tests.harness.training import file_checksums, metrics, start, train, wait_for_lines

OPTIONS = {"ranks": 2, "model__dropout": 0.1, "run__eval_tokens": 400}


def stop_at_its_start(run: Path, store: Path, update: int) -> str:
    """Starts the run with slow evaluations and asks rank 1 to stop as soon as the run has said where it begins."""
    job = start(run, store, fault=faults.slow_evaluation(1), **OPTIONS)
    wait_until(lambda: f"updates {update} to 12" in job.text(0), "the run to begin", job.text)
    job.signal(signal.SIGTERM, 1)
    assert job.wait() == [85, 85], job.text()
    return job.text(0)


@pytest.mark.slow
def test_stops_inside_the_first_evaluation_of_a_start_cost_nothing(store: Path, tmp_path: Path):
    straight, run = tmp_path / "straight", tmp_path / "run"
    train(straight, store, **OPTIONS)
    assert "stopped after update 0: received SIGTERM" in stop_at_its_start(run, store, 0)
    assert metrics(run) == [] and not checkpoint_folders(run)
    job = start(run, store, fault=faults.slow_evaluation(2), **OPTIONS)
    wait_for_lines(run, 6, job)  # the evaluation after update 5 is under way, and stays due
    job.signal(signal.SIGTERM, 1)
    assert job.wait() == [85, 85], job.text()
    assert "stopped after update 5: received SIGTERM" in stop_at_its_start(run, store, 5)
    train(run, store, **OPTIONS)
    assert metrics(run) == metrics(straight)
    assert file_checksums(run, 12) == file_checksums(straight, 12)
