"""Held-out windows: which documents an evaluation reads, how they are shared among the lanes, and their columns.

What is read is a function of the corpus and of `max_tokens` alone. Lanes, ranks and windows decide only who reads it,
so the figure does not depend on them.

Axes: B lanes of this rank, K steps of a window, n pieces that are read.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gptb_ds.data.corpus import Corpus
from gptb_ds.data.document_order import NOTHING, FixedOrder, Ints, Pieces
from gptb_ds.data.lanes import Cursor, rank_lanes
from gptb_ds.data.window import Window, fill_window


def held_out_windows(
    corpus: Corpus,
    *,
    lanes: int,
    window: int,
    rank: int = 0,
    world_size: int = 1,
    max_tokens: int | None = None,
    max_document_tokens: int | None = None,
) -> Iterator[Window]:
    """Every document of the corpus exactly once, from its start, as windows with loss weights.

    `max_tokens` chooses documents from all over the corpus, always the same ones, until that many targets are read; of
    the last one only as much as is left. The longest documents are given out first, each to the lane that has least to
    read (see `share_out`).

    All ranks yield the same number of windows. A window has at most `lanes / world_size` lanes, longest first. Lanes
    that have run out are left out of later windows: carry on `state[: window.lanes]`. As long as they are in a window
    they read EOT with weight 0. Raises ValueError when the ranks don't divide the lanes.
    """
    own = rank_lanes(lanes, rank, world_size)
    sources = corpus.pieces(max_document_tokens)
    reading = share_out(choose(sources, max_tokens), lanes)
    # Lanes are numbered by their length, so that a rank's are dealt out to it, one of each `world_size` neighbours.
    ordinal = np.arange(len(own)) * world_size + rank
    columns = reading.columns[ordinal]
    cursor = Cursor(LaneByLane(sources, reading), ordinal, np.zeros_like(ordinal), lanes)
    width = len(own)
    for first in range(0, int(reading.columns[0]), window):
        running = max(1, int((columns > first).sum()))
        if first == 0 or running <= width // 2:  # not at every lane's end: each width costs a device new memory
            width = running
            cursor = Cursor(cursor.order, cursor.ordinal[:width], cursor.offset[:width], lanes)
        filled = fill_window(corpus, cursor.advance(window), window, finite=True)
        if reading.uncounted is not None:
            lane, column = np.flatnonzero(ordinal[:width] == reading.uncounted[0]), reading.uncounted[1] - first
            if lane.size and 0 <= column < window:
                assert filled.loss_weights is not None
                filled.loss_weights[column, lane] = 0
        yield filled


@dataclass(frozen=True)
class Choice:
    """The pieces that are read, numbered across the stores, and how many inputs of each: `number`, `length` (n,).

    `cut`: the last one is not read to its end. Its last input is then there only for the target before it.
    """

    number: Ints
    length: Ints
    cut: bool = False


def choose(sources: Sequence[Pieces], max_tokens: int | None) -> Choice:
    """All pieces, or those that come first in a fixed mixed order, with `max_tokens` targets in all (at least 1)."""
    total, count = sum(pieces.inputs for pieces in sources), sum(pieces.count for pieces in sources)
    if max_tokens is None or max_tokens >= total:
        number = np.arange(count)
        return Choice(number, FixedOrder(sources)(number)[2])
    order = FixedOrder(sources, mixed=True)
    numbers, lengths, left = [], [], max_tokens
    for first in range(0, count, 1 << 16):
        ordinal = np.arange(first, min(first + (1 << 16), count))
        length = order(ordinal)[2]
        ends = np.cumsum(length)
        taken = int(np.searchsorted(ends, left)) + 1  # up to the piece in which the budget ends
        numbers.append(order.number(ordinal[:taken]))
        lengths.append(length[:taken])
        if taken <= len(ends):
            beyond = int(ends[taken - 1]) - left
            lengths[-1][-1] -= max(0, beyond - 1)
            return Choice(np.concatenate(numbers), np.concatenate(lengths), cut=beyond > 0)
        left -= int(ends[-1])
    raise AssertionError("max_tokens is below the number of targets")


@dataclass(frozen=True)
class Reading:
    """What each lane reads: the choice's pieces `piece[first[l] : first[l + 1]]`, in `columns[l]` columns (L,).

    Lanes are numbered from the longest to the shortest. `uncounted`: lane and column of a target that does not count.
    """

    choice: Choice
    piece: Ints
    first: Ints
    columns: Ints
    uncounted: tuple[int, int] | None


def share_out(choice: Choice, lanes: int) -> Reading:
    """Gives the longest piece that is left to the lane with the fewest inputs, again and again.

    That is the rule "longest processing time first", whose longest lane is at most 4/3 of the best there is (Graham,
    "Bounds on multiprocessing timing anomalies", 1969).
    """
    by_length = np.argsort(-choice.length, kind="stable")
    loads = [(0, lane) for lane in range(lanes)]
    lane = np.empty(len(by_length), dtype=np.int64)
    for place, length in zip(by_length.tolist(), choice.length[by_length].tolist(), strict=True):
        load, least = loads[0]
        lane[place] = least
        heapq.heapreplace(loads, (load + length, least))
    columns = np.zeros(lanes, dtype=np.int64)
    for load, number in loads:
        columns[number] = load
    longest_first = np.argsort(-columns, kind="stable")
    rank_of = np.empty(lanes, dtype=np.int64)
    rank_of[longest_first] = np.arange(lanes)
    lane, columns = rank_of[lane], columns[longest_first]
    uncounted = None
    if choice.cut:  # the choice's last piece; it comes last in its lane as well, because the sort is stable
        uncounted = (int(lane[-1]), int(columns[lane[-1]]) - 1)
    piece = np.argsort(lane, kind="stable")
    return Reading(choice, piece, np.searchsorted(lane[piece], np.arange(lanes + 1)), columns, uncounted)


class LaneByLane:
    """The order of a `Reading` for a cursor: ordinal `l + k L` is the k-th piece of lane l, or nothing."""

    def __init__(self, sources: Sequence[Pieces], reading: Reading) -> None:
        self._order, self._reading = FixedOrder(sources), reading

    def __call__(self, ordinal: Ints) -> tuple[Ints, Ints, Ints]:
        reading = self._reading
        nth, lane = np.divmod(ordinal, len(reading.columns))
        place = reading.first[lane] + nth
        there = place < reading.first[lane + 1]
        piece = reading.piece[place[there]]
        source, start, length = np.full_like(ordinal, -1), np.zeros_like(ordinal), np.full_like(ordinal, NOTHING)
        source[there], start[there], _ = self._order(reading.choice.number[piece])
        length[there] = reading.choice.length[piece]
        return source, start, length
