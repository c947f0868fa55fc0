"""The order of tokens: which document a lane reads, from where to where, in every column. Pure arithmetic.

Everything here is a function of (documents, seed, L), never of the number of ranks.

Axes: F fragments of a window. All arrays are int64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gptb_ds.data.document_order import Ints, Locate

# inputs (n,) and first column (n,) of documents -> how many of the inputs are read (n,).
Cut = Callable[[Ints, Ints], Ints]


def rank_lanes(lanes: int, rank: int, world_size: int) -> range:
    """The global lanes of a rank: `[r L/W, (r+1) L/W)`.

    Raises ValueError when the world size does not divide the lanes; it names the valid choices on both sides.
    """
    assert 0 <= rank < world_size
    if lanes % world_size:
        below, above = lanes // world_size * world_size, (lanes // world_size + 1) * world_size
        sizes = [size for size in range(1, min(lanes, 4096) + 1) if lanes % size == 0]
        near = f"{below} or {above}" if below else f"{above}"
        raise ValueError(
            f"data.lanes {lanes} cannot be shared by {world_size} ranks equally; choose {near} lanes,"
            f" or a number of ranks out of {sizes}"
        )
    share = lanes // world_size
    return range(rank * share, (rank + 1) * share)


@dataclass(frozen=True)
class Fragments:
    """Runs of tokens to copy: `count` inputs from `start` in `source` to `column` on of `lane`; each field (F,)."""

    lane: Ints
    column: Ints
    source: Ints
    start: Ints
    count: Ints


@dataclass(frozen=True)
class CopyPlan:
    """What a window copies. `first` has a fragment for each lane, in lane order; `later` those after a document's end.

    The document D(`reset_ordinal`) starts at (`reset_lane`, `reset_column`); column K there means that it starts the
    next window.
    """

    first: Fragments
    later: Fragments
    reset_lane: Ints
    reset_column: Ints
    reset_ordinal: Ints


class Cursor:
    """The position of some lanes: (ordinal, offset) of each, and the step from one window to the next.

    `ordinal % stride` is the global lane. Between windows `offset` is always below the document's length. The document
    after `ordinal` is `ordinal + stride`, unless the order has an `after` that says otherwise. `column` counts the
    columns since the lanes began; with a `cut` a document is as long as that says of its length and the column at which
    it begins.
    """

    def __init__(
        self, order: Locate, ordinal: Ints, offset: Ints, stride: int, *, column: int = 0, cut: Cut | None = None
    ) -> None:
        self.order, self.column, self._cut = order, column, cut
        self._after: Callable[[Ints], Ints] = getattr(order, "after", lambda ordinal: ordinal + stride)
        self.ordinal, self.offset = ordinal.copy(), offset.copy()
        self.source, self.start, self.length = self._locate(self.ordinal, column - self.offset)

    def _locate(self, ordinal: Ints, column: Ints) -> tuple[Ints, Ints, Ints]:
        source, start, length = self.order(ordinal)
        return source, start, length if self._cut is None else self._cut(length, column)

    def advance(self, window: int) -> CopyPlan:
        """Moves every lane on by `window` inputs and says what they were.

        All lanes are moved at once, in rounds: in each round the lanes that still have columns to fill read one more
        fragment, to the end of their document or of the window. After the first round only those are left whose
        document ended inside the window. So the number of rounds is the most documents that one lane begins in the
        window, and an array operation serves all lanes of a round; a loop over lanes would take a hundred times as
        long. A document that ends exactly at the window's edge is left at once: the lane's next one is looked up now,
        and its reset is noted at column `window`, where `fill_window` needs its EOT as the last target. That keeps the
        promise that between windows `offset` is below the document's length.
        """
        fresh = np.flatnonzero(self.offset == 0)
        resets = [(fresh, np.zeros_like(fresh), self.ordinal[fresh])]
        lane, column = np.arange(len(self.ordinal)), np.zeros_like(self.ordinal)
        source, offset, length = self.source.copy(), self.offset, self.length
        start = self.start + offset
        rounds = []
        while lane.size:
            count = np.minimum(length - offset, window - column)
            rounds.append(Fragments(lane, column, source, start, count))
            offset, column = offset + count, column + count
            self.offset[lane] = offset
            ended = np.flatnonzero(offset == length)
            lane, column = lane[ended], column[ended]
            if lane.size:
                self._next_document(lane, self.column + column)
                resets.append((lane, column, self.ordinal[lane]))
                more = np.flatnonzero(column < window)
                lane, column = lane[more], column[more]
            source, start, offset, length = self.source[lane], self.start[lane], self.offset[lane], self.length[lane]
        self.column += window
        none = np.zeros(0, dtype=np.int64)
        later = [np.concatenate([none, *(getattr(r, f) for r in rounds[1:])]) for f in Fragments.__dataclass_fields__]
        return CopyPlan(rounds[0], Fragments(*later), *(np.concatenate(parts) for parts in zip(*resets, strict=True)))

    def _next_document(self, lane: Ints, column: Ints) -> None:
        self.ordinal[lane] = self._after(self.ordinal[lane])
        self.offset[lane] = 0
        self.source[lane], self.start[lane], self.length[lane] = self._locate(self.ordinal[lane], column)


def runs(start: Ints, count: Ints) -> Ints:
    """`start[i], start[i]+1, .. start[i]+count[i]-1` for every i, one after another."""
    ends = np.cumsum(count)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(start - ends + count, count)
