"""A job that is paused and continued (SIGSTOP, Slurm's suspend, a laptop's lid) is not one that hangs."""

from __future__ import annotations

import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from gptb_ds.distributed.watchdog import Watchdog
from gptb_ds.distributed.world import World
from tests.harness.processes import HANG_SECONDS, run_ranks
from tests.harness.training import Job, metrics, start, wait_for_lines


@pytest.mark.slow
def test_a_pause_longer_than_hang_seconds_ends_nothing(store: Path, tmp_path: Path):
    """A run of one rank and one of two, paused at the same time."""
    runs = {ranks: tmp_path / f"run-{ranks}" for ranks in (1, 2)}
    over = {"train__updates": 100_000, "run__save_every": 0, "run__hang_seconds": HANG_SECONDS, "run__lost_seconds": 6}
    jobs = {ranks: start(run, store, ranks=ranks, **over) for ranks, run in runs.items()}
    for ranks, job in jobs.items():
        wait_for_lines(runs[ranks], 3, job)
    to_all(jobs, signal.SIGSTOP)
    time.sleep(1.5 * HANG_SECONDS)  # the pause itself: its length is the point, no answer is awaited
    before = {ranks: len(metrics(run)) for ranks, run in runs.items()}
    to_all(jobs, signal.SIGCONT)
    for ranks, job in jobs.items():
        wait_for_lines(runs[ranks], before[ranks] + 20, job)
        job.signal(signal.SIGTERM, 0)
        assert job.wait() == [85] * ranks, job.text()
        assert "no progress" not in job.text() and "lost contact" not in job.text()


def to_all(jobs: dict[int, Job], number: signal.Signals) -> None:
    for ranks, job in jobs.items():
        for rank in range(ranks):
            job.signal(number, rank)


def exchange_after_a_pause(world: World) -> list[int]:
    """An exchange in which rank 0 arrives later than the groups' own time-out."""
    control = dist.new_group(backend="gloo", timeout=timedelta(seconds=1))
    watched = World(world.rank, world.size, world.local_rank, world.device, world.host, control)
    watchdog = Watchdog(watched, limit=60).start()
    if world.rank == 0:
        time.sleep(3)
    ranks = watched.all_gather(world.rank)
    watchdog.stop()
    return ranks


@pytest.mark.slow
def test_what_hangs_is_decided_by_the_watchdog_and_no_time_out_of_a_group():
    assert run_ranks(exchange_after_a_pause, 2) == [[0, 1], [0, 1]]
