"""The metric sinks beside `metrics.jsonl`: TensorBoard, CSV and W&B, each the same values in another form.

`metrics.jsonl` is the truth, and a sink follows it: when training begins, a sink is brought to hold exactly the lines
that are there (a killed run has written lines that are cut; a sink may have lost some), and then each new line.
"""

from __future__ import annotations

import csv
import io
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from gptb_ds.atomic_files import replace_file
from gptb_ds.config import ConfigError
from gptb_ds.distributed.watchdog import progress_made
from gptb_ds.state_health import DISTANCES
from gptb_ds.training.metrics import AppendedFile, Metrics

if TYPE_CHECKING:
    import wandb

# What of a metrics line goes to a sink, and under which name.
NAMES = {
    "loss": "Train/loss",
    "grad_norm": "Train/grad_norm",
    "lr": "Train/lr",
    "eval_loss": "Eval/loss",
    "eval_bits_per_byte": "Eval/bits_per_byte",
    "state_norm": "State/norm",
    "state_worth": "State/worth",
    "state_swapped": "State/swapped",
    "state_lyapunov": "State/lyapunov",
    "state_spread": "State/spread",
} | {f"state_gradient_{d}": f"State/gradient_{d}" for d in DISTANCES}

# Seconds that a run waits for W&B's server at its start and at its end: well below the time after which the other ranks
# would call the job hung. What was not sent by then is on the disk, for `wandb sync`.
_PATIENCE = 60.0
# Their folders in the run's, all of those that there are.
FOLDERS = ("tensorboard", "csv", "wandb")


def values_of(line: Metrics) -> dict[str, float]:
    """A metrics line's values by their names in a sink. What is null there is left out."""
    return {NAMES[key]: value for key, value in line.items() if key in NAMES and value is not None}


class Sink(Protocol):
    """Where metrics go: first it follows, then lines are added. It may raise anything: the reporter goes on."""

    def follow(self, lines: Sequence[Metrics]) -> None:
        """Makes the sink hold exactly these lines, whatever it held."""

    def write(self, line: Metrics) -> None:
        """Adds a line."""

    def close(self) -> None:
        """No line comes after this."""


def open_sinks(names: Sequence[str], run_folder: Path) -> dict[str, Sink]:
    """The sinks of `run.monitor` by name. Nothing is on the disk before one of them follows."""
    makers: dict[str, Callable[[Path], Sink]] = {
        "tensorboard": TensorBoardSink,
        "csv": CsvSink,
        "wandb": WandbSink,
    }
    return {name: makers[name](run_folder) for name in names}


def check_sinks(names: Sequence[str]) -> None:
    """Raises ConfigError, one line, for a sink that can't be used here."""
    if "wandb" not in names:
        return
    try:
        import wandb
    except ImportError:
        raise ConfigError(
            "run.monitor wandb: the package wandb is not installed; pip install wandb, or leave it out"
        ) from None
    remedy = "run `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline to keep the run's data in its folder"
    try:
        # Not verified with the server: a network that is down when a job is requeued must not refuse it.
        usable = wandb.setup().settings.mode != "online" or wandb.login(prompt=False, verify=False)
    except Exception as error:  # of several kinds; all are about the key or the settings
        raise ConfigError(f"run.monitor wandb: {' '.join(str(error).split())}; {remedy}") from None
    if not usable:
        raise ConfigError(f"run.monitor wandb: no API key; {remedy}")


class CsvSink:
    """RUN/csv/NAME/Train_loss.csv and so on: `step,loss`, a row an update, as DeepSpeed's monitor lays them out."""

    def __init__(self, run_folder: Path) -> None:
        self.folder = run_folder / "csv" / run_folder.name
        self._files: dict[str, AppendedFile] = {}

    def follow(self, lines: Sequence[Metrics]) -> None:
        self.close()
        _only_folder(self.folder)
        rows: dict[str, list[bytes]] = {name: [] for name in NAMES.values()}
        for line in lines:
            for name, value in values_of(line).items():
                rows[name].append(_row(line["update"], value))
        for name, content in rows.items():
            if content:
                replace_file(self._path(name), b"".join([_header(name), *content]))
            else:
                self._path(name).unlink(missing_ok=True)

    def write(self, line: Metrics) -> None:
        failures = []
        for name, value in values_of(line).items():
            content = _row(line["update"], value)
            if name not in self._files:
                self._files[name] = AppendedFile(self._path(name))
                content = content if self._path(name).exists() else _header(name) + content
            try:
                self._files[name].write(content)
            except OSError as error:  # the others must have their row all the same
                failures.append(error)
        if failures:
            raise failures[0]

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name.replace('/', '_')}.csv"


def _only_folder(folder: Path) -> None:
    """Makes it, and removes the others beside it: those of a run that was renamed, or copied under another name."""
    folder.mkdir(parents=True, exist_ok=True)
    for other in folder.parent.iterdir():
        if other != folder and other.is_dir():
            shutil.rmtree(other)


