"""Segments: held-out pieces in stretches that are each read from a fresh state, and the columns of them.

What is read is a function of the corpus, of `max_tokens` and of where the state is reset. Lanes, ranks and windows
decide only who reads it.

Axes: B lanes of this rank, K steps of a window, n segments.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from gptb_ds.data.corpus import Corpus
from gptb_ds.data.document_order import FixedOrder, Ints
from gptb_ds.data.held_out import choose
from gptb_ds.data.window import Window


@dataclass(frozen=True)
class Segments:
    """Stretches of pieces, longest first; each field (n,).

    The piece lies in store `source` from `start` on and has `length` inputs; the segment is its inputs from `offset`
    on, `count` of them.
    """

    source: Ints
    start: Ints
    length: Ints
    offset: Ints
    count: Ints

    @property
    def longest(self) -> int:
        """Inputs of the longest."""
        return int(self.count[0])

    def of_rank(self, rank: int, world_size: int) -> Segments:
        """Every `world_size`-th, from `rank` on: about as many inputs for each."""
        return self._take(np.s_[rank::world_size])

    def first(self, number: int) -> Segments:
        """The longest ones, so many."""
        return self._take(np.s_[:number])

    def reset_every(self, tokens: int) -> Segments:
        """The same inputs and targets, but after each `tokens` inputs of a segment a new one begins."""
        parts = np.maximum(1, -(-self.count // tokens))
        whole = np.repeat(np.arange(len(parts)), parts)
        skip = (np.arange(len(whole)) - np.repeat(np.cumsum(parts) - parts, parts)) * tokens
        cut = self._take(whole)
        count = np.minimum(cut.count - skip, tokens)
        return Segments(cut.source, cut.start, cut.length, cut.offset + skip, count)._longest_first()

    def _longest_first(self) -> Segments:
        return self._take(np.argsort(-self.count, kind="stable"))

    def _take(self, index: Ints | slice) -> Segments:
        return Segments(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


def whole_pieces(corpus: Corpus, max_tokens: int | None = None, max_document_tokens: int | None = None) -> Segments:
    """Every piece of the corpus as one segment; with `max_tokens` those that `held_out_windows` reads, as far as it.

    Raises ValueError when documents may not be cut (see `Corpus.check_cuts`).
    """
    sources = corpus.pieces(max_document_tokens)
    choice = choose(sources, max_tokens)
    source, start, length = FixedOrder(sources)(choice.number)
    count = choice.length.copy()
    if choice.cut:  # its last input is there for the target before it only
        count[-1] -= 1
    return Segments(source, start, length, np.zeros_like(start), count)._longest_first()


@dataclass(frozen=True)
class SegmentWindow:
    """K columns of this rank's lanes. `kept` (B,): the lane of the window before that each continues or takes over.

    A segment begins in column 0 of a window, which is its reset. `position` (K, B) counts the inputs of the piece up to
    this one, from 1. Loss weights are 0 where a lane has read its segment to the end.
    """

    columns: Window
    position: torch.Tensor
    kept: torch.Tensor


def segment_windows(corpus: Corpus, segments: Segments, lanes: int, window: int) -> Iterator[SegmentWindow]:
    """Reads all segments, at most `lanes` at a time: the longest first, the next one when a lane has ended its own.

    When there is no next one the lane is left out of later windows.
    """
    window = min(window, segments.longest) if len(segments.count) else window
    width = min(lanes, len(segments.count))
    segment, done, begun = np.arange(width), np.zeros(width, dtype=np.int64), width
    kept = np.arange(width)
    while segment.size:
        yield SegmentWindow(*_filled(corpus, segments, segment, done, window), kept=torch.from_numpy(kept))
        done = done + window
        kept = np.arange(len(segment))
        ended = np.flatnonzero(done >= segments.count[segment])
        fresh = np.arange(begun, min(begun + len(ended), len(segments.count)))
        segment[ended[: len(fresh)]], done[ended[: len(fresh)]] = fresh, 0
        begun += len(fresh)
        kept, segment, done = (np.delete(x, ended[len(fresh) :]) for x in (kept, segment, done))


def _filled(corpus: Corpus, segments: Segments, segment: Ints, done: Ints, window: int) -> tuple[Window, torch.Tensor]:
    """The next columns of each lane's segment, of which `done` inputs were read, and their positions."""
    own = segments._take(segment)
    shape = (window, len(segment))
    inputs_KB, targets_KB = (np.full(shape, corpus.eot_id, dtype=np.int64) for _ in range(2))
    weights_KB = np.zeros(shape, dtype=np.float32)
    within_KB = done + np.arange(window)[:, None]  # inputs of the segment before this one
    offset_KB = own.offset + within_KB  # inputs of the piece before this one
    there_KB = within_KB < own.count
    closing_KB = offset_KB == own.length - 1  # the target is the EOT that closes the piece
    for s, store in enumerate(corpus.stores):
        mine_KB = there_KB & (own.source == s)
        place = (own.start + offset_KB)[mine_KB]
        inputs_KB[mine_KB] = np.where(offset_KB[mine_KB] == 0, corpus.eot_id, store.tokens[place])
        if store.targets is not None:
            targets_KB[mine_KB] = store.targets[place]
        else:
            targets_KB[mine_KB] = np.where(closing_KB[mine_KB], corpus.eot_id, store.tokens[place + 1])
        weights_KB[mine_KB] = 1
        if store.counted is not None:
            # The EOT that closes a cut piece counts as the piece's last token does, as in `fill_window`.
            cut = closing_KB[mine_KB] & (store.tokens[place + 1] != corpus.eot_id)
            weights_KB[mine_KB] = store.counted[np.where(cut, place, place + 1)]
    reset_KB = np.zeros(shape, dtype=bool)
    reset_KB[0] = done == 0
    tensors = (torch.from_numpy(x) for x in (inputs_KB, targets_KB, reset_KB, weights_KB))
    return Window(*tensors), torch.from_numpy(offset_KB + 1)
