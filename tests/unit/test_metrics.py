"""metrics.jsonl keeps every line and is cut where training goes on; the progress line can be read."""

from __future__ import annotations

import io
import math
import resource
import sys
from pathlib import Path

import pytest

from gptb_ds.training.metrics import MetricsLog, Progress, read_metrics


def test_metrics_are_cut_where_training_goes_on(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for update in (1, 2, 3):
        log.write({"update": update, "loss": float("nan") if update == 2 else 0.5})
    log.close()
    with path.open("a") as file:
        file.write('{"update": 4, "lo')  # what a kill leaves
    assert [line["update"] for line in read_metrics(path)] == [1, 2, 3]
    assert read_metrics(path)[1]["loss"] is None  # NaN is not JSON
    log = MetricsLog(path)
    log.cut_after(2)
    log.write({"update": 3, "loss": 0.25})
    log.close()
    assert [(line["update"], line["loss"]) for line in read_metrics(path)] == [(1, 0.5), (2, None), (3, 0.25)]
    path.write_text('{"update": 1}\nnonsense\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: not a JSON line"):
        read_metrics(path)


def test_progress_is_plain_lines_off_a_terminal():
    said: list[str] = []
    progress = Progress(20, 0, log_every=5, write=said.append)
    for update in range(1, 21):
        line = {"update": update, "loss": 2.0, "grad_norm": 0.5, "lr": 1e-3, "tokens_per_second": 1234.5}
        progress.update(line, 2.0 / math.log(2))
    assert [text.split()[1] for text in said] == ["1/20", "5/20", "10/20", "15/20", "20/20"]
    assert "loss 2.0000 | bpb 2.885 | grad 0.500 | lr 1.00e-03 | 1,234 tok/s | ETA 0:00" in said[-1]


def test_progress_fits_a_terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    progress = Progress(20_000, 9_000, log_every=5)
    line = {"update": 9_001, "loss": 12.3456, "grad_norm": 10.125, "lr": 1e-3, "tokens_per_second": 12345.6}
    progress.update(line, 12.25)
    progress.close()
    assert "bpb 12.250 grad 10.125 lr 1.00e-03 12,346 tok/s" in terminal.getvalue()


def test_lines_that_the_disk_does_not_take_are_kept(tmp_path: Path):
    """A limit on the size of files, as a full disk would be."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50, before[1]))
        log.write({"update": 1, "loss": 0.5})
        for update in (2, 3):
            with pytest.raises(OSError, match=r"File too large: .*metrics.jsonl"):
                log.write({"update": update, "loss": 0.5})
        with pytest.raises(OSError, match=r"metrics.jsonl"):
            log.sync()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    log.sync()
    assert [line["update"] for line in read_metrics(log.path)] == [1, 2, 3]
