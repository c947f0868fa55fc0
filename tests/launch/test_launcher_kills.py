"""A launcher killed at any instant costs no update and doubles none."""

from __future__ import annotations

import random
import time
from pathlib import Path

import psutil
import pytest

from tests.harness.launched import LAUNCH, PATIENCE, TinyRun, alive, finish, started

pytestmark = pytest.mark.slow
ONE_NODE = ["bash", str(LAUNCH / "one_node.sh")]


def test_killed_launchers_change_nothing(store: Path, tmp_path: Path) -> None:
    """The runner, and the process that it starts the ranks with, killed at random; the same command each time."""
    chooser = random.Random(7)
    straight = TinyRun(tmp_path / "straight", store, updates=300, save_every=20)
    log = tmp_path / "log"
    assert finish(ONE_NODE, straight, log, {"N": "2"}) == 0, log.read_text()
    run = TinyRun(tmp_path / "killed", store, updates=300, save_every=20)
    for kill in range(2):
        with started(ONE_NODE, run, log, {"N": "2"}) as process:
            run.wait_for_update(run.update() + 1, log.read_text)
            time.sleep(chooser.uniform(0, 0.5))
            ranks = run.ranks()
            assert len(ranks) == 2, log.read_text()
            node = psutil.Process(ranks[0].ppid())
            victim = node if kill % 2 else node.parent()
            assert victim is not None and victim.pid != process.pid
            victim.kill()
            assert process.wait(PATIENCE) not in (0, 85), log.read_text()
            assert not alive(ranks)
    assert finish(ONE_NODE, run, log, {"N": "2"}) == 0, log.read_text()
    assert run.lines() == straight.lines()
