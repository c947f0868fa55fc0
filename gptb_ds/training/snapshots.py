"""Snapshots of a run in the memory of its ranks, and going back to one when the loss jumps.

Axes: B lanes of this rank, S slots, E embedding.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gptb_ds.data.collator import LaneCollator
from gptb_ds.training.checkpointer import random_state, set_random_state
from gptb_ds.training.engine import Engine, UpdateResult
from gptb_ds.training.fp32_state import OwnPart
from gptb_ds.training.loss_jumps import next_rewind
from gptb_ds.training.train_state import RunFacts, TrainState

_KEPT = 2  # a jump shortly after a snapshot may come of updates that were made before it


@dataclass(frozen=True)
class Snapshot:
    """Where a run stood at a window's edge, on the CPU: this rank's part of weights and moments, lanes, counters."""

    state: TrainState
    weights: list[OwnPart]
    scaler: dict[str, int | float]
    lanes: dict[str, torch.Tensor]
    state_BSE: torch.Tensor
    random: dict[str, torch.Tensor]


class Snapshots:
    """The newest snapshots of this rank. All ranks take them, and go back to them, at the same window's edge.

    None is from before the newest checkpoint: a run that is resumed there has none of before either, and goes back as
    this one does.
    """

    def __init__(self, facts: RunFacts, engine: Engine, windows: LaneCollator) -> None:
        self._facts, self._engine, self._windows = facts, engine, windows
        self._kept: list[Snapshot] = []

    def take(self, state: TrainState, state_BSE: torch.Tensor, *, saved: bool) -> None:
        """Keeps a snapshot; `saved`: a checkpoint stands at this edge as well."""
        snapshot = Snapshot(
            state=copy.deepcopy(state),
            weights=self._engine.fp32_state.own_part(),
            scaler=self._engine.fp32_state.scaler_state(),
            lanes=self._windows.state_dict(),
            state_BSE=state_BSE.to("cpu", copy=True),
            random=random_state(self._engine.world.device),
        )
        self._kept = [snapshot] if saved else [*self._kept, snapshot][-_KEPT:]

    def loss_jumps(self, state: TrainState, results: Sequence[UpdateResult]) -> bool:
        """Whether the window just trained, by these updates, calls for going back.

        The same on all ranks without an exchange: they have all learned the same losses. fp16 skips updates to find
        its loss scale, which is no reason. A window of which nothing counts is none either: it is left out already.
        """
        loss = _mean_loss(results)
        if loss is None:
            return False
        skipped = self._facts.train.precision != "fp16" and any(result.skipped for result in results)
        return skipped or not loss <= state.losses.limit(self._facts.run.jump_deviations)

    @staticmethod
    def follow_loss(state: TrainState, results: Sequence[UpdateResult]) -> None:
        """The loss of a window that training goes on from joins the average; of one that has jumped, too.

        Otherwise a loss that rose for good would be a jump in every window from then on.
        """
        loss = _mean_loss(results)
        if loss is not None and math.isfinite(loss):
            state.losses = state.losses.after(loss)

    def go_back(self, state: TrainState) -> tuple[TrainState, torch.Tensor]:
        """From the edge of the window that jumped to the newest snapshot before all that is to be left out.

        Or to the oldest there is. Newer ones are dropped. Returns the counters, with the rewind among them, and the
        recurrent state (B, S-1, E) that training goes on with; the rest is put in place.
        """
        number = state.tokens // self._facts.window_tokens - 1
        rewind = next_rewind(state.rewinds, number)
        while len(self._kept) > 1 and self._kept[-1].state.tokens > (number - rewind[1]) * self._facts.window_tokens:
            self._kept.pop()
        snapshot = self._kept[-1]
        self._engine.fp32_state.set_own_part(snapshot.weights)
        self._engine.fp32_state.load_scaler_state(snapshot.scaler)
        self._windows.load_state_dict(
            snapshot.lanes, column=snapshot.state.tokens // self._facts.lanes, grown=snapshot.state.grown
        )
        set_random_state(snapshot.random, self._engine.world.device)
        back = copy.deepcopy(snapshot.state)
        back.rewinds = [*state.rewinds, rewind]
        return back, snapshot.state_BSE.clone()  # training writes into it, and may come back once more


def _mean_loss(results: Sequence[UpdateResult]) -> float | None:
    """Of a window's updates; None where nothing counted."""
    losses = [result.loss for result in results if result.loss is not None]
    return sum(losses) / len(losses) if losses else None
