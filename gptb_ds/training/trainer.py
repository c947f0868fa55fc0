"""The training loop: next window, update, report, evaluate, save, stop.

Axes: B lanes of this rank or group, K steps, S slots, E embedding.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from gptb_ds.checkpoint.reader import CheckpointReader
from gptb_ds.checkpoint.writer import SaveError
from gptb_ds.data.collator import LaneCollator
from gptb_ds.data.window import Window
from gptb_ds.distributed.watchdog import progress_made
from gptb_ds.distributed.world import World, derive_seed
from gptb_ds.evaluation import HeldOut, LossSum, metrics_of
from gptb_ds.generation import generate
from gptb_ds.training.checkpointer import Checkpointer
from gptb_ds.training.engine import Engine, UpdateResult
from gptb_ds.training.metrics import Metrics
from gptb_ds.training.reporter import Reporter
from gptb_ds.training.schedule import learning_rate
from gptb_ds.training.stop_requests import StopRequests
from gptb_ds.training.train_state import RunFacts, TrainState


class TrainingError(RuntimeError):
    """Training can't go on; the message says why and where the last good checkpoint is."""


@dataclass(frozen=True)
class RunData:
    """What a run reads: its training windows, what is held out (None: nothing is), and the tokenizer of both."""

    windows: LaneCollator
    held_out: HeldOut | None
    tokenizer: PreTrainedTokenizerBase


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
    ) -> None:
        self.facts, self.data, self.engine = facts, data, engine
        self.checkpointer, self.reporter, self.stop = checkpointer, reporter, stop
        self.state = TrainState()
        self._world: World = engine.world
        self._save_due = False
        self._lane_states: list[torch.Tensor] = []
        # Zeros: every lane starts with a reset, which replaces them. One tensor (B, S-1, E) for each lane group.
        self._set_lane_states(engine.model.empty_state(facts.lanes // self._world.size))
        torch.manual_seed(derive_seed(facts.train.seed, "dropout", self._world.rank))

    def restore(self, reader: CheckpointReader) -> None:
        """Continues from a checkpoint. Raises CheckpointError on all ranks as `Checkpointer.restore` does."""
        self.state, state_BSE = self.checkpointer.restore(reader, torch.cat(self._lane_states).shape)
        self._set_lane_states(state_BSE)

    def loop(self) -> str | None:
        """Trains until the last update, or until a request to stop: its reason is returned, a checkpoint written.

        Raises TrainingError after too many updates in a row that were not finite, and when the last checkpoint can't be
        written; SaveError when another one can't be, or the metrics, and `run.on_save_error` is "stop".
        """
        state, updates, run = self.state, self.facts.train.updates, self.facts.run
        self.reporter.start(state.update)
        reason = None
        if state.evaluation_due or (state.update == 0 and run.eval_every):
            self._evaluate()
            self.reporter.restart()
        while state.update < updates and reason is None:
            started, waited = time.perf_counter(), self.data.windows.wait_seconds
            window = self.data.windows.next_window()
            lr = learning_rate(state.update, self.facts.optim, updates)
            result = self._update(window, lr)
            elapsed = time.perf_counter() - started
            self._report(result, lr, elapsed, self.data.windows.wait_seconds - waited)
            if self._due(run.eval_every) or state.update == updates:
                self._evaluate()
            if self._due(run.sample_every) and not state.evaluation_due:
                self.reporter.say(f"sample after {state.update} updates: {self._sample()!r}")
            reason = self._save_and_check_stop()
        self._save_at_the_end()
        self.reporter.close()
        return None if state.update >= updates and not state.evaluation_due else reason

    def _update(self, window: Window, lr: float) -> UpdateResult:
        """One window through the engine; afterwards the lanes' states and the counters stand at its edge."""
        counted = float(self.facts.lanes * self.facts.window)
        if window.loss_weights is not None:
            here = torch.tensor(window.counted, dtype=torch.float64, device=self._world.device)
            counted = self._world.sum(here).item()
        groups = window.to(self._world.device).split_lanes(self.facts.train.lane_groups)
        result, self._lane_states = self.engine.update(list(zip(groups, self._lane_states, strict=True)), lr, counted)
        state = self.state
        state.update += 1
        if result.applied:
            state.adam_steps += 1
            state.bad_in_row = 0
        else:
            state.skipped += 1
            state.bad_in_row += 1
            # A state that is not finite would spoil its lane until the next document: it starts anew from zero.
            self._lane_states = [
                torch.where(torch.isfinite(s).all(-1, keepdim=True), s, 0.0) for s in self._lane_states
            ]
        state.loss = result.loss if result.loss is not None and math.isfinite(result.loss) else None
        progress_made(f"update {state.update}")
        return result

    def _report(self, result: UpdateResult, lr: float, elapsed: float, waited: float) -> None:
        state = self.state
        line: Metrics = {
            "update": state.update,
            "tokens": self.facts.tokens(state.update),
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "tokens_per_second": self.facts.tokens(1) / elapsed,
            "wait_fraction": waited / elapsed,
        }
        if not result.applied:
            line["skipped"] = True
            self.reporter.say(f"update {state.update} skipped: loss or gradient is not finite ({state.skipped} so far)")
        try:
            self.reporter.update(line)
        except OSError as error:
            raise SaveError(f"{error}; {self.checkpointer.last_good()}") from None
        if state.bad_in_row >= self.facts.train.max_bad_updates:
            self.checkpointer.finish()
            raise TrainingError(
                f"{state.bad_in_row} updates in a row were not finite (train.max_bad_updates);"
                f" {self.checkpointer.last_good()}. Lower optim.lr or optim.clip and run the command again"
            )

    def _evaluate(self) -> None:
        """Reads what is held out. Broken off by a request to stop, the evaluation stays due."""
        held_out, state = self.data.held_out, self.state
        if held_out is None:
            return
        losses = LossSum(self._world)
        with self.engine.evaluating():
            state_BSE = self.engine.model.empty_state(held_out.lanes // self._world.size)
            for window in held_out.windows():
                state_BSE = losses.add(self.engine.objective, window, state_BSE)
                progress_made(f"a window of the evaluation after update {state.update}")
                if not self._no_stop_requested():
                    state.evaluation_due = True
                    return
        state.evaluation_due = False
        loss, _ = losses.mean()
        try:
            self.reporter.evaluation({"update": state.update} | metrics_of(loss, held_out.bytes_per_target))
        except OSError as error:
            raise SaveError(f"{error}; {self.checkpointer.last_good()}") from None
        progress_made(f"evaluation after update {state.update}")

    def _sample(self) -> str:
        """A text from the model as it is. All ranks take part: at stage 3 no rank has the weights alone."""
        seed = derive_seed(self.facts.train.seed, "sample")
        with self.engine.evaluating():
            tokens = list(generate(self.engine.model, [], self.facts.run.sample_tokens, seed=seed))
        return str(self.data.tokenizer.decode([t for t in tokens if t != self.data.windows.corpus.eot_id]))

    def _no_stop_requested(self) -> bool:
        """The same on all ranks: whether none of them has heard a request to stop."""
        return not self._world.max(float(self.stop.pending()))[0]

    def _save_and_check_stop(self) -> str | None:
        """The end of an update: saves when due, completes a save in flight, and agrees on requests to stop.

        In this order, because each step is an exchange that all ranks must reach. A due save begins first, so that a
        stop in the same update finds it begun and saves nothing twice. Then the ranks agree, in one message, on whether
        one of them was asked to stop and whether one still writes: a save is completed by all at the same update, as
        late as the slowest disk needs, and nobody waits for it. Who is the first to know a reason differs by rank, so
        it is asked for only when there is one.
        """
        self._save_due |= self._due(self.facts.run.save_every)
        # Not amid updates that were skipped: it would push out the checkpoints from before them.
        if self._save_due and not self.state.bad_in_row:
            self._save_due = False
            self._save()
        stop, writing = self._world.max(float(self.stop.pending()), float(not self.checkpointer.written_here))
        if self.checkpointer.busy and not writing:
            self.checkpointer.finish()
        if not stop:
            return None
        return next(reason for reason in self._world.all_gather(self.stop.reason) if reason)

    def _save(self) -> None:
        self.checkpointer.finish()
        self.checkpointer.begin(self.state, torch.cat(self._lane_states))

    def _save_at_the_end(self) -> None:
        self.checkpointer.finish()
        if self.state.update > (self.checkpointer.saved or 0):
            self._save()
            self.checkpointer.finish()
            if self.checkpointer.saved != self.state.update:
                raise TrainingError(
                    f"stopped after update {self.state.update} without a checkpoint of it:"
                    f" {self.checkpointer.last_good()}"
                )

    def _due(self, every: int) -> bool:
        return every > 0 and self.state.update % every == 0

    def _set_lane_states(self, state_BSE: torch.Tensor) -> None:
        state_BSE = state_BSE.to(self._world.device, self.engine.dtype)
        self._lane_states = list(state_BSE.chunk(self.facts.train.lane_groups))
