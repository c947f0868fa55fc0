"""The global order of documents, D(0), D(1), ..: keyed permutations, fresh in each epoch, and mixtures of stores.

Pure arithmetic: a function of (documents, seed), of which any place can be asked for alone.

Axes: N documents. All arrays but keys are int64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
# ordinal (n,) -> source (n,), start (n,), length (n,): where document D(ordinal) lies; source -1 = there is none.
Locate = Callable[[Ints], tuple[Ints, Ints, Ints]]

NOTHING = np.int64(1) << 61  # the length of what a lane reads when its documents have run out
MIX_BLOCK = 1 << 16  # picks of a weighted mixture after which its proportions are met exactly
INDEX_EVERY = 16  # documents for each entry of the index of pieces

_ROUNDS = 6
_LEAST_SIDE = 8  # of the network: with less, some orders of a handful of documents come much too seldom
_MULTIPLY_1 = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLY_2 = np.uint64(0xD6E8FEB86659FD93)
_HALF_WORD = np.uint64(32)


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
