"""What the state is worth: held-out loss with the state carried and with it reset every n tokens, and by position.

The inputs and targets are the same in all of them; a reset changes only what the model still knows.

Axes: B lanes of this rank, K steps, S slots, E embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gptb_ds.data.corpus import Corpus
from gptb_ds.data.segments import Segments, segment_windows
from gptb_ds.distributed.world import World
from gptb_ds.model.objective import WindowObjective

INTERVALS = (1, 16, 256, 4096)
# Short segments are read in more lanes than documents are: as many tokens in a window, but no more lanes than this.
MOST_LANES = 1024
_BUCKETS = 48  # powers of two of a position


@dataclass(frozen=True)
class PositionLoss:
    """Nats per counted target at the positions `first` to `last` of a document; 1 is what follows its start alone."""

    first: int
    last: int
    targets: float
    loss: float


@dataclass(frozen=True)
class Score:
    """One reading of held-out text. `read_as` says in what, `reset_every` after how many tokens the state was reset.

    `reset_every` None: carried. Loss in nats per counted target; `bits_per_byte` None: bytes unknown.
    """

    read_as: str
    reset_every: int | None
    targets: float
    loss: float
    perplexity: float
    bits_per_byte: float | None
    by_position: list[PositionLoss]


class PositionSums:
    """Adds up nats and counted targets by position, over windows and then over ranks."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._sums = torch.zeros((_BUCKETS, 2), dtype=torch.float64, device=world.device)

    def add(self, losses_KB: torch.Tensor, weights_KB: torch.Tensor, position_KB: torch.Tensor) -> None:
        bucket_R = torch.frexp(position_KB.double()).exponent.flatten().long() - 1  # floor(log2), exactly
        weights_KB = weights_KB.double()
        self._sums.index_add_(0, bucket_R, torch.stack((losses_KB * weights_KB, weights_KB), dim=-1).flatten(0, 1))

    def by_position(self) -> list[PositionLoss]:
        """A row for each power of two at which anything counts. All ranks call it."""
        rows = enumerate(self._world.sum(self._sums.clone()).tolist())
        return [PositionLoss(1 << k, (2 << k) - 1, counted, nats / counted) for k, (nats, counted) in rows if counted]


@dataclass(frozen=True)
class Reader:
    """Reads segments of a corpus with a model (in eval mode), `lanes` at a time over all ranks, `window` columns each.

    The figures do not depend on lanes, windows and ranks, but for the last digits of a sum of floats.
    """

    objective: WindowObjective
    corpus: Corpus
    world: World
    lanes: int
    window: int

    def score(
        self, segments: Segments, read_as: str, bytes_per_target: float | None, reset_every: int | None = None
    ) -> Score | None:
        """The loss on these segments, with the state reset every so many tokens. None: no target counts."""
        lanes, window = self.lanes, self.window
        if reset_every is not None:
            segments = segments.reset_every(reset_every)
            window = min(window, reset_every)
            lanes = max(lanes, min(MOST_LANES * self.world.size, lanes * self.window // window))
        rows = self._read(segments, max(1, lanes // self.world.size), window).by_position()
        counted, nats = sum(row.targets for row in rows), sum(row.targets * row.loss for row in rows)
        if not counted:
            return None
        loss = nats / counted
        bits = None if bytes_per_target is None else loss / math.log(2) / bytes_per_target
        return Score(read_as, reset_every, counted, loss, math.exp(min(loss, 700)), bits, rows)

    def _read(self, segments: Segments, lanes: int, window: int) -> PositionSums:
        sums = PositionSums(self.world)
        own = segments.of_rank(self.world.rank, self.world.size)
        state_BSE = self.objective.model.empty_state(min(lanes, len(own.count)))
        for read in segment_windows(self.corpus, own, lanes, window):
            columns, device = read.columns.to(self.world.device), self.world.device
            state_BSE = state_BSE[read.kept.to(device)]
            losses_KB, state_BSE = self.objective.token_losses(
                columns.input_ids, columns.targets, columns.reset, state_BSE
            )
            assert columns.loss_weights is not None
            sums.add(losses_KB, columns.loss_weights, read.position.to(device))
        return sums

    def state_use(
        self,
        segments: Segments,
        read_as: str,
        bytes_per_target: float | None,
        intervals: Sequence[int] = INTERVALS,
    ) -> list[Score]:
        """A score with the state reset every n tokens for each n below the longest segment, rising, then carried.

        Empty: no target counts.
        """
        useful = sorted({n for n in intervals if n < segments.longest})
        scores = [self.score(segments, read_as, bytes_per_target, n) for n in [*useful, None]]
        return [score for score in scores if score is not None]
