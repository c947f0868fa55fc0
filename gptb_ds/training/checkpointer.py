"""A run's checkpoints: what goes into one and comes out of it again, when one is begun, completed, and given up.

Axes: B lanes of this rank, S slots, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from gptb_ds.checkpoint.format import CheckpointError, Manifest
from gptb_ds.checkpoint.identity import keeps_moments
from gptb_ds.checkpoint.reader import CheckpointReader
from gptb_ds.checkpoint.writer import CheckpointWriter, SaveError, assign_parameters
from gptb_ds.data.collator import LaneCollator
from gptb_ds.distributed.watchdog import progress_made
from gptb_ds.distributed.world import World, derive_seed
from gptb_ds.training.engine import Engine
from gptb_ds.training.reporter import Reporter
from gptb_ds.training.train_state import RunFacts, TrainState


class Checkpointer:
    """Writes the run's checkpoints and returns to one. Every rank calls each method at the same update's edge."""

    def __init__(
        self,
        facts: RunFacts,
        engine: Engine,
        windows: LaneCollator,
        reporter: Reporter,
        model_files: Mapping[str, bytes],
    ) -> None:
        """`model_files`: what makes a checkpoint a model on its own (see `checkpoint.model_files`)."""
        self._facts, self._engine, self._windows, self._reporter = facts, engine, windows, reporter
        self._world: World = engine.world
        self._writer = CheckpointWriter(Path(facts.run.dir), self._world, facts.run.keep, model_files)
        self.saved: int | None = None  # the update of the newest complete checkpoint

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is begun and not completed."""
        return self._writer.busy

    @property
    def written_here(self) -> bool:
        """Whether this rank's files of the one in flight are on the disk (or have failed)."""
        return self._writer.written_here

    def last_good(self) -> str:
        """What a run can go back to, for a message."""
        if self.saved is None:
            return "there is no checkpoint"
        return f"the last good checkpoint is after update {self.saved}"

    # The two that must fit: what `begin` puts into a checkpoint, `restore` takes out of it.

    def begin(self, state: TrainState, state_BSE: torch.Tensor) -> None:
        """Takes a snapshot of everything and writes it behind training's back; `finish` completes it.

        Raises SaveError on all ranks when the disk does not take it and `run.on_save_error` is "stop".
        """
        manifest = Manifest(
            step=state.update,
            tokens=state.tokens,
            loss=state.loss,
            world_size=self._world.size,
            zero_stage=self._engine.stage,
            lanes=self._facts.lanes,
            window=self._facts.window,
            identity=self._facts.identity,
            settings=self._facts.settings,
            progress=state.saved(),
            scaler=self._engine.fp32_state.scaler_state(),
            versions={name: _version(name) for name in ("torch", "deepspeed", "transformers", "gptb-ds")},
        )
        owner = assign_parameters(self._engine.fp32_state.shapes(), self._writer.writers)
        parameters = self._engine.fp32_state.export(lambda name: owner[name] == self._world.rank)
        lanes = {"state": state_BSE.to("cpu", copy=True), **self._windows.state_dict()}
        self._or_go_on(lambda: self._sync_and_begin(manifest, parameters, lanes))
        progress_made(f"save after update {state.update}")

    def restore(self, reader: CheckpointReader, state_shape: torch.Size) -> tuple[TrainState, torch.Tensor]:
        """Brings everything back: on the same ranks bit for bit, on others with the same columns and state.

        `state_shape` is that of this rank's recurrent state (B, S-1, E). Returns the counters and that state, on the
        CPU. Raises CheckpointError on all ranks, before anything is changed, when something does not fit.
        """
        state, lanes, random_state = self._world.on_all_ranks(self._read, reader, state_shape)
        same = self._keeps_moments(reader)
        if not same:
            state.adam_start, state.adam_tokens = state.adam_steps, 0
        self._engine.fp32_state.load(
            partial(reader.fetch_together, self._world), state.adam_steps - state.adam_start, moments=same
        )
        self._engine.fp32_state.load_scaler_state(reader.manifest.scaler)
        if random_state is not None:
            set_random_state(random_state, self._world.device)
        else:
            seed = self._facts.train.seed
            torch.manual_seed(derive_seed(seed, "dropout", state.update, self._world.rank, self._world.size))
        self.saved = state.update
        return state, lanes["state"]

    def _read(
        self, reader: CheckpointReader, state_shape: torch.Size
    ) -> tuple[TrainState, dict[str, torch.Tensor], dict[str, torch.Tensor] | None]:
        """What this rank needs beside weights and moments, which are only checked. The windows go to their position."""
        manifest, rank = reader.manifest, self._world.rank
        try:
            state = TrainState.restored(manifest.progress)
        except ValueError as error:
            raise CheckpointError(f"{reader.folder}: {error}") from None
        if (state.update, state.tokens) != (manifest.step, manifest.tokens):
            raise CheckpointError(
                f"{reader.folder}: says {manifest.step} updates of {manifest.tokens} tokens, its counters say"
                f" {state.update} of {state.tokens}"
            )
        if (manifest.lanes, manifest.window) != (self._facts.lanes, self._facts.window):
            raise CheckpointError(
                f"{reader.folder}: says {manifest.lanes} lanes and windows of {manifest.window}, its identity says"
                f" {self._facts.lanes} and {self._facts.window}"
            )
        weights = self._engine.fp32_state
        reader.check_model(weights.shapes(), weights.moments if self._keeps_moments(reader) else None)
        own = state_shape[0]
        lanes = reader.lanes(rank * own, (rank + 1) * own, tuple(state_shape[1:]))
        random_state = None
        if manifest.world_size == self._world.size:
            random_state = reader.random_state(rank)
            if random_state["cpu"].shape != torch.get_rng_state().shape:
                raise CheckpointError(f"{reader.folder}: the random state of rank {rank} has another size")
        self._windows.load_state_dict(
            {"ordinal": lanes["ordinal"], "offset": lanes["offset"]},
            column=state.tokens // self._facts.lanes,
            grown=state.grown,
        )
        return state, lanes, random_state

    def _keeps_moments(self, reader: CheckpointReader) -> bool:
        """See `keeps_moments`."""
        return keeps_moments(reader.manifest, self._facts.optim.name, self._facts.run.resume_optimizer, reader.folder)

    # Writing

    def finish(self) -> None:
        """Completes the checkpoint in flight, if there is one. Raises SaveError as `begin` does."""
        if not self.busy:
            return
        update = self._writer.step
        if self._or_go_on(self._writer.finish):
            self.saved = update
            self._reporter.say(f"checkpoint after update {update}: {self._writer.folder(update)}")
        progress_made(f"save after update {update}")

    def _sync_and_begin(
        self,
        manifest: Manifest,
        parameters: dict[str, dict[str, torch.Tensor]],
        lanes: dict[str, torch.Tensor],
    ) -> None:
        try:
            # The metrics first: a checkpoint must not claim an update whose line a power cut could still take.
            self._world.on_rank0(self._reporter.sync)
        except OSError as error:
            raise SaveError(f"no checkpoint after update {manifest.step}: {error}") from None
        self._writer.begin(manifest, parameters, lanes, random_state(self._world.device))

    def _or_go_on(self, save: Callable[[], object]) -> bool:
        """Runs a part of saving; when it fails, stops or goes on as `run.on_save_error` says."""
        try:
            save()
        except SaveError as error:
            if self._facts.run.on_save_error == "stop":
                raise SaveError(f"{error}; {self.last_good()}") from None
            self._reporter.say(f"WARNING: {error}; training goes on, {self.last_good()}")
            return False
        return True


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Where torch's own random streams of this process stand."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Goes on where `random_state` stood."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _version(distribution: str) -> str:
    """Its installed version; a checkout that runs from PYTHONPATH has none."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"
