"""When the documents of a task become longer: at a running accuracy, which every rank has alike.

The rule is the doubling curriculum of 2605.07755 with a running mean: growth at `grow_at`, at least 10 updates apart.
"""

from __future__ import annotations

from gptb_ds.training.loss_jumps import LossAverage
from gptb_ds.training.train_state import TrainState

MEMORY = 0.9  # of the running mean, an update
LEAST_UPDATES = 10
BACK = 0.05  # the running mean falls so far below `grow_at` when documents grow


def follow_accuracy(state: TrainState, accuracy: float) -> None:
    """An update had this share of right answers."""
    state.accuracy = MEMORY * state.accuracy + (1 - MEMORY) * accuracy
    state.updates_since_growth += 1


def is_due(state: TrainState, grow_at: float) -> bool:
    """Whether documents grow now."""
    return state.accuracy >= grow_at and state.updates_since_growth >= LEAST_UPDATES


def note_growth(state: TrainState, column: int, grow_at: float) -> None:
    """They have grown at this column: the answers to longer ones have to be seen for a while.

    Longer ones are harder: a loss that rises now has not jumped, so its average begins anew.
    """
    state.grown = [*state.grown, column]
    state.updates_since_growth = 0
    state.accuracy = min(state.accuracy, grow_at - BACK)
    state.losses = LossAverage()
