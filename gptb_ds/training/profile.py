"""The profile of a run (`--profile`): a table of where its time went, and a trace of a few windows."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path

import torch
from torch.profiler import profile, record_function

from gptb_ds import phases
from gptb_ds.atomic_files import replace_file
from gptb_ds.distributed.collectives import COMMUNICATION, WAITS, CollectiveMeter
from gptb_ds.distributed.world import World

# The first windows load libraries, capture graphs, compile.
_WARM_UP, _TRACED = 3, 3
START, SET_UP, TRACED = "start of Python, imports", "set-up", "windows that were traced"
_ORDER = (
    *(START, SET_UP, "data", "forward", "backward", "optimizer", COMMUNICATION, WAITS),
    *("evaluation", "samples", "checkpoint", "logging", TRACED, phases.OTHER),
)


class Profile:
    """Measures this rank from its process's start to `finish`. Every rank must have one, or none.

    What is measured is a little slower than the run without: each phase waits for its kernels, and all ranks meet
    before each collective, so that waiting for the last of them is told from sending. Numbers are the same.
    """

    def __init__(self, folder: Path, world: World, started: float) -> None:
        """`started`, by time.monotonic(): when the command began to work, after its imports."""
        self.table_file, self.trace_file = folder / "table.json", folder / "trace.json.gz"
        self._world = world
        working = time.monotonic() - started
        age = _process_age(working)
        self._began = time.perf_counter() - age
        self._clock = phases.PhaseClock(self._settle)
        self._clock.charge(START, age - working)
        self._clock.charge(SET_UP, working)
        self._clock.charge_all_to(SET_UP)
        self._meter = CollectiveMeter(world).install()
        self._windows = 0
        self._trace: profile | None = None
        phases.use(self._clock)

    def loop_begins(self) -> None:
        """The set-up is over."""
        self._measure()

    def window_begins(self) -> None:
        """To be called before each window: some are traced on rank 0.

        Traced windows have a row of the table in common, because the trace slows them down.
        """
        self._windows += 1
        if self._windows == _WARM_UP + 1:
            self._clock.charge_all_to(TRACED, record_function)
            self._meter.timed = False
            if self._world.rank == 0:
                self._trace = profile()
                self._trace.start()
        elif self._windows == _WARM_UP + _TRACED + 1:
            self._end_trace()
            self._measure()

    def finish(self) -> str:
        """Writes the table and the trace, and returns the table as text. Every rank must call it."""
        self._end_trace()
        self._clock.close()
        wall = time.perf_counter() - self._began
        phases.use(None)
        self._meter.remove()
        here, everywhere = self._clock.seconds, self._world.all_gather(self._clock.seconds)
        names = [name for name in _ORDER if any(name in seconds for seconds in everywhere)]
        rows = {
            name: {"seconds": here.get(name, 0.0), "most": max(seconds.get(name, 0.0) for seconds in everywhere)}
            for name in names
        }
        if self._world.rank == 0:
            calls = {name: vars(tally) for name, tally in sorted(self._meter.tallies.items())}
            content = {"wall": wall, "windows": self._windows, "rows": rows, "collectives": calls}
            self.table_file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.table_file, json.dumps(content, indent=1).encode())
        return _text(rows, wall)

    def _measure(self) -> None:
        self._clock.charge_all_to(None)
        self._meter.timed = True

    def _settle(self) -> None:
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)

    def _end_trace(self) -> None:
        if self._trace is not None:
            self._settle()
            self._trace.stop()
            self.trace_file.parent.mkdir(parents=True, exist_ok=True)
            self._trace.export_chrome_trace(str(self.trace_file))
            self._trace = None


def _text(rows: dict[str, dict[str, float]], wall: float) -> str:
    """The table: seconds of rank 0, their share, and the most that any rank took."""
    lines = [f"{'where the time went':<28}{'seconds':>10}{'share':>8}{'most of a rank':>16}"]
    for name, row in rows.items():
        lines.append(f"{name:<28}{row['seconds']:>10.2f}{row['seconds'] / wall:>8.1%}{row['most']:>16.2f}")
    total = sum(row["seconds"] for row in rows.values())
    lines.append(f"{'sum':<28}{total:>10.2f}{total / wall:>8.1%}")
    lines.append(f"{'by the clock':<28}{wall:>10.2f}")
    return "\n".join(lines)


def _process_age(at_least: float) -> float:
    """Seconds since this process was started."""
    with suppress(OSError, ValueError, AttributeError):  # no Linux
        started = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        return max(at_least, time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK"))
    return at_least
