"""What the ranks tell one another rides in messages that there are anyway: none more for an update or a window."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import faults
from tests.harness.training import train


@pytest.mark.slow
def test_neither_updates_nor_windows_of_an_evaluation_cost_a_message_of_their_own(store: Path, tmp_path: Path):
    said = {}
    for updates, eval_tokens in ((3, 50), (9, 2000)):
        run = tmp_path / f"run-{updates}"
        over = {"train__updates": updates, "run__eval_tokens": eval_tokens, "run__save_every": 0, "run__eval_every": 0}
        job = train(run, store, ranks=2, fault=faults.says_small_exchanges, **over)
        said[updates] = job.text(1).count("small exchange")
    assert said[3] == said[9] > 0
