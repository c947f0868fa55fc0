"""What a run reports, in two of its forms: `metrics.jsonl`, and the line that a person watches."""

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

# One line of metrics.jsonl: `update`, and numbers by name (None: there is no such number after this update).
Metrics = dict[str, Any]
# What a metrics line says about speed: everything else is reproducible to the last digit on the same ranks.
SPEEDS = frozenset({"tokens_per_second", "wait_fraction", "mfu", "memory_gib"})
_BAR = "{n_fmt}/{total_fmt} [{remaining}]{postfix}"  # a bar of blocks would leave no room in 80 columns


class AppendedFile:
    """A file that grows at its end. Only rank 0 has such files.

    What the disk does not take is kept and written before what comes next: while the process lives nothing is lost, and
    nothing is torn by a write that got half through. A file that somebody removes is written anew, with all it held;
    without its folder writing raises.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: FileIO | None = None
        self._unwritten = b""

    @property
    def has_unwritten(self) -> bool:
        """Whether there is something that the disk did not take."""
        return bool(self._unwritten)

    def content(self) -> bytes:
        """All that was written, what the disk did not take included, and what was in a file that was removed."""
        return (self.path.read_bytes() if self.path.exists() else self._removed()) + self._unwritten

    def replace(self, content: bytes) -> None:
        """Goes on after this `content` instead. Raises OSError, and nothing has changed."""
        self.close()
        replace_file(self.path, content)
        self._unwritten = b""

    def write(self, content: bytes) -> None:
        """Raises OSError, which names the file, when the disk does not take it."""
        self._unwritten += content
        self._open_and_flush()

    def sync(self) -> None:
        """Puts everything on the disk. Raises as `write`."""
        os.fsync(self._open_and_flush().fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def _open_and_flush(self) -> FileIO:
        try:
            if self._file is not None and not self._is_in_place(self._file):
                self._put_back()
            if self._file is None:
                self._file = FileIO(self.path, "a+")
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        return self._file

    def _is_in_place(self, file: FileIO) -> bool:
        """Whether the path still names the open file: what is written to one that was removed is lost with it."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False

    def _put_back(self) -> None:
        """Writes anew what was in a file that was removed. One that another has replaced is gone on with."""
        if not self.path.exists():
            replace_file(self.path, self._removed())
        self.close()

    def _removed(self) -> bytes:
        """What the open file holds, which has no name any more."""
        if self._file is None:
            return b""
        self._file.seek(0)
        return self._file.readall()


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, appended as it happens."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = AppendedFile(path)

    @property
    def has_unwritten_lines(self) -> bool:
        """Whether there are lines that the disk did not take."""
        return self._file.has_unwritten

    def cut_after(self, update: int, evaluated: bool = True) -> list[Metrics]:
        """Drops the lines of later updates: training goes on from there and will write them again. Returns the rest.

        Not `evaluated`: this update's evaluation as well. Raises ValueError as `read_metrics` does, before any change.
        """
        lines = _parse_all(self._file.content(), self.path)
        kept = [
            line
            for line in lines
            if line["update"] < update or (line["update"] == update and (evaluated or "loss" in line))
        ]
        self._file.replace(b"".join(_line(values) for values in kept))
        return kept

    def write(self, values: Metrics) -> None:
        """Appends a line. Raises OSError, which names the file, when the disk does not take it."""
        self._file.write(_line(values))

    def sync(self) -> None:
        """Puts every line on the disk: done before a checkpoint claims that they are there. Raises as `write`."""
        self._file.sync()

    def close(self) -> None:
        self._file.close()


def finite(values: Metrics) -> Metrics:
    """The line as it is reported: NaN is not JSON, so a number that is not finite becomes null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _line(values: Metrics) -> bytes:
    return json.dumps(finite(values)).encode() + b"\n"


def read_metrics(path: Path) -> list[Metrics]:
    """The lines of a `metrics.jsonl`. A last line without an end, which a killed run may leave, is left out.

    Raises ValueError, one line that names the file and its line, when one is no JSON object with an `update`, or holds
    something else than numbers.
    """
    return _parse_all(path.read_bytes(), path)


def _parse_all(content: bytes, path: Path) -> list[Metrics]:
    *lines, _ = content.split(b"\n")
    return [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def _parse(line: bytes, place: str) -> Metrics:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not a JSON line: {error}; remove the line") from None
    if not isinstance(values, dict) or type(values.get("update")) is not int or values["update"] < 0:
        raise ValueError(f'{place}: not a line of metrics, an object with a whole number as "update"; remove the line')
    for name, value in values.items():
        if not isinstance(value, (int, float, type(None))):
            raise ValueError(f"{place}: {name!r} is {str(value)[:40]!r} and no number; remove the line")
    return values


class Progress:
    """The line a person watches: a bar on a terminal, plain lines otherwise."""

    def __init__(self, updates: int, done: int, log_every: int, write: Callable[[str], None] | None = None) -> None:
        self._updates, self._log_every, self._first, self._started = updates, log_every, done, time.monotonic()
        self._bar: tqdm | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=updates, initial=done, dynamic_ncols=True, smoothing=0.05, bar_format=_BAR)
        self._write = write or (lambda text: print(text, flush=True))

    def restart(self, update: int) -> None:
        """Time counts from now, after `update` updates: what came before was no update, or is made again."""
        self._first, self._started = update, time.monotonic()
        if self._bar is not None:
            self._bar.unpause()

    def update(self, line: Metrics, bits_per_byte: float | None) -> None:
        """`bits_per_byte` None: the text's bytes are not known. A loss of None: nothing was counted, or it is NaN."""
        loss = "-" if line["loss"] is None else f"{line['loss']:.4f}"
        parts = [f"loss {loss}"]
        if bits_per_byte is not None:
            parts.append(f"bpb {bits_per_byte:.3f}")
        parts += [f"grad {line['grad_norm']:.3f}", f"lr {line['lr']:.2e}", f"{line['tokens_per_second']:,.0f} tok/s"]
        parts += _usage(line)
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


def _usage(line: Metrics) -> list[str]:
    """What an update made of its hardware. A bar shows as much of it as there is room for."""
    parts = []
    if line.get("mfu") is not None:
        parts.append(f"mfu {line['mfu']:.1%}")
    if line.get("memory_gib") is not None:
        parts.append(f"{line['memory_gib']:.1f} GiB")
    if line.get("wait_fraction") is not None:
        parts.append(f"wait {line['wait_fraction']:.0%}")
    return parts


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
