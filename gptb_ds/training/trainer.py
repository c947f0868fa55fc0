"""The training loop: next window, update, report, evaluate, save, stop.

Axes: B lanes of this rank or group, K steps, S slots, E embedding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gptb_ds.checkpoint.format import CheckpointError, Manifest
from gptb_ds.checkpoint.reader import CheckpointReader
from gptb_ds.checkpoint.writer import CheckpointWriter, SaveError, assign_parameters
from gptb_ds.config import OptimConfig, RunConfig, TrainConfig
from gptb_ds.data.collator import LaneCollator
from gptb_ds.data.window import Window
from gptb_ds.distributed.watchdog import Watchdog
from gptb_ds.distributed.world import World, derive_seed
from gptb_ds.training.engine import Engine, UpdateResult
from gptb_ds.training.metrics import MetricsLog, Progress
from gptb_ds.training.schedule import learning_rate
from gptb_ds.training.stop_requests import StopRequests


class TrainingError(RuntimeError):
    """Training can't go on; the message says why and where the last good checkpoint is."""


@dataclass(frozen=True)
class Plan:
    """What a run is: what must be the same when it resumes, what may differ, and what its tokens are worth."""

    lanes: int
    window: int
    bytes_per_target: float
    identity: dict[str, Any]
    setting: dict[str, Any]


@dataclass
class TrainState:
    """Where training stands, after `update` updates."""

    update: int = 0
    adam_steps: int = 0
    skipped: int = 0
    bad_in_row: int = 0
    evaluation_due: bool = False
    loss: float = math.nan


