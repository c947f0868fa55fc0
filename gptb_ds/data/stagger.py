"""Lanes out of step: the documents of a shuffled order, entered at keyed places.

Lanes that all begin at a document's start, or that read pieces of equal length, reset in the same columns: an update
then sees one part of the documents only, and the loss has a spike where all states begin anew.
"""

from __future__ import annotations

import numpy as np

from gptb_ds.data.document_order import Ints, ShuffledOrder, below, keys_of

_STREAM = 1 << 40  # of keys, beside those of the shuffled order
_HEADS = 1 << 40  # times the lanes: what is added to the ordinal of a document when its head is read


class StaggeredOrder:
    """The order of a `ShuffledOrder` in which each lane enters its first document of every epoch at a keyed token.

    The lane reads that document's tail first, then its other documents of the epoch, and the document's head last. So
    every token still comes once an epoch, in the same lane, and all is a function of the content, the seed and L. The
    head is a piece of its own, as `max_document_tokens` makes them: an EOT, its tokens, and an EOT as the last target.

    A lane's place stays two whole numbers: the head of D(j) has the ordinal `j + _HEADS L`, which is of the same lane.
    """

    def __init__(self, order: ShuffledOrder, lanes: int, seed: int) -> None:
        self._order, self._lanes, self._seed = order, lanes, seed
        self._heads = lanes * _HEADS

    def __call__(self, ordinal: Ints) -> tuple[Ints, Ints, Ints]:
        is_head = ordinal >= self._heads
        number = np.where(is_head, ordinal - self._heads, ordinal)
        source, start, length = self._order(number)
        entry = self._entry(number, length)
        return source, np.where(is_head, start, start + entry), np.where(is_head, entry + 1, length - entry)

    def after(self, ordinal: Ints) -> Ints:
        """The ordinals that the lanes read after these."""
        is_head = ordinal >= self._heads
        number = np.where(is_head, ordinal - self._heads, ordinal)
        epoch = number // self._order.count
        first, following = self._first(number, epoch), self._first(number, epoch + 1)
        more = number + self._lanes < following
        following = np.where(~is_head & more, number + self._lanes, following)
        ended = np.flatnonzero(~is_head & ~more)
        has_head = ended[self._entry(first[ended], self._order(first[ended])[2]) > 0]
        following[has_head] = first[has_head] + self._heads
        return following

    def _first(self, number: Ints, epoch: Ints) -> Ints:
        """The first ordinal, from that epoch on, of the lane that reads D(number)."""
        begin = epoch * self._order.count
        return begin + (number - begin) % self._lanes

    def _entry(self, number: Ints, length: Ints) -> Ints:
        """How many tokens of document D(number) are its head; 0: it is read in one piece."""
        tokens = (length - 1).astype(np.uint64)
        drawn = below(tokens, keys_of(self._seed, _STREAM, number)).astype(np.int64)
        return np.where(number % self._order.count < self._lanes, drawn, 0)
