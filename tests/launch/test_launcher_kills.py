"""A launcher that is asked to stop, or killed at any instant, costs no update and doubles none."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.harness.launched import LAUNCH, PATIENCE, TinyRun, alive, finish, started

pytestmark = pytest.mark.slow
ONE_NODE = ["bash", str(LAUNCH / "one_node.sh")]


def test_a_run_that_is_asked_to_stop_or_loses_its_launcher_goes_on(store: Path, plain: TinyRun, tmp_path: Path) -> None:
    """SIGTERM to the launcher; the runner, and the process that it starts the ranks with, killed at random."""
    chooser = random.Random(7)
    run, log = TinyRun(tmp_path, store), tmp_path / "log"
    with started(ONE_NODE, run, log, {"N": "2"}) as process:
        run.wait_for_update(1, log.read_text)
        ranks = run.ranks()
        assert len(ranks) == 2, log.read_text()
        if _can_bind():
            assert not set(ranks[0].cpu_affinity()) & set(ranks[1].cpu_affinity())
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 85, log.read_text()
        assert not alive(ranks)
    assert run.checkpoints() == [run.update()] and run.update() < run.updates
    run = TinyRun(tmp_path, store, save_every=20)
    for kill in range(2):
        with started(ONE_NODE, run, log, {"N": "2"}) as process:
            run.wait_for_update(run.update() + 1, log.read_text)
            time.sleep(chooser.uniform(0, 0.1))
            ranks = run.ranks()
            assert len(ranks) == 2, log.read_text()
            node = psutil.Process(ranks[0].ppid())
            victim = node if kill % 2 else node.parent()
            assert victim is not None and victim.pid != process.pid
            victim.kill()
            assert process.wait(PATIENCE) not in (0, 85), log.read_text()
            assert not alive(ranks)
    assert finish(ONE_NODE, run, log, {"N": "2"}) == 0, log.read_text()
    assert run.lines() == plain.lines()


def _can_bind() -> bool:
    cores = psutil.cpu_count(logical=False) or 1
    allowed = ["numactl", "--cpunodebind=0", "--membind=0", "true"]
    return bool(shutil.which("numactl")) and cores >= 2 and subprocess.run(allowed, capture_output=True).returncode == 0
