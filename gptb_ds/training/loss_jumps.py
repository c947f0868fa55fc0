"""When a loss has jumped, and which windows are not learnt from after going back.

The rule is that of OLMo 2's `SkipStepOptimizer` (2501.00656; OLMo-core): a loss is a jump when it lies more than 6
standard deviations above the mean of the last 128. Here mean and deviation are exponential averages of that span, so
that three numbers hold them, and they are of whole windows, so that updates of different sizes compare.

What then is left out follows PaLM (2204.02311, section 5.1), which went back to a checkpoint from before the jump and
skipped some hundred batches around it: its spikes came of certain data in a certain state of the weights, and did not
come again. Here the window that jumped is left out, alone. Only when the loss jumps again soon after are the windows
around it, too: 1 before and after, then 3, 7, ...
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

HISTORY = 128
# Nothing is a jump before so many windows were seen; and a jump within as many after the last is one of a series.
READY = HISTORY // 2


@dataclass(frozen=True)
class LossAverage:
    """Exponential mean and variance of the loss of a window, in nats a target, over the `windows` seen."""

    mean: float = 0.0
    variance: float = 0.0
    windows: int = 0

    def after(self, loss: float) -> LossAverage:
        """With one more window's loss. The first ones weigh alike."""
        share = max(2 / (HISTORY + 1), 1 / (self.windows + 1))
        off = loss - self.mean
        variance = (1 - share) * (self.variance + share * off * off)
        return LossAverage(self.mean + share * off, variance, self.windows + 1)

    def limit(self, deviations: float) -> float:
        """The loss above which one is a jump; infinity while there is too little to compare it with."""
        if self.windows < READY:
            return math.inf
        return self.mean + deviations * math.sqrt(self.variance)


def next_rewind(rewinds: Sequence[Sequence[int]], number: int) -> list[int]:
    """The record of a jump in window `number` (from 0 on): [number, reach], `rewinds` being those of before.

    `reach` is how many windows before and after that one are left out as well.
    """
    if rewinds:
        last, reach = rewinds[-1]
        if number <= last + reach + READY:
            return [number, 2 * reach + 1]
    return [number, 0]


def left_out(rewinds: Sequence[Sequence[int]], window: int) -> list[range]:
    """The columns, in windows of `window`, that these records leave out."""
    return [range(max(0, number - reach) * window, (number + reach + 1) * window) for number, reach in rewinds]
