"""The detection of a job that hangs: who waits, who is missing, and an end to it."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from gptb_ds.distributed.heartbeat import Heartbeat
from gptb_ds.distributed.world import World
from gptb_ds.exit_codes import HUNG

# A collective's own time-out from when a watchdog watches: longer than anybody pauses a job.
_FOR_EVER = timedelta(days=60)


class _Progress:
    """What this process has done last, and how many things it has done."""

    stage = "start"
    count = 0


def progress_made(stage: str) -> None:
    """Tells this process's watchdog, if it has one, that `stage` is done.

    A function and no method: whoever does long work says so, down to the reading of a file, and nobody between him and
    the start has to hand a watchdog on. A process has at most one, because it ends the process.
    """
    _Progress.stage, _Progress.count = stage, _Progress.count + 1


@contextmanager
def long_work(stage: str, limit: float = 3600.0) -> Iterator[None]:
    """Inside, `stage` counts as progress for `limit` seconds: for what can't say so itself, such as a compiler."""
    ended = threading.Event()

    def renew() -> None:
        for _ in range(int(limit)):
            if ended.wait(1.0):
                return
            progress_made(stage)

    thread = threading.Thread(target=renew, name=stage, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        progress_made(stage)


class Watchdog:
    """Ends this rank when training makes no progress for `limit` seconds, and names the ranks that are missing.

    Each rank prints where its main thread stands; then all meet on a group of their own, and rank 0 names those that do
    not come (a stopped process, a dead host, a lost link). Backends differ in what they do on a time-out (NCCL aborts,
    gloo raises, some wait for ever): this does not depend on them.

    A job that is paused does not hang: stopped and continued (SIGSTOP, `scontrol suspend`), or asleep with its laptop.
    Only time in which the watchdog itself ran counts; in a pause it doesn't run either.
    """

    def __init__(self, world: World, limit: float, meeting_seconds: float = 10.0, lost_seconds: float = 30.0) -> None:
        """`limit` in seconds; every rank must build one, at the same place. `lost_seconds`: see `Heartbeat`."""
        self._world, self._limit, self._meeting = world, limit, timedelta(seconds=meeting_seconds)
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._lost_seconds = lost_seconds
        self._heartbeat: Heartbeat | None = None
        self._main = threading.main_thread().ident
        self._ended, self._ending = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> Watchdog:
        """From here on it alone decides that the job hangs: collectives wait as long as it takes.

        With the time-out that they were made with, which counts pauses too, a rank that waits in one when the job is
        paused would raise when it is continued. Every rank starts its own, at the same place.
        """
        if self._world.size > 1:
            self._heartbeat = Heartbeat(self._world, self._lost_seconds)
            for group in (None, self._world.control):
                dist.distributed_c10d._set_pg_timeout(_FOR_EVER, group)
        progress_made("start")
        self._thread.start()
        return self

    def stop(self) -> None:
        """Ends the watch. A watchdog that is ending this rank already is left to it: it knows best what is wrong.

        Its thread is gone afterwards: one that lets its group go while the process ends would crash it.
        """
        self._ended.set()
        self._thread.join()
        if self._heartbeat is not None:
            self._heartbeat.stop()

    def _watch(self) -> None:
        tick, waited, seen, before = min(1.0, self._limit / 4), 0.0, _Progress.count, time.monotonic()
        while not self._ended.wait(tick):
            now = time.monotonic()
            # A tick that took much longer than a tick: this process did not run meanwhile.
            waited, before = waited + min(now - before, 2 * tick), now
            if _Progress.count != seen:
                waited, seen = 0.0, _Progress.count
            if waited > self._limit:
                self._end()

    def _end(self) -> None:
        self._ending.set()
        if self._heartbeat is not None:
            self._heartbeat.hush()  # others that end for the same reason are no news
        me = f"[rank {self._world.rank} on {self._world.host}]"
        print(
            f"{me} no progress for {self._limit:.0f} s since {_Progress.stage}; waiting at {self._place()}",
            file=sys.stderr,
            flush=True,
        )
        if self._group is not None:
            # In a thread: gloo's barrier heeds the limit on rank 0 alone, and the others must end too.
            meeting = threading.Thread(target=self._meet, args=(me,), daemon=True)
            meeting.start()
            meeting.join(1.5 * self._meeting.total_seconds())
        os._exit(HUNG)

    def _meet(self, me: str) -> None:
        try:
            dist.monitored_barrier(self._group, timeout=self._meeting, wait_all_ranks=True)
        except Exception as error:  # it is the message that names the ranks, whatever the type
            text = str(error).splitlines()[0] if str(error) else repr(error)
            if self._world.rank == 0:
                print(f"{me} ranks that do not answer: {text}", file=sys.stderr, flush=True)
            else:
                print(f"{me} rank 0 does not answer, or a rank is missing: {text}", file=sys.stderr, flush=True)

    def _place(self) -> str:
        """The innermost line of ours that the main thread is in."""
        frame = sys._current_frames().get(self._main or 0)
        stack = traceback.extract_stack(frame) if frame else []
        ours = [f for f in stack if Path(f.filename).parent.parent.name == "gptb_ds"] or stack
        return f"{Path(ours[-1].filename).name}:{ours[-1].lineno} ({ours[-1].name})" if ours else "an unknown place"
