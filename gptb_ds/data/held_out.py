"""Held-out windows: every document read once, from its start.

Axes: K steps of a window.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gptb_ds.data.corpus import Corpus
from gptb_ds.data.lanes import Cursor, FixedOrder, Pieces, rank_lanes
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
    """Every document of the corpus exactly once, in the order of the store, as windows with loss weights.

    Lane l reads documents l, l+L, ..; what follows its last one is EOT with weight 0. All ranks yield the same number
    of windows. `max_tokens` cuts after so many columns that at most so many targets are read over all ranks (at least
    one column), of documents from all over the corpus. Raises ValueError when the ranks don't divide the lanes.
    """
    own = rank_lanes(lanes, rank, world_size)
    sources = [Pieces(store.offsets, max_document_tokens) for store in corpus.stores]
    order = FixedOrder(sources, mixed=max_tokens is not None and max_tokens < sum(pieces.inputs for pieces in sources))
    columns = _held_out_columns(order, sum(pieces.count for pieces in sources), lanes, max_tokens)
    ordinal = np.arange(own.start, own.stop)
    cursor = Cursor(order, ordinal, np.zeros_like(ordinal), lanes)
    for first in range(0, columns, window):
        filled = fill_window(corpus, cursor.advance(window), window, finite=True)
        assert filled.loss_weights is not None
        filled.loss_weights[columns - first :] = 0
        yield filled


def _held_out_columns(order: FixedOrder, count: int, lanes: int, max_tokens: int | None) -> int:
    """Columns until the longest lane has ended, or until `max_tokens` targets are read over all lanes."""
    totals = np.zeros(lanes, dtype=np.int64)
    for first in range(0, count, 1 << 20):
        number = np.arange(first, min(first + (1 << 20), count))
        totals += np.bincount(number % lanes, weights=order(number)[2], minlength=lanes).astype(np.int64)
    columns = int(totals.max())
    if max_tokens is None or int(totals.sum()) <= max_tokens:
        return columns
    low, high = 1, columns  # the most columns whose targets are within max_tokens lies in [low, high)
    while high - low > 1:
        middle = (low + high) // 2
        within = int(np.minimum(totals, middle).sum()) <= max_tokens
        low, high = (middle, high) if within else (low, middle)
    return low
