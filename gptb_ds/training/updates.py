"""A window's updates: how many it makes, which lanes each takes, with which learning rate and betas.

Axes: B lanes of this rank or lane group, K steps, S slots, E embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from gptb_ds.data.window import Window
from gptb_ds.distributed.watchdog import progress_made
from gptb_ds.phases import phase
from gptb_ds.training.engine import Engine, UpdateResult
from gptb_ds.training.length_curriculum import follow_accuracy
from gptb_ds.training.loss_jumps import left_out
from gptb_ds.training.noise_scale import merged
from gptb_ds.training.schedule import BatchPlan, adam_betas, adam_count, learning_rate, rate_plan
from gptb_ds.training.train_state import RunFacts, TrainState


@dataclass(frozen=True)
class Update:
    """An update that was made: what it did, with how many tokens of all ranks, at which rate.

    `left_out`: its columns were not learnt from, because the loss has jumped there.
    """

    result: UpdateResult
    tokens: int
    lr: float
    left_out: bool = False


class WindowUpdates:
    """Trains on windows, one after another. Holds this rank's recurrent state and keeps the counters.

    Update n of a window's N takes the lanes n, n + N, n + 2 N, ...: the same on any number of ranks. The lanes of an
    update may be taken in several lane groups, to save memory.
    """

    def __init__(self, facts: RunFacts, engine: Engine) -> None:
        self._facts, self._engine, self._world = facts, engine, engine.world
        self._batches = BatchPlan(facts.window_tokens, facts.train.batch_phases())
        self._rates = rate_plan(facts.optim, facts.train, self._batches)
        # Zeros: every lane starts with a reset, which replaces them.
        self.state_BSE = engine.model.empty_state(facts.lanes // self._world.size)

    @property
    def end(self) -> int:
        """Tokens of the whole run."""
        return self._rates.end

    @property
    def last_update(self) -> int:
        """How many updates the run makes; with updates that follow the noise, the most that it can."""
        return self._batches.updates_after(self._rates.end)

    def start(self) -> TrainState:
        """The counters of a run that begins."""
        return TrainState(updates_per_window=self._batches.updates_per_window(0))

    def restore(self, state: TrainState, state_BSE: torch.Tensor) -> None:
        """Continues from a checkpoint's counters and recurrent state."""
        self.state_BSE = state_BSE.to(self._world.device, self._engine.dtype)
        planned = self._batches.updates_per_window(state.tokens)
        # What follows the noise never rises again; a plan by tokens applies as it is now.
        follows = self._facts.train.starts_adaptive
        state.updates_per_window = min(state.updates_per_window, planned) if follows else planned
        self._engine.fp32_state.set_adam_count(self._adam_count(state))

    def train(
        self, window: Window, state: TrainState, flags: Callable[[], tuple[bool, ...]] = tuple
    ) -> Iterator[Update]:
        """Makes the window's updates, one each time the next is asked for; then all lanes stand at its edge.

        `flags` of each rank are in the results of all, see `Engine.update`.
        """
        first_lane, first_column = self._world.rank * window.lanes, state.tokens // self._facts.lanes
        jumps = left_out(state.rewinds, self._facts.window)
        everywhere = range(self._facts.lanes)
        skips = [*self._facts.skips, *((everywhere, columns) for columns in jumps)]
        window = window.without(skips, first_lane, first_column)
        jumped = any(first_column in columns for columns in jumps)
        number = self._next_number(state)
        groups = max(self._facts.train.lane_groups, number)
        counted = self._counted(window, number)
        with phase("data"):
            parts = window.to(self._world.device).split_lanes(groups)
        tokens = self._batches.window_tokens // number
        for n in range(number):
            own = range(n, groups, number)
            lr = learning_rate(state.tokens, tokens, self._facts.optim, self._rates)
            states = [self.state_BSE[g::groups] for g in own]
            result, states = self._engine.update(
                list(zip([parts[g] for g in own], states, strict=True)),
                lr,
                counted[n],
                adam_betas(tokens, self._facts.optim),
                flags,
            )
            for g, state_BSE in zip(own, states, strict=True):
                if not result.applied:
                    # A state that is not finite would spoil its lane until the next document: it starts from zero.
                    state_BSE = torch.where(torch.isfinite(state_BSE).all(-1, keepdim=True), state_BSE, 0.0)
                self.state_BSE[g::groups] = state_BSE
            _count(state, result, tokens)
            progress_made(f"update {state.update}")
            yield Update(result, tokens, lr, jumped)

    def _counted(self, window: Window, number: int) -> list[float]:
        """How many targets count in each of the window's updates, over all ranks."""
        parts = window.split_lanes(number)
        if window.loss_weights is None:
            return [float(part.targets.numel() * self._world.size) for part in parts]
        here = torch.tensor([part.counted for part in parts], dtype=torch.float64, device=self._world.device)
        totals: list[float] = self._world.sum(here).tolist()
        return totals

    def _next_number(self, state: TrainState) -> int:
        """How many updates the next window makes. When their size changes, Adam's count of steps changes with it."""
        if self._facts.train.starts_adaptive:
            number = merged(state.updates_per_window, self._batches.window_tokens, state.noise)
        else:
            number = self._batches.updates_per_window(state.tokens)
        if number != state.updates_per_window:
            state.updates_per_window = number
            self._engine.fp32_state.set_adam_count(self._adam_count(state))
        return number

    def _adam_count(self, state: TrainState) -> float:
        tokens = self._batches.window_tokens // state.updates_per_window
        return adam_count(state.adam_steps - state.adam_start, state.adam_tokens, tokens, self._facts.optim)


def _count(state: TrainState, result: UpdateResult, tokens: int) -> None:
    state.update += 1
    state.tokens += tokens
    if result.applied:
        state.adam_steps += 1
        state.adam_tokens += tokens
        state.bad_in_row = 0
        if result.part_norm is not None:
            small, large = (tokens / result.parts, result.part_norm), (float(tokens), result.grad_norm**2)
            state.noise = state.noise.after(small, large)
    elif result.skipped:
        state.skipped += 1
        state.bad_in_row += 1
    else:
        state.uncounted += 1
    if result.accuracy is not None:
        follow_accuracy(state, result.accuracy)
    state.loss = result.loss if result.loss is not None and math.isfinite(result.loss) else None
