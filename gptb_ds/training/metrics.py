"""What a run reports: `metrics.jsonl`, the progress line and DeepSpeed's monitor."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gptb_ds.atomic_files import replace_file

# What a metrics line says about speed: everything else is reproducible to the last digit on the same ranks.
SPEEDS = frozenset({"tokens_per_second", "wait_fraction"})
_BAR = "{n_fmt}/{total_fmt} [{remaining}]{postfix}"  # a bar of blocks would leave no room in 80 columns


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, appended as it happens. Only rank 0 has one.

    Lines that the disk does not take are kept and written before the next ones: none is lost while the process lives.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: FileIO | None = None
        self._unwritten = b""

    @property
    def keeps(self) -> bool:
        """Whether there are lines that the disk did not take."""
        return bool(self._unwritten)

    def cut_after(self, update: int, evaluated: bool = True) -> None:
        """Drops the lines of later updates: training goes on from there and will write them again.

        Not `evaluated`: this update's evaluation as well.
        """
        kept: list[str] = []
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
                # A killed run may leave half a line at the end.
                if not line.endswith("\n"):
                    break
                values = _parse(line, self.path, len(kept) + 1)
                if values["update"] < update or (values["update"] == update and (evaluated or "loss" in values)):
                    kept.append(line)
        self.close()
        replace_file(self.path, "".join(kept).encode())

    def write(self, line: dict[str, Any]) -> None:
        """Raises OSError, which names the file, when the disk does not take it."""
        # NaN is not JSON: a loss that is not finite is null.
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self._unwritten += json.dumps(clean).encode() + b"\n"
        self._flush()

    def sync(self) -> None:
        """Puts every line on the disk: done before a checkpoint claims that they are there. Raises as `write`."""
        os.fsync(self._flush().fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def _flush(self) -> FileIO:
        try:
            if self._file is None:
                self._file = FileIO(self.path, "a")
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        return self._file


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; half a line at the end is left out. Raises ValueError naming a broken line."""
    lines = []
    text = path.read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        lines.append(_parse(line, path, number))
    return lines


def _parse(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}:{number}: not a JSON line: {error}; remove the line") from None


class Progress:
    """The line a person watches: a bar on a terminal, plain lines otherwise."""

    def __init__(self, updates: int, done: int, log_every: int, write: Callable[[str], None] | None = None) -> None:
        self._updates, self._log_every, self._first, self._started = updates, log_every, done, time.monotonic()
        self._bar: tqdm | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=updates, initial=done, dynamic_ncols=True, smoothing=0.05, bar_format=_BAR)
        self._write = write or (lambda text: print(text, flush=True))

    def restart(self) -> None:
        """Time counts from now: what came before was no update."""
        self._started = time.monotonic()
        if self._bar is not None:
            self._bar.unpause()

    def update(self, line: dict[str, Any], bits_per_byte: float) -> None:
        parts = [f"loss {line['loss']:.4f}", f"bpb {bits_per_byte:.3f}", f"grad {line['grad_norm']:.3f}"]
        parts += [f"lr {line['lr']:.2e}", f"{line['tokens_per_second']:,.0f} tok/s"]
        if self._bar is not None:
            self._bar.set_postfix_str(" ".join(parts), refresh=False)
            self._bar.update(line["update"] - self._bar.n)
        elif line["update"] % self._log_every == 0 or line["update"] in (1, self._updates):
            rate = (time.monotonic() - self._started) / (line["update"] - self._first)
            eta = _duration(rate * (self._updates - line["update"]))
            self._write(" | ".join([f"update {line['update']}/{self._updates}", *parts, f"ETA {eta}"]))

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            self._write(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
