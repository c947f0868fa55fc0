"""The order of tokens: which document a lane reads, from where to where, in every column. Pure arithmetic.

Everything here is a function of (documents, seed, L), never of the number of ranks.

Axes: B lanes of this rank, F fragments of a window, N documents. All arrays are int64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
# ordinal (n,) -> source (n,), start (n,), length (n,): where document D(ordinal) lies; source -1 = there is none.
Locate = Callable[[Ints], tuple[Ints, Ints, Ints]]
# inputs (n,) and first column (n,) of documents -> how many of the inputs are read (n,).
Cut = Callable[[Ints, Ints], Ints]

NOTHING = np.int64(1) << 61  # the length of what a lane reads when its documents have run out
MIX_BLOCK = 1 << 16  # picks of a weighted mixture after which its proportions are met exactly
INDEX_EVERY = 16  # documents for each entry of the index of pieces

_ROUNDS = 6
_LEAST_SIDE = 8  # of the network: with less, some orders of a handful of documents come much too seldom
_MULTIPLY_1 = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLY_2 = np.uint64(0xD6E8FEB86659FD93)
_HALF_WORD = np.uint64(32)


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


def permute(index: Ints, size: int, key: Words) -> Ints:
    """Where a keyed permutation of `[0, size)` takes each `index`; `key` (same shape) picks the permutation.

    A Feistel network on pairs of numbers below `a` and `b`, `a b` just above `size`; what falls outside walks on along
    its cycle (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). O(1) memory, any index alone; for
    sizes below 2^32 squared.
    """
    side = max(_LEAST_SIDE, math.isqrt(size - 1) + 1)
    a, b = np.uint64(max(_LEAST_SIDE, -(-size // side))), np.uint64(side)
    keys = [_mix(key + np.uint64(turn)) for turn in range(_ROUNDS)]
    out = _feistel(index.astype(np.uint64), keys, a, b)
    bound = np.uint64(size)
    outside = np.flatnonzero(out >= bound)
    while outside.size:
        out[outside] = _feistel(out[outside], [key[outside] for key in keys], a, b)
        outside = outside[out[outside] >= bound]
    return out.astype(np.int64)


def _feistel(value: Words, keys: list[Words], a: np.uint64, b: np.uint64) -> Words:
    left, right = np.divmod(value, b)
    for turn, key in enumerate(keys):
        if turn % 2 == 0:
            left = (left + below(a, right + key)) % a
        else:
            right = (right + below(b, left + key)) % b
    return left * b + right


def below(limit: np.uint64 | Words, word: Words) -> Words:
    """A pseudo-random number below `limit` (at most 2^32) for each word; 0 for a limit of 0."""
    return ((_mix(word) >> _HALF_WORD) * limit) >> _HALF_WORD


def _mix(word: Words) -> Words:
    word = word * _MULTIPLY_1
    word ^= word >> _HALF_WORD
    word *= _MULTIPLY_2
    word ^= word >> _HALF_WORD
    return word * _MULTIPLY_1


def keys_of(seed: int, stream: int, epoch: Ints) -> Words:
    """A key for each number, such as an epoch's; other ones in every stream and for every seed."""
    base = np.array([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64)
    return _mix(_mix(_mix(base) + np.uint64(stream)) + epoch.astype(np.uint64))


class Pieces:
    """The documents of one store, cut where they have more than `limit` tokens; `count` pieces, numbered in order.

    `offsets` (N+1) are the documents' starts in the store: document i has `offsets[i+1] - offsets[i] - 1` tokens after
    its EOT. A cut piece is read as `[EOT] + its tokens`. Memory: 8 bytes for each 16 documents when there is a limit.
    """

    def __init__(self, offsets: Ints, limit: int | None = None) -> None:
        self.offsets, self.limit = offsets, limit
        documents = len(offsets) - 1
        self.count = documents
        self._index = np.zeros(1, dtype=np.int64)
        if limit is not None:
            ends = []
            for first in range(0, documents, INDEX_EVERY * 4096):
                pieces = self._pieces_of(offsets[first : first + INDEX_EVERY * 4096 + 1])
                ends.append(np.add.reduceat(pieces, np.arange(0, len(pieces), INDEX_EVERY)))
            self._index = np.concatenate([self._index, np.cumsum(np.concatenate(ends or [self._index]))])
            self.count = int(self._index[-1])
        self.inputs = int(offsets[-1]) - documents + self.count  # tokens and one EOT for each piece

    def _pieces_of(self, offsets: Ints) -> Ints:
        assert self.limit is not None
        tokens = np.diff(offsets) - 1
        return np.maximum(1, -(-tokens // self.limit))

    def locate(self, piece: Ints) -> tuple[Ints, Ints]:
        """Start in the store of the piece's EOT (for a later piece: of the token in its place) and number of inputs."""
        if self.limit is None:
            start = self.offsets[piece]
            return start, self.offsets[piece + 1] - start
        block = np.searchsorted(self._index, piece, side="right") - 1
        last = len(self.offsets) - 1
        # The documents of each piece's block: the one that holds the piece is where their running count passes it.
        around = np.minimum(block[:, None] * INDEX_EVERY + np.arange(INDEX_EVERY + 1), last)
        edges = self.offsets[around]
        tokens = np.diff(edges, axis=1) - 1
        ends = np.cumsum(np.where(tokens < 0, 0, np.maximum(1, -(-tokens // self.limit))), axis=1)
        within = piece - self._index[block]
        column = (ends <= within[:, None]).sum(axis=1)
        rows = np.arange(len(piece))
        before = np.where(column > 0, ends[rows, np.maximum(column - 1, 0)], 0)
        skip = (within - before) * self.limit
        return edges[rows, column] + skip, np.minimum(tokens[rows, column] - skip, self.limit) + 1


class ShuffledOrder:
    """The endless document sequence `D(j)`: each epoch a fresh keyed permutation of all pieces of all sources.

    With `shares` (of the inputs, for each source) every source has epochs of its own: its n-th pick is piece
    `n % count` of the permutation of its epoch `n // count`. Which source a pick falls to is a pattern of MIX_BLOCK
    picks that holds each source in proportion; every block begins it at another place, so that a lane does not meet the
    same source for ever. To know the n of a pick, the pattern's places are kept for each source: 512 KiB in all.
    """

    def __init__(self, sources: Sequence[Pieces], seed: int, shares: Sequence[float] | None = None) -> None:
        self._sources, self._seed = sources, seed
        self._firsts = np.cumsum([0] + [pieces.count for pieces in sources])
        self.count = int(self._firsts[-1])  # documents of an epoch; of all sources together with shares
        self._pattern: Ints | None = None
        if shares is not None:
            edges = np.cumsum(_picks(sources, shares))
            place = np.arange(MIX_BLOCK)
            mixed = permute(place, MIX_BLOCK, keys_of(seed, 0, np.zeros_like(place)))
            self._pattern = np.searchsorted(edges, mixed, side="right")
            self._places = [np.flatnonzero(self._pattern == s) for s in range(len(sources))]

    def __call__(self, ordinal: Ints) -> tuple[Ints, Ints, Ints]:
        if self._pattern is None:
            epoch, index = np.divmod(ordinal, self.count)
            number = permute(index, self.count, keys_of(self._seed, 0, epoch))
            return _split(self._sources, self._firsts, number)
        block, index = np.divmod(ordinal, MIX_BLOCK)
        begin = below(np.uint64(MIX_BLOCK), keys_of(self._seed, 0, block + 1)).astype(np.int64)
        place = (begin + index) % MIX_BLOCK
        source, number = self._pattern[place], np.empty_like(ordinal)
        for s, pieces in enumerate(self._sources):
            mine = np.flatnonzero(source == s)
            if mine.size:
                places = self._places[s]
                since = np.searchsorted(places, place[mine]) - np.searchsorted(places, begin[mine])
                nth = block[mine] * len(places) + since % len(places)
                epoch, index = np.divmod(nth, pieces.count)
                number[mine] = permute(index, pieces.count, keys_of(self._seed, s + 1, epoch)) + self._firsts[s]
        return _split(self._sources, self._firsts, number)


class FixedOrder:
    """Every piece of every source once, then nothing: in the order of the stores, or `mixed`, always the same way."""

    def __init__(self, sources: Sequence[Pieces], mixed: bool = False) -> None:
        self._sources, self._mixed = sources, mixed
        self._firsts = np.cumsum([0] + [pieces.count for pieces in sources])

    def __call__(self, ordinal: Ints) -> tuple[Ints, Ints, Ints]:
        return _split(self._sources, self._firsts, self.number(ordinal))

    def number(self, ordinal: Ints) -> Ints:
        """The piece at each ordinal, numbered across the sources."""
        if not self._mixed:
            return ordinal
        size = int(self._firsts[-1])
        there = np.flatnonzero(ordinal < size)
        number = ordinal.copy()
        number[there] = permute(ordinal[there], size, keys_of(0, 0, np.zeros_like(there)))
        return number


def _split(sources: Sequence[Pieces], firsts: Ints, number: Ints) -> tuple[Ints, Ints, Ints]:
    """Source, start and length of pieces numbered across the sources; beyond the last: source -1."""
    start, length = np.zeros_like(number), np.full_like(number, NOTHING)
    source = np.searchsorted(firsts, number, side="right") - 1
    source[number >= firsts[-1]] = -1
    for s, pieces in enumerate(sources):
        mine = np.flatnonzero(source == s) if len(sources) > 1 or (number.size and source.min() < 0) else slice(None)
        start[mine], length[mine] = pieces.locate(number[mine] - firsts[s])
    return source, start, length


def _picks(sources: Sequence[Pieces], shares: Sequence[float]) -> list[int]:
    """How many of MIX_BLOCK picks fall to each source so that its part of the *inputs* is its share."""
    rates = np.array([share * p.count / p.inputs for share, p in zip(shares, sources, strict=True)])
    exact = rates / rates.sum() * MIX_BLOCK
    picks = np.maximum(1, np.floor(exact)).astype(np.int64)
    for s in np.argsort(picks - exact, kind="stable")[: max(0, MIX_BLOCK - int(picks.sum()))]:
        picks[s] += 1
    picks[np.argmax(picks)] += MIX_BLOCK - int(picks.sum())
    return picks.tolist()


def shares_of_picks(sources: Sequence[Pieces], shares: Sequence[float]) -> list[float]:
    """The part of the inputs that each source has in a mixture: `shares`, as far as whole picks can meet them.

    A source whose documents are millions of times as long as the others' is picked once in MIX_BLOCK, however small its
    share, and is then most of what is read.
    """
    read = [count * p.inputs / p.count for count, p in zip(_picks(sources, shares), sources, strict=True)]
    return [inputs / sum(read) for inputs in read]


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
