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
from tests.harness.processes import run_ranks
from tests.harness.training import metrics, start, wait_for_lines

HANG_SECONDS = 4


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_pause_longer_than_hang_seconds_ends_nothing(ranks: int, store: Path, tmp_path: Path):
    run = tmp_path / "run"
    job = start(run, store, ranks=ranks, train__updates=100_000, run__save_every=0, run__hang_seconds=HANG_SECONDS)
    wait_for_lines(run, 3, job)
    for rank in range(ranks):
        job.signal(signal.SIGSTOP, rank)
    time.sleep(3 * HANG_SECONDS)  # the pause itself: its length is the point, no answer is awaited
    before = len(metrics(run))
    for rank in range(ranks):
        job.signal(signal.SIGCONT, rank)
    wait_for_lines(run, before + 20, job)
    job.signal(signal.SIGTERM, 0)
    assert job.wait(60) == [85] * ranks, job.text()
    assert "no progress" not in job.text()


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
