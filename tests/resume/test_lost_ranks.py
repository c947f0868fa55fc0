"""A rank that is lost is named by every other one in seconds, whatever the backend notices; one that is slow is not.

Where nothing else is said, no time-out and no watchdog comes before the heartbeats: `run.hang_seconds` is long.
"""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import pytest

from tests.harness import faults
from tests.harness.processes import PATIENCE
from tests.harness.training import start, train, wait_for_lines

LONG = {"data__lanes": 9, "train__updates": 100_000, "run__save_every": 0, "run__eval_every": 0}
PATIENT = {"run__hang_seconds": 10_000}
HOST = socket.gethostname()


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_rank_is_named_by_all_others(lost, store: Path, tmp_path: Path):
    run = tmp_path / "run"
    job = start(run, store, ranks=3, **LONG, **PATIENT)
    wait_for_lines(run, 3, job)
    job.kill(lost)
    codes = job.wait()
    for rank in {0, 1, 2} - {lost}:
        assert codes[rank] == 1, job.text()
        (line,) = [line for line in job.text(rank).splitlines() if "lost contact" in line]
        assert line == (
            f"[rank {rank} on {HOST}] lost contact with another rank, stopping: rank {lost} on {HOST} has ended"
        )


@pytest.mark.slow
def test_a_killed_rank_is_named_where_the_backend_notices_nothing(store: Path, tmp_path: Path):
    """As NCCL: the others are in a call that waits for ever."""
    run = tmp_path / "run"
    job = start(run, store, ranks=3, fault=faults.waits_in_update(3), **LONG, **PATIENT)
    wait_for_lines(run, 2, job)
    job.kill(1)
    codes = job.wait()
    assert (codes[0], codes[2]) == (1, 1), job.text()
    for rank in (0, 2):
        assert f"stopping: rank 1 on {HOST} has ended" in job.text(rank)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_stopped_rank_is_named_by_all_others(lost, store: Path, tmp_path: Path):
    run = tmp_path / "run"
    job = start(run, store, ranks=3, **LONG, **PATIENT, run__lost_seconds=6)
    wait_for_lines(run, 3, job)
    job.signal(signal.SIGSTOP, lost)
    for rank in {0, 1, 2} - {lost}:
        job.processes[rank].join(PATIENCE)
        assert job.processes[rank].exitcode == 70, job.text()
        assert f"stopping: rank {lost} on {HOST} has not been heard of for 6 s" in job.text(rank)
    job.signal(signal.SIGCONT, lost)
    assert job.wait()[lost] not in (0, 85), "continued, it finds nobody"


@pytest.mark.slow
def test_a_rank_that_is_merely_slow_is_no_loss(store: Path, tmp_path: Path):
    """One update of rank 1 takes longer than `run.lost_seconds` twice: first it is asleep, then at work in Python."""
    job = train(tmp_path / "run", store, ranks=2, fault=faults.slow_in_update(3, 12), **PATIENT, run__lost_seconds=5)
    assert "lost contact" not in job.text()
