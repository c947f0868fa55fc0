"""Going back while the disk takes nothing more: lines in memory are cut like those in the file."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from gptb_ds.training.metrics import MetricsLog, Progress, read_metrics


def test_lines_that_the_disk_did_not_take_are_cut_too(tmp_path: Path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50, before[1]))
        log.write({"update": 1, "loss": 0.5})
        for update in (2, 3):  # half of the first is in the file
            with pytest.raises(OSError, match="File too large"):
                log.write({"update": update, "loss": 0.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [line["update"] for line in log.cut_after(2)] == [1, 2]
    log.write({"update": 3, "loss": 0.25})
    log.close()
    assert [(line["update"], line["loss"]) for line in read_metrics(log.path)] == [(1, 0.5), (2, 0.5), (3, 0.25)]


def test_the_time_that_is_left_is_told_after_going_back(monkeypatch: pytest.MonkeyPatch):
    """It takes a second an update; training goes back from update 80 to 40."""
    said: list[str] = []
    now = 1000.0
    monkeypatch.setattr("gptb_ds.training.metrics.time.monotonic", lambda: now)
    progress = Progress(100, 0, log_every=20, write=said.append)
    for update in [*range(1, 81), *range(41, 101)]:
        if update == 41 and said[-1].startswith("update 80"):
            progress.restart(40)
        now += 1.0
        line = {"update": update, "loss": 2.0, "grad_norm": 0.5, "lr": 1e-3, "tokens_per_second": 100.0}
        progress.update(line, None)
    told = {text.split()[1]: text.split()[-1] for text in said}
    assert told["60/100"] == "0:40" and told["80/100"] == "0:20"
