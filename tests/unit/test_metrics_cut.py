"""Going back while the disk takes nothing more: lines in memory are cut like those in the file."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from gptb_ds.training.metrics import MetricsLog, read_metrics


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
