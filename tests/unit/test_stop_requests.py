"""Signals, files and clocks are requests to stop."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from gptb_ds.training.stop_requests import SIGNALS, StopRequests


def test_signals_are_noted_and_handlers_put_back():
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    before = handlers[signal.SIGUSR1]
    with StopRequests() as stop:
        assert not stop.pending()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.pending() and stop.reason == "received SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) == before
    try:
        with StopRequests() as stop:
            stop.ignore_more()
            os.kill(os.getpid(), signal.SIGUSR1)
            assert not stop.pending()
        os.kill(os.getpid(), signal.SIGUSR1)  # the process goes out: nothing ends it but itself
    finally:
        for number in SIGNALS:
            signal.signal(number, handlers[number])


def test_clocks_and_files_stop_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with StopRequests() as stop:
        stop.watch(tmp_path / "stop", 100, time.monotonic() - 101, margin=0)
        assert stop.pending() and "time limit" in str(stop.reason)
    with StopRequests() as stop:
        stop.watch(tmp_path / "stop", None, time.monotonic(), margin=0)
        (tmp_path / "stop").touch()
        assert stop.pending() and "exists" in str(stop.reason)
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 60))
    with StopRequests() as stop:
        stop.watch(None, None, time.monotonic(), margin=30)
        assert not stop.pending()
        stop.watch(None, None, time.monotonic(), margin=61)
        assert stop.pending()


def test_a_request_is_heard_when_the_clock_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with StopRequests() as stop:
        stop.watch(tmp_path / "stop", 3600, time.monotonic() - 3599.9, margin=0)
        stop.pending()
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() - 3600)
        time.sleep(0.2)
        assert stop.pending() and "time limit" in str(stop.reason)
    with StopRequests() as stop:
        stop.watch(tmp_path / "stop", None, time.monotonic(), margin=0)
        assert not stop.pending()
        monkeypatch.setattr(time, "time", lambda: real() - 7200)
        (tmp_path / "stop").touch()
        while not stop.pending():  # it looks once a second
            time.sleep(0.05)
        assert "exists" in str(stop.reason)
