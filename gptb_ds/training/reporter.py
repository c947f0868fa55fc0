"""The reporter: what a run tells, through `metrics.jsonl`, the line that a person watches, and the metric sinks."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from gptb_ds.state_health import IGNORED_BELOW
from gptb_ds.training.metrics import Metrics, MetricsLog, Progress, finite
from gptb_ds.training.sinks import Sink, open_sinks
from gptb_ds.training.train_state import RunFacts


class Reporter:
    """Everything that a run reports. It `speaks` on rank 0; on the others the same calls do nothing.

    A sink that fails is named once, and never ends training. The metrics are another matter: they are part of the run,
    and `run.on_save_error` says what happens when the disk does not take them.
    """

    def __init__(self, facts: RunFacts, speaks: bool) -> None:
        self._facts, self._speaks = facts, speaks
        folder = Path(facts.run.dir)
        self._log = MetricsLog(folder / "metrics.jsonl")
        self._sinks: dict[str, Sink] = open_sinks(facts.run.monitor, folder) if speaks else {}
        self._failing: set[str] = set()
        self._progress: Progress | None = None
        self._nothing_counted = False
        self._last = 0  # update of the run
        self._ignored = 0  # evaluations in a row in which the state was worth nothing

    @property
    def metrics_file(self) -> Path:
        return self._log.path

    def say(self, text: str) -> None:
        """A line for a person."""
        if self._progress is not None:
            self._progress.say(text)
        elif self._speaks:
            print(text, flush=True)

    def follow(self, update: int, evaluated: bool = True) -> None:
        """Metrics and sinks end after this update, from where training goes on. See `MetricsLog.cut_after`.

        Changes files, and raises ValueError as `read_metrics` does.
        """
        if not self._speaks:
            return
        lines = self._log.cut_after(update, evaluated)
        for name, sink in self._sinks.items():
            self._to_sink(name, sink.follow, lines)
        # One that could not begin stays out until the next start, which brings it up to date: to try again at each
        # update would wait for a lost network each time, and leave holes.
        self._sinks = {name: sink for name, sink in self._sinks.items() if name not in self._failing}

    def start(self, update: int, last: int) -> None:
        """Training begins after `update` updates, of `last` in all: time counts from here."""
        self._last = last
        if self._speaks:
            self._progress = Progress(last, update, self._facts.run.log_every)

    def restart(self, update: int) -> None:
        """Time counts from now, after `update` updates: what came before was no update, or is made again."""
        if self._progress is not None:
            self._progress.restart(update)

    def update(self, line: Metrics) -> None:
        """An update's metrics. Raises OSError when the disk does not take them and `run.on_save_error` is "stop"."""
        if not self._speaks:
            return
        if line["loss"] is None and "rewound" not in line and not self._nothing_counted:
            self._nothing_counted = True
            self.say(
                f"WARNING: no target of update {line['update']} counts in the loss, which is null then; with so few"
                " that count, take more lanes or a longer window"
            )
        if self._progress is not None:
            self._progress.update(line, self.bits_per_byte(line["loss"]))
        self._add(line)

    def evaluation(self, line: Metrics) -> None:
        """An evaluation's metrics. Raises as `update`."""
        if not self._speaks:
            return
        loss, bits = line["eval_loss"], line["eval_bits_per_byte"]
        said = "no target that counts is held out" if loss is None else f"held-out loss {loss:.4f}"
        said += "" if bits is None else f", {bits:.3f} bits per byte"
        limit = self._facts.identity.get("data.max_document_tokens")
        self.say(f"update {line['update']}: {said}" + ("" if limit is None else f" (pieces of {limit:,} tokens)"))
        self._warn_of_the_state(line)
        self._add(line)

    def _warn_of_the_state(self, line: Metrics) -> None:
        """Said once, when two evaluations in a row find the state ignored, or the last one does."""
        worth = line.get("state_swapped")
        ignored = worth is not None and worth < IGNORED_BELOW and line["update"] > 0
        self._ignored = self._ignored + 1 if ignored else 0
        is_last = self._ignored == 1 and line["update"] == self._last
        if worth is not None and (self._ignored == 2 or is_last):
            self.say(
                f"WARNING: the state is being ignored: with another document's the held-out loss is {worth:.4f} nats a"
                " target higher, no more (docs/metrics.md, The state's health)"
            )

    def sync(self) -> None:
        """Puts the metrics on the disk. Raises OSError, naming the file, when it does not take them."""
        if self._speaks:
            self._log.sync()

    def close(self) -> None:
        """The last words are said."""
        for name, sink in self._sinks.items():
            self._to_sink(name, sink.close)
        self._log.close()
        if self._progress is not None:
            self._progress.close()
            self._progress = None

    def bits_per_byte(self, loss: float | None) -> float | None:
        """Nats per target as bits per byte of text. None: there is no loss, or the bytes are not known."""
        if loss is None or self._facts.bytes_per_target is None:
            return None
        return loss / math.log(2) / self._facts.bytes_per_target

    def _add(self, line: Metrics) -> None:
        for name, sink in self._sinks.items():
            self._to_sink(name, sink.write, finite(line))
        kept_before = self._log.has_unwritten_lines
        try:
            self._log.write(line)
        except OSError as error:
            if self._facts.run.on_save_error == "stop":
                raise
            if not kept_before:  # said once, not at every update
                self.say(f"WARNING: {error}; lines are kept in memory and training goes on")

    def _to_sink(self, name: str, method: Callable[..., None], *args: object) -> None:
        try:
            method(*args)
        except (Exception, SystemExit) as error:  # a library's errors have no common kind, and some would exit
            if name not in self._failing:
                self.say(f"WARNING: run.monitor {name}: {' '.join(str(error).split())}; training goes on")
            self._failing.add(name)
        else:
            self._failing.discard(name)