class Trainer:
    """One rank's training run. Every rank runs the same loop and reaches every exchange."""

    def __init__(
        self,
        plan: Plan,
        world: World,
        engine: Engine,
        windows: LaneCollator,
        state_BSE: torch.Tensor,
        *,
        optim: OptimConfig,
        train: TrainConfig,
        run: RunConfig,
        stop: StopRequests,
        log: MetricsLog | None,
        watchdog: Watchdog,
        evaluate: Callable[[Callable[[], bool]], dict[str, float] | None] | None,
        sample: Callable[[], str],
    ) -> None:
        """`log` is rank 0's alone. `evaluate` and `sample` are called on all ranks and leave training undisturbed.

        `evaluate` (None: nothing is held out) is given a question to ask while it works, the same on all ranks: whether
        to go on. Told not to, it returns None.
        """
        self.plan, self.world, self.engine, self.windows = plan, world, engine, windows
        self.optim, self.train, self.run, self.stop, self.log = optim, train, run, stop, log
        self.watchdog, self.evaluate, self.sample = watchdog, evaluate, sample
        self.saver = CheckpointWriter(Path(run.dir), world, run.keep)
        self.states = list(state_BSE.to(world.device, engine.dtype).chunk(train.lane_groups))
        self.at = TrainState()
        self.saved: int | None = None
        self._save_due = False
        torch.manual_seed(derive_seed(train.seed, "dropout", world.rank))
        self.progress: Progress | None = None

    def loop(self) -> str | None:
        """Trains until the last update, or until a request to stop: its reason is returned, a checkpoint written.

        Raises TrainingError after too many updates in a row that were not finite, and when the last checkpoint can't be
        written; SaveError when another one can't be, or the metrics, and `run.on_save_error` is "stop".
        """
        self.progress = Progress(self.train.updates, self.at.update, self.run.log_every) if self.log else None
        reason = None
        if self.at.evaluation_due or (self.at.update == 0 and self.run.eval_every):
            self._evaluate()
            if self.progress:
                self.progress.restart()
        while self.at.update < self.train.updates and reason is None:
            started, waited = time.perf_counter(), self.windows.wait_seconds
            window = self.windows.next_window()
            lr = learning_rate(self.at.update, self.optim, self.train.updates)
            result = self._update(window, lr)
            elapsed = time.perf_counter() - started
            self._report(result, lr, elapsed, self.windows.wait_seconds - waited)
            if self._due(self.run.eval_every, at_end=True):
                self._evaluate()
            if self._due(self.run.sample_every) and not self.at.evaluation_due:
                self._say(f"sample after {self.at.update} updates: {self.sample()!r}")
            reason = self._edge()
        self._finish_save()
        if self.at.update > (self.saved or 0):
            self._begin_save()
            self._finish_save()
            if self.saved != self.at.update:
                raise TrainingError(
                    f"stopped after update {self.at.update} without a checkpoint of it: {self._last_good()}"
                )
        if self.progress:
            self.progress.close()
        finished = self.at.update >= self.train.updates and not self.at.evaluation_due
        return None if finished else reason

    def _update(self, window: Window, lr: float) -> UpdateResult:
        """One window through the engine; afterwards `states` and the counters stand at its edge."""
        counted = float(self.plan.lanes * self.plan.window)
        if window.loss_weights is not None:
            counted = self.world.sum(torch.tensor(window.counted, dtype=torch.float64, device=self.world.device)).item()
        window = window.to(self.world.device)
        groups = list(zip(window.split_lanes(self.train.lane_groups), self.states, strict=True))
        result, self.states = self.engine.update(groups, lr, counted)
        self.at.update += 1
        if result.applied:
            self.at.adam_steps += 1
            self.at.bad_in_row = 0
        else:
            self.at.skipped += 1
            self.at.bad_in_row += 1
            # A state that is not finite would spoil its lane until the next document: it starts anew from zero.
            self.states = [torch.where(torch.isfinite(s).all(-1, keepdim=True), s, 0.0) for s in self.states]
        self.at.loss = result.loss
        self.watchdog.progress_made(f"update {self.at.update}")
        return result

    def _report(self, result: UpdateResult, lr: float, elapsed: float, waited: float) -> None:
        line = {
            "update": self.at.update,
            "tokens": self.at.update * self.plan.lanes * self.plan.window,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "tokens_per_second": self.plan.lanes * self.plan.window / elapsed,
            "wait_fraction": waited / elapsed,
        }
        if not result.applied:
            line["skipped"] = True
            self._say(f"update {self.at.update} skipped: loss or gradient is not finite ({self.at.skipped} so far)")
        if self.log and self.progress:
            self._log(line)
            self.progress.update(line, self.bits_per_byte(result.loss))
            names = {"loss": "Train/loss", "grad_norm": "Train/grad_norm", "lr": "Train/lr"}
            self.engine.monitor.write_events([(names[k], line[k], self.at.update) for k in names])
        if self.at.bad_in_row >= self.train.max_bad_updates:
            self._finish_save()
            raise TrainingError(
                f"{self.at.bad_in_row} updates in a row were not finite (train.max_bad_updates); {self._last_good()}."
                " Lower optim.lr or optim.clip and run the command again"
            )

    def bits_per_byte(self, loss: float) -> float:
        """Nats per target as bits per byte of text."""
        return loss / math.log(2) / self.plan.bytes_per_target

    def _evaluate(self) -> None:
        if self.evaluate is None:
            return
        measured = self.evaluate(self._goes_on)
        self.at.evaluation_due = measured is None
        self.watchdog.progress_made(f"evaluation after update {self.at.update}")
        if measured is None:
            return
        line = {"update": self.at.update} | measured
        if self.log:
            self._log(line)
            self.engine.monitor.write_events([("Eval/loss", line["eval_loss"], self.at.update)])
        self._say(
            f"update {self.at.update}: held-out loss {line['eval_loss']:.4f},"
            f" {line['eval_bits_per_byte']:.3f} bits per byte"
        )

    def _goes_on(self) -> bool:
        """Asked inside an evaluation: no request to stop anywhere."""
        self.watchdog.progress_made(f"a window of the evaluation after update {self.at.update}")
        return not self.world.max(float(self.stop.pending()))[0]

    def _log(self, line: dict[str, Any]) -> None:
        assert self.log is not None
        kept_before = self.log.keeps
        try:
            self.log.write(line)
        except OSError as error:
            if self.run.on_save_error == "stop":
                raise SaveError(f"{error}; {self._last_good()}") from None
            if not kept_before:  # said once, not at every update
                self._say(f"WARNING: {error}; lines are kept in memory and training goes on, {self._last_good()}")

    def _last_good(self) -> str:
        return (
            "there is no checkpoint" if self.saved is None else f"the last good checkpoint is after update {self.saved}"
        )

    def _edge(self) -> str | None:
        """The update's edge: saves when due, completes a save in flight, and agrees on requests to stop."""
        self._save_due |= self._due(self.run.save_every)
        # Not amid updates that were skipped: it would push out the checkpoints from before them.
        if self._save_due and not self.at.bad_in_row:
            self._save_due = False
            self._finish_save()
            self._begin_save()
        stop, unwritten = self.world.max(float(self.stop.pending()), float(not self.saver.written))
        if self.saver.busy and not unwritten:
            self._finish_save()
        if not stop:
            return None
        return next(reason for reason in self.world.all_gather(self.stop.reason) if reason)

    def _due(self, every: int, at_end: bool = False) -> bool:
        if at_end and self.at.update == self.train.updates:
            return True
        return every > 0 and self.at.update % every == 0

    def _say(self, text: str) -> None:
        if self.progress:
            self.progress.say(text)

    # Checkpoints

    def _begin_save(self) -> None:
        owner = assign_parameters(self.engine.fp32_state.shapes(), self.saver.writers)
        position = self.windows.state_dict()
        manifest = Manifest(
            step=self.at.update,
            tokens=self.at.update * self.plan.lanes * self.plan.window,
            loss=self.at.loss if math.isfinite(self.at.loss) else None,
            world_size=self.world.size,
            zero_stage=self.engine.stage,
            lanes=self.plan.lanes,
            window=self.plan.window,
            identity=self.plan.identity,
            setting=self.plan.setting,
            progress={
                "adam_steps": self.at.adam_steps,
                "skipped": self.at.skipped,
                "bad_in_row": self.at.bad_in_row,
                "evaluation_due": self.at.evaluation_due,
                "scaler": self.engine.fp32_state.scaler_state(),
            },
            versions={name: version(name) for name in ("torch", "deepspeed", "transformers", "gptb-ds")},
        )
        state = torch.cat(self.states).to("cpu", copy=True)
        self._guarded(
            self._sync_and_save,
            manifest,
            self.engine.fp32_state.export(lambda name: owner[name] == self.world.rank),
            {"state": state, "ordinal": position["ordinal"], "offset": position["offset"]},
            _random_state(self.world.device),
        )
        self.watchdog.progress_made(f"save after update {self.at.update}")

    def _sync_and_save(self, *args: Any) -> None:
        try:
            self.world.on_rank0(lambda: self.log.sync() if self.log else None)
        except OSError as error:
            raise SaveError(f"no checkpoint after update {self.at.update}: {error}") from None
        self.saver.begin(*args)

    def _finish_save(self) -> None:
        if self.saver.busy:
            step = self.saver.step
            if self._guarded(self.saver.finish):
                self.saved = step
                self._say(f"checkpoint after update {step}: {self.saver.folder(step)}")
            self.watchdog.progress_made(f"save after update {step}")

    def _guarded(self, save: Callable[..., Any], *args: Any) -> bool:
        """Runs a step of saving; when it fails, stops or goes on as `run.on_save_error` says."""
        try:
            save(*args)
        except SaveError as error:
            if self.run.on_save_error == "stop":
                raise SaveError(f"{error}; {self._last_good()}") from None
            self._say(f"WARNING: {error}; training goes on, {self._last_good()}")
            return False
        return True

    def resume(self, reader: CheckpointReader) -> None:
        """Continues from a checkpoint: on the same ranks bit for bit, on others with the same columns and state.

        Raises ValueError on all ranks, before anything is changed, when tensors don't fit the model or the lanes.
        """
        manifest = reader.manifest
        lanes, random_state = self.world.on_all_ranks(self._read, reader)
        progress = manifest.progress
        self.engine.fp32_state.load(lambda kind, name: self._fetch(reader, kind, name), progress["adam_steps"])
        self.engine.fp32_state.load_scaler_state(progress["scaler"])
        self.states = list(lanes["state"].to(self.world.device, self.engine.dtype).chunk(self.train.lane_groups))
        if random_state is not None:
            _set_random_state(random_state, self.world.device)
        else:
            torch.manual_seed(derive_seed(self.train.seed, "dropout", manifest.step, self.world.rank, self.world.size))
        self.at = replace(
            self.at,
            update=manifest.step,
            adam_steps=progress["adam_steps"],
            skipped=progress["skipped"],
            bad_in_row=progress["bad_in_row"],
            evaluation_due=progress["evaluation_due"],
            loss=math.nan if manifest.loss is None else manifest.loss,
        )
        self.saved = manifest.step

    def _read(self, reader: CheckpointReader) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor] | None]:
        """What this rank needs beside weights and moments; those are only checked. The windows go to their position."""
        per_rank = self.plan.lanes // self.world.size
        first = self.world.rank * per_rank
        reader.check_model(self.engine.fp32_state.shapes())
        lanes = reader.lanes(first, first + per_rank, tuple(self.states[0].shape[1:]))
        random_state = None
        if reader.manifest.world_size == self.world.size:
            random_state = reader.random_state(self.world.rank)
            if random_state["cpu"].shape != torch.get_rng_state().shape:
                raise CheckpointError(f"{reader.folder}: the random state of rank {self.world.rank} has another size")
        self.windows.load_state_dict({"ordinal": lanes["ordinal"], "offset": lanes["offset"]})
        return lanes, random_state

    def _fetch(self, reader: CheckpointReader, kind: str, name: str) -> torch.Tensor:
        self.watchdog.progress_made(f"loading {kind} of {name}")
        return reader.fetch(kind, name)


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
