"""The training loop: next window, update, report, evaluate, save, stop.

Axes: B lanes of this rank or group, K steps, S slots, E embedding.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import cast

import torch
from transformers import PreTrainedTokenizerBase

from gptb_ds.checkpoint.reader import CheckpointReader
from gptb_ds.checkpoint.writer import SaveError
from gptb_ds.data.collator import LaneCollator
from gptb_ds.distributed.watchdog import progress_made
from gptb_ds.distributed.world import AnyRank, World, derive_seed
from gptb_ds.evaluation import HeldOut, LossSum, metrics_of
from gptb_ds.model.decoder import AnyGPTB
from gptb_ds.phases import phase
from gptb_ds.state_health import StateHealth
from gptb_ds.training.checkpointer import Checkpointer
from gptb_ds.training.engine import Engine, UpdateResult
from gptb_ds.training.length_curriculum import is_due, note_growth
from gptb_ds.training.metrics import Metrics
from gptb_ds.training.profile import Profile
from gptb_ds.training.reporter import Reporter
from gptb_ds.training.samples import sample_document
from gptb_ds.training.snapshots import Snapshots
from gptb_ds.training.stop_requests import StopRequests
from gptb_ds.training.train_state import RunFacts
from gptb_ds.training.updates import Update, WindowUpdates
from gptb_ds.training.usage import Usage


class TrainingError(RuntimeError):
    """Training can't go on; the message says why and where the last good checkpoint is."""


class MetricsError(SaveError):
    """The metrics can't be written. Rank 0 alone, which writes them, raises it: the others lose contact."""


@dataclass(frozen=True)
class RunData:
    """What a run reads: its training windows, what is held out (None: nothing is), and the tokenizer of both.

    `health` reads held-out text, too; None: the model has no state, or nobody asked.
    """

    windows: LaneCollator
    held_out: HeldOut | None
    tokenizer: PreTrainedTokenizerBase
    health: StateHealth | None = None


