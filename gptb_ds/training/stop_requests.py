"""Requests to stop: signals, a stop file, a wall-clock limit, the end of the Slurm job."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from gptb_ds.distributed.slurm import slurm_end

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopRequests:
    """Notes requests to stop; the training loop asks for them at each update's edge.

    A signal to any one rank counts (the ranks agree on it); files and clocks are looked at by the rank that `watches`.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._deadline: float | None = None
        self._stop_file: Path | None = None
        self._next_look = 0.0
        self._old: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> StopRequests:
        for number in SIGNALS:
            self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def ignore_more(self) -> None:
        """Ignores signals from now on.

        Schedulers repeat themselves: Slurm sends SIGTERM again half a minute after the first. This process has its
        checkpoint and is ending with exit code 85, which has it requeued. With Python's own handlers back in place, a
        second signal would end it with another code, and the run would not be requeued.
        """
        for number in SIGNALS:
            self._old[number] = signal.SIG_IGN
            signal.signal(number, signal.SIG_IGN)

    def watch(self, stop_file: Path | None, max_seconds: float | None, started: float, margin: float) -> None:
        """Also stop when `stop_file` appears, `max_seconds` after `started`, or `margin` seconds before Slurm's end.

        `started` is in the units of `time.monotonic()`, which nobody sets: the time of day may be put back an hour, and
        a request would not be heard for as long.
        """
        limits = [started + max_seconds] if max_seconds else []
        end = slurm_end(os.environ)
        if end is not None:
            limits.append(time.monotonic() + (end - time.time()) - margin)
        self._deadline = min(limits, default=None)
        self._stop_file = stop_file

    def pending(self) -> bool:
        """Whether this rank knows of a request. Files are looked at once a second."""
        now = time.monotonic()
        if self.reason is None and self._deadline is not None and now >= self._deadline:
            self.reason = "the time limit is near"
        if self.reason is None and self._stop_file is not None and now >= self._next_look:
            self._next_look = now + 1.0
            if self._stop_file.exists():
                self.reason = f"{self._stop_file} exists"
        return self.reason is not None

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason is not None:
            raise KeyboardInterrupt  # a second Ctrl-C means now
        self.reason = f"received {signal.Signals(number).name}"
