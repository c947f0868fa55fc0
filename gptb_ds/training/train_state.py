"""What a run is, and where it stands: the facts that do not change, and the counters that do."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pydantic.dataclasses
from pydantic import ConfigDict, NonNegativeInt, ValidationError

from gptb_ds.config import OptimConfig, RunConfig, TrainConfig


@dataclass(frozen=True)
class RunFacts:
    """What a run is: its numbers, what must be the same when it resumes (`identity`), what may differ (`settings`).

    `lanes` and `window` are L and K. `bytes_per_target` turns nats into bits per byte of text; None where the bytes of
    the text are not known, as in a store of tokens.
    """

    lanes: int
    window: int
    optim: OptimConfig
    train: TrainConfig
    run: RunConfig
    bytes_per_target: float | None
    identity: dict[str, Any]
    settings: dict[str, Any]

    def tokens(self, updates: int) -> int:
        """Tokens that so many updates have read, over all ranks."""
        return updates * self.lanes * self.window


@pydantic.dataclasses.dataclass(config=ConfigDict(strict=True, extra="forbid"))
class TrainState:
    """Where a run stands: all its counters. A checkpoint saves and restores every field by its name.

    To add a counter, add a field here; a checkpoint that was written before lacks it, and gives its default.
    `loss` is the last update's, None when it was not finite or nothing was counted. `evaluation_due`: a request to stop
    broke off the evaluation that belongs to this update.
    """

    update: NonNegativeInt = 0
    adam_steps: NonNegativeInt = 0
    skipped: NonNegativeInt = 0
    bad_in_row: NonNegativeInt = 0
    evaluation_due: bool = False
    loss: float | None = None

    def saved(self) -> dict[str, int | float | bool | None]:
        """The counters by name."""
        return dataclasses.asdict(self)

    @classmethod
    def restored(cls, values: dict[str, int | float | bool | None]) -> TrainState:
        """From what `saved` gave. Raises ValueError, one line, when it can't have given this."""
        try:
            state = cls(**values)  # type: ignore[arg-type]
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise ValueError(f"the counters cannot be read: {wrong}") from None
        if state.adam_steps + state.skipped != state.update:
            raise ValueError(
                f"{state.adam_steps} steps of Adam and {state.skipped} skipped updates are not {state.update} updates"
            )
        return state
