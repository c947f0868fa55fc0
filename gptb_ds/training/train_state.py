"""What a run is, and where it stands: the facts that do not change, and the counters that do."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import pydantic.dataclasses
from pydantic import ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveInt, ValidationError

from gptb_ds.checkpoint.format import Counter
from gptb_ds.config import OptimConfig, RunConfig, TrainConfig
from gptb_ds.training.loss_jumps import LossAverage
from gptb_ds.training.noise_scale import NoiseScale

# Counters of which the first is a part of the second.
_NEVER_ABOVE = [
    *(("adam_start", "adam_steps"), ("adam_tokens", "tokens"), ("bad_in_row", "skipped")),
    *(("noise_updates", "update"), ("loss_windows", "update")),
]


@dataclass(frozen=True)
class RunFacts:
    """What a run is: its numbers, what must be the same when it resumes (`identity`), what may differ (`settings`).

    `lanes` and `window` are L and K. `bytes_per_target` turns nats into bits per byte of text; None where they mean
    nothing, see `Corpus.bytes_per_target`. `skips` are (lanes, columns) that are read but not learnt from.
    `is_task`: right answers are counted. `grow_at`: the running accuracy at which a curriculum's documents grow.
    `can_recompute`: columns can be computed again in the backward pass, which models to compare with don't offer.
    """

    lanes: int
    window: int
    optim: OptimConfig
    train: TrainConfig
    run: RunConfig
    bytes_per_target: float | None
    identity: dict[str, object]
    settings: dict[str, object]
    skips: tuple[tuple[range, range], ...] = ()
    is_task: bool = False
    grow_at: float = 0.95
    can_recompute: bool = True

    @property
    def window_tokens(self) -> int:
        """Tokens of a window, over all ranks."""
        return self.lanes * self.window


@pydantic.dataclasses.dataclass(config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))
class TrainState:
    """Where a run stands: all its counters. A checkpoint saves and restores every field by its name.

    To add a counter, add a field here; a checkpoint that was written before lacks it, and gives its default.
    `tokens` of all ranks were read by all `update`s, `adam_tokens` by those that were applied since Adam's moments
    began (after `adam_start` of the `adam_steps`). `skipped` updates were not finite, in `uncounted` ones nothing
    counted: both left weights and moments as they were. `loss` is the last update's, None when it was not finite or
    nothing was counted. `evaluation_due`: a request to stop broke off the evaluation that belongs to this update. The
    last window made `updates_per_window`; the three `noise_...` are the `noise`, the three `loss_...` are `losses`.
    `rewinds` are the jumps of the loss that training has gone back from, see `loss_jumps.next_rewind`. With a
    curriculum `accuracy` is the running share of right answers, over the `updates_since_growth`, and `grown` are the
    columns at which documents became longer.
    """

    update: NonNegativeInt = 0
    tokens: NonNegativeInt = 0
    adam_steps: NonNegativeInt = 0
    adam_start: NonNegativeInt = 0
    adam_tokens: NonNegativeInt = 0
    updates_per_window: PositiveInt = 1
    noise_signal: float = 0.0
    noise_variance: float = 0.0
    noise_updates: NonNegativeInt = 0
    loss_mean: float = 0.0
    loss_variance: NonNegativeFloat = 0.0
    loss_windows: NonNegativeInt = 0
    rewinds: list[list[NonNegativeInt]] = field(default_factory=list)
    skipped: NonNegativeInt = 0
    uncounted: NonNegativeInt = 0
    bad_in_row: NonNegativeInt = 0
    evaluation_due: bool = False
    loss: float | None = None
    accuracy: float = 0.0
    updates_since_growth: NonNegativeInt = 0
    grown: list[NonNegativeInt] = field(default_factory=list)

    @property
    def noise(self) -> NoiseScale:
        """The gradient noise scale as measured so far."""
        return NoiseScale(self.noise_signal, self.noise_variance, self.noise_updates)

    @noise.setter
    def noise(self, value: NoiseScale) -> None:
        self.noise_signal, self.noise_variance, self.noise_updates = value.signal, value.noise, value.updates

    @property
    def losses(self) -> LossAverage:
        """The average loss of a window."""
        return LossAverage(self.loss_mean, self.loss_variance, self.loss_windows)

    @losses.setter
    def losses(self, value: LossAverage) -> None:
        self.loss_mean, self.loss_variance, self.loss_windows = value.mean, value.variance, value.windows

    def saved(self) -> dict[str, Counter]:
        """The counters by name."""
        return dataclasses.asdict(self)

    @classmethod
    def restored(cls, values: dict[str, Counter]) -> TrainState:
        """From what `saved` gave. Raises ValueError, one line, when it can't have given this."""
        try:
            state = cls(**values)  # type: ignore[arg-type]
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise ValueError(f"the counters cannot be read: {wrong}") from None
        if state.adam_steps + state.skipped + state.uncounted != state.update:
            raise ValueError(
                f"{state.adam_steps} steps of Adam, {state.skipped} skipped updates and {state.uncounted} in which"
                f" nothing counted are not {state.update} updates"
            )
        for small, large in _NEVER_ABOVE:
            if getattr(state, small) > getattr(state, large):
                raise ValueError(
                    f"{small} {getattr(state, small)} is above {large} {getattr(state, large)}: counters of no run"
                )
        all_applied = state.adam_steps == state.update and not state.adam_start and "adam_tokens" in values
        if all_applied and state.adam_tokens != state.tokens:
            raise ValueError(f"all updates were applied, and adam_tokens {state.adam_tokens} are not {state.tokens}")
        return state