def _header(name: str) -> bytes:
    return _row("step", name.split("/")[1])


def _row(*values: object) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerow(values)
    return text.getvalue().encode()


class TensorBoardSink:
    """RUN/tensorboard/NAME/events.out.tfevents.*: one file, through the record writer of the package tensorboard.

    Not through its SummaryWriter, which writes in a thread of its own: a full disk ends that thread with a traceback on
    standard error, and what was in its queue is lost. This way an error comes where the line is written, and the line
    is kept until the disk takes it (see `AppendedFile`).
    """

    def __init__(self, run_folder: Path) -> None:
        self.folder = run_folder / "tensorboard" / run_folder.name
        self._file: AppendedFile | None = None

    def follow(self, lines: Sequence[Metrics]) -> None:
        """Writes all lines to a new file, each with the time that it has in the old ones, and removes those."""
        self.close()
        old = sorted(path for path in self.folder.parent.rglob("*tfevents*") if path.is_file())
        times = {(tag, step): seconds for path in old for tag, step, seconds in _events_in(path)}
        self.folder.mkdir(parents=True, exist_ok=True)
        new = self.folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        content = io.BytesIO()
        _write_event(content, time.time(), file_version="brain.Event:2")
        for line in lines:
            for name, value in values_of(line).items():
                seconds = times.get((name, line["update"]), time.time())
                _write_event(content, seconds, line["update"], name, value)
            progress_made("bringing TensorBoard up to date")
        replace_file(new, content.getvalue())
        for path in old:
            path.unlink()
        _only_folder(self.folder)
        self._file = AppendedFile(new)

    def write(self, line: Metrics) -> None:
        assert self._file is not None, "first it follows"
        content = io.BytesIO()
        for name, value in values_of(line).items():
            _write_event(content, time.time(), line["update"], name, value)
        self._file.write(content.getvalue())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None


def _write_event(
    file: io.BytesIO,
    seconds: float,
    step: int = 0,
    tag: str | None = None,
    value: float = 0.0,
    file_version: str | None = None,
) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    event = Event(wall_time=seconds, step=step, file_version=file_version)
    if tag is not None:
        event.summary.CopyFrom(Summary(value=[Summary.Value(tag=tag, simple_value=value)]))
    RecordWriter(file).write(event.SerializeToString())


def _events_in(path: Path) -> Iterator[tuple[str, int, float]]:
    """Tag, step and time of each value in an event file, up to where a killed run has torn it."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    try:
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                yield value.tag, event.step, event.wall_time
    except Exception:  # whatever is wrong with it: only times are lost
        return


class WandbSink:
    """A W&B run of the project gptb-ds, in the group NAME; its files are in RUN/wandb.

    W&B takes back no row, and drops those of a step that it has passed. So one W&B run is continued only where it was
    closed at exactly the line at which `metrics.jsonl` now ends. Else a new one begins, filled from `metrics.jsonl`,
    and the files of the old one go. Rows have the update as their step.
    """

    def __init__(self, run_folder: Path) -> None:
        self.folder, self._group = run_folder, run_folder.name
        self._place = run_folder / "wandb" / "gptb-ds.json"
        self._run: wandb.Run | None = None
        self._id, self._lines = "", 0

    def follow(self, lines: Sequence[Metrics]) -> None:
        self.close()
        left = self._left_by_the_last_start()
        known = left.get("id")
        continues = left.get("lines") == len(lines) and isinstance(known, str)
        self._id = str(known) if continues else secrets.token_hex(4)
        if not continues and (self.folder / "wandb").exists():
            shutil.rmtree(self.folder / "wandb")
        self._start()
        self._lines = len(lines)
        if not continues:
            for line in lines:
                self._log(line)

    def write(self, line: Metrics) -> None:
        self._log(line)
        self._lines += 1

    def close(self) -> None:
        if self._run is None:
            return
        self._run.finish()
        self._run = None
        replace_file(self._place, json.dumps({"id": self._id, "lines": self._lines}).encode())

    def _start(self) -> None:
        import wandb

        (self.folder / "wandb").mkdir(parents=True, exist_ok=True)
        self._place.unlink(missing_ok=True)  # until it is closed, nobody knows what it has
        self._run = wandb.init(
            project="gptb-ds",
            group=self._group,
            dir=str(self.folder),
            id=self._id,
            resume="allow",
            settings=wandb.Settings(
                console="off", init_timeout=_PATIENCE, finish_timeout=_PATIENCE, finish_timeout_raises=True
            ),
        )

    def _log(self, line: Metrics) -> None:
        values = values_of(line)
        if values:
            assert self._run is not None, "it is there from `follow` to `close`"
            self._run.log(values, step=line["update"])
        progress_made(f"W&B, update {line['update']}")

    def _left_by_the_last_start(self) -> dict[str, object]:
        try:
            left = json.loads(self._place.read_bytes())
        except (OSError, ValueError):
            return {}
        return left if isinstance(left, dict) else {}