class Trainer:
    """One rank's training run. Every rank runs the same loop and reaches every exchange."""

    def __init__(
        self,
        facts: RunFacts,
        data: RunData,
        engine: Engine,
        checkpointer: Checkpointer,
        reporter: Reporter,
        stop: StopRequests,
        usage: Usage | None = None,
        profile: Profile | None = None,
    ) -> None:
        self.facts, self.data, self.engine = facts, data, engine
        self.checkpointer, self.reporter, self.stop = checkpointer, reporter, stop
        self.usage, self.profile = usage, profile
        self.updates = WindowUpdates(facts, engine)
        self.snapshots = Snapshots(facts, engine, data.windows)
        self.state = self.updates.start()
        self._world: World = engine.world
        self._save_due = False
        # What the last exchange said: some rank was asked to stop; some rank still writes a checkpoint.
        self._stop_heard, self._writing = False, False
        torch.manual_seed(derive_seed(facts.train.seed, "dropout", self._world.rank))

    def restore(self, reader: CheckpointReader) -> None:
        """Continues from a checkpoint. Raises CheckpointError on all ranks as `Checkpointer.restore` does."""
        self.state, state_BSE = self.checkpointer.restore(reader, self.updates.state_BSE.shape)
        self.updates.restore(self.state, state_BSE)

    def loop(self) -> str | None:
        """Trains until the last update, or until a request to stop: its reason is returned, a checkpoint written.

        Raises TrainingError after too many updates in a row that were not finite, and when the last checkpoint can't be
        written; SaveError when another one can't be, or the metrics, and `run.on_save_error` is "stop".
        """
        end, run = self.updates.end, self.facts.run
        self.reporter.start(self.state.update, self.updates.last_update)
        if self.profile is not None:
            self.profile.loop_begins()
        reason = None
        if self.state.evaluation_due or (self.state.update == 0 and run.eval_every):
            self._evaluate()
            self.reporter.restart(self.state.update)
            if self.state.evaluation_due:  # broken off (again): no update comes before it
                reason = self._stop_reason()
        if run.snapshot_every:
            self.snapshots.take(self.state, self.updates.state_BSE, saved=True)
        while self.state.tokens < end and reason is None:
            before = self.state.update
            if self.profile is not None:
                self.profile.window_begins()
            results = self._train_window()
            if self.snapshots.loss_jumps(self.state, results) and self._went_back():
                continue
            self._check_not_lost()
            self.snapshots.follow_loss(self.state, results)
            self._grow_documents()
            if self._due(run.eval_every, before) or self.state.tokens >= end:
                self._evaluate()
            if self._due(run.sample_every, before) and not self.state.evaluation_due:
                self.reporter.say(f"sample after {self.state.update} updates: {self._sample()!r}")
            reason = self._save_and_check_stop(before)
        self._save_at_the_end()
        self.reporter.close()
        return None if self.state.tokens >= end and not self.state.evaluation_due else reason

    def _train_window(self) -> list[UpdateResult]:
        """The next window and its updates; afterwards the lanes' states and the counters stand at its edge."""
        results = []
        started, waited = time.perf_counter(), self.data.windows.wait_seconds
        with phase("data"):
            window = self.data.windows.next_window()
        waited = self.data.windows.wait_seconds - waited
        for update in self.updates.train(window, self.state, self._flags):
            stop, self._writing = update.result.flags
            self._stop_heard |= stop
            now = time.perf_counter()
            self._report(update, now - started, waited)
            started, waited = now, 0.0
            results.append(update.result)
        return results

    def _grow_documents(self) -> None:
        """At a window's edge: the curriculum's documents become longer when the answers are right."""
        windows, state = self.data.windows, self.state
        if windows.curriculum is None or windows.curriculum.is_full or not is_due(state, self.facts.grow_at):
            return
        windows.grow()
        note_growth(state, windows.column, self.facts.grow_at)
        self.reporter.say(f"update {state.update}: documents of up to {windows.curriculum.limit} tokens from here on")

    def _went_back(self) -> bool:
        """Returns to a snapshot after a window whose loss jumped; False, and nothing is done, where that is not wanted.

        The metrics of updates that are made again are cut, as at a resume, so that in the end they are those of a run
        that was told from the start which columns to skip.
        """
        run, jumped = self.facts.run, self.state.update
        if not run.snapshot_every:
            return False
        if len(self.state.rewinds) >= run.max_rewinds:
            self.reporter.say(
                f"WARNING: the loss jumped in update {jumped}; run.max_rewinds {run.max_rewinds} is reached"
            )
            return False
        self.state, state_BSE = self.snapshots.go_back(self.state)
        self.updates.restore(self.state, state_BSE)
        self._save_due = False
        try:
            self._world.on_rank0(self.reporter.follow, self.state.update)
        except (OSError, ValueError) as error:
            raise SaveError(f"{error}; {self.checkpointer.last_good()}") from None
        self.reporter.restart(self.state.update)
        window, reach = self.state.rewinds[-1]
        self.reporter.say(
            f"the loss jumped in update {jumped}: back to update {self.state.update}, to go on past window {window}"
            + (f" and the {reach} before and after it" if reach else "")
        )
        progress_made(f"going back to update {self.state.update}")
        return True

    def _report(self, update: Update, elapsed: float, waited: float) -> None:
        state, result = self.state, update.result
        line: Metrics = {
            "update": state.update,
            "tokens": state.tokens,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": update.lr,
            "tokens_per_second": update.tokens / elapsed,
            "wait_fraction": waited / elapsed,
        }
        if result.accuracy is not None:
            line["accuracy"] = result.accuracy
        if self.data.windows.curriculum is not None:
            line["document_tokens"] = self.data.windows.curriculum.limit
        if result.part_norm is not None:
            line["noise_scale"] = state.noise.tokens
        if update.left_out:
            line["rewound"] = True
        if result.skipped:
            line["skipped"] = True
            self.reporter.say(f"update {state.update} skipped: loss or gradient is not finite ({state.skipped} so far)")
        if self.usage is not None:
            line |= self.usage.metrics(line["tokens_per_second"])
        try:
            with phase("logging"):
                self.reporter.update(line)
        except OSError as error:
            raise MetricsError(f"{error}; {self.checkpointer.last_good()}") from None

    def _check_not_lost(self) -> None:
        """Raises TrainingError, at a window's edge, after too many updates in a row that were not finite."""
        if self.state.bad_in_row >= self.facts.train.max_bad_updates:
            self.checkpointer.finish()
            raise TrainingError(
                f"{self.state.bad_in_row} updates in a row were not finite (train.max_bad_updates);"
                f" {self.checkpointer.last_good()}. Lower optim.lr or optim.clip and run the command again"
            )

    def _evaluate(self) -> None:
        """Reads what is held out. Broken off by a request to stop, the evaluation stays due."""
        held_out, state = self.data.held_out, self.state
        if held_out is None:
            return
        losses, stop = LossSum(self._world), AnyRank(self._world)
        with phase("evaluation"), self.engine.evaluating():
            state_BSE = self.engine.model.empty_state(held_out.lanes // self._world.size)
            for window in held_out.windows():
                state_BSE = losses.add(self.engine.objective, window, state_BSE)
                progress_made(f"a window of the evaluation after update {state.update}")
                if stop.ask(self.stop.pending()):
                    state.evaluation_due = self._stop_heard = True
                    return
        state.evaluation_due = False
        loss, _ = losses.mean()
        line = {"update": state.update} | metrics_of(loss, held_out.bytes_per_target)
        if self.data.health is not None:
            with phase("evaluation"), self.engine.evaluating():
                line |= self.data.health.measure(self.engine.model)
        try:
            self.reporter.evaluation(line)
        except OSError as error:
            raise MetricsError(f"{error}; {self.checkpointer.last_good()}") from None
        progress_made(f"evaluation after update {state.update}")

    def _sample(self) -> str:
        """A text from the model as it is. All ranks take part: at stage 3 no rank has the weights alone."""
        seed, eot_id = derive_seed(self.facts.train.seed, "sample"), self.data.windows.corpus.eot_id
        with phase("samples"), self.engine.evaluating():
            # The configuration refuses samples from another model.
            model = cast(AnyGPTB, self.engine.model)
            return str(self.data.tokenizer.decode(sample_document(model, eot_id, self.facts.run.sample_tokens, seed)))

    def _flags(self) -> tuple[bool, bool]:
        """What this rank tells the others in each update: it was asked to stop; it still writes a checkpoint."""
        return self.stop.pending(), not self.checkpointer.written_here

    def _save_and_check_stop(self, before: int) -> str | None:
        """The end of a window that began after `before` updates: completes a save, saves, heeds requests to stop.

        Each step is an exchange that all ranks must reach, so all go by the flags that came with the last update, the
        same on every rank. A save is completed by all at the same update, as late as the slowest disk needs, and nobody
        waits for it; before the next begins, because the flags are of the one before. A due save begins before a stop,
        which then finds it begun and saves nothing twice. Who is the first to know a reason differs by rank, so it is
        asked for only when there is one.
        """
        if self.checkpointer.busy and not self._writing:
            self._finish_save()
        self._save_due |= self._due(self.facts.run.save_every, before)
        # Not amid updates that were skipped: it would push out the checkpoints from before them.
        if self._save_due and not self.state.bad_in_row:
            self._save_due = False
            self._save()
            self._take_snapshot(before, saved=True)
        else:
            self._take_snapshot(before, saved=False)
        return self._stop_reason() if self._stop_heard else None

    def _stop_reason(self) -> str:
        """What some rank was asked to stop for. All ranks must have heard that one was."""
        return next(reason for reason in self._world.all_gather(self.stop.reason) if reason)

    def _take_snapshot(self, before: int, saved: bool) -> None:
        every = self.facts.run.snapshot_every
        if every and (saved or self._due(every, before)) and not self.state.bad_in_row:
            self.snapshots.take(self.state, self.updates.state_BSE, saved=saved)

    def _save(self) -> None:
        self._finish_save()
        with phase("checkpoint"):
            self.checkpointer.begin(self.state, self.updates.state_BSE)

    def _finish_save(self) -> None:
        with phase("checkpoint"):
            self.checkpointer.finish()

    def _save_at_the_end(self) -> None:
        self._finish_save()
        if self.state.update > (self.checkpointer.saved or 0):
            self._save()
            self._finish_save()
            if self.checkpointer.saved != self.state.update:
                raise TrainingError(
                    f"stopped after update {self.state.update} without a checkpoint of it:"
                    f" {self.checkpointer.last_good()}"
                )

    def _due(self, every: int, before: int) -> bool:
        """Whether a multiple of `every` is among the updates of the last window, which began after `before`."""
        return every > 0 and self.state.update // every > before // every
