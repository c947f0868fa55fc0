"""The windows: copies what `lanes` plans from the stores into time-major columns, ahead of the training.

Axes: B lanes of this rank, K steps of a window.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.stride_tricks import sliding_window_view

from gptb_ds.data.corpus import Mixture
from gptb_ds.data.documents import DocumentStore
from gptb_ds.data.lanes import Cursor, FixedOrder, Ints, Pieces, Plan, ShuffledOrder, rank_lanes, runs

Corpus = DocumentStore | Mixture

_BLOCK_INPUTS = 1 << 20  # inputs of a block of windows (8 MiB), and
_BLOCK_WINDOWS = 64  # the most windows of one


@dataclass(frozen=True)
class Window:
    """K columns of this rank's lanes. `weights` None: every target counts 1.

    `input_ids` and `targets` (K, B) int64, `reset` (K, B) bool, `weights` (K, B) float32. A lane's target is its next
    input, so the two share memory: treat them as read-only.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    reset: torch.Tensor
    weights: torch.Tensor | None = None

    def split(self, window: int) -> list[Window]:
        """Its columns in windows of `window`, without copying."""
        parts = [self.input_ids.split(window), self.targets.split(window), self.reset.split(window)]
        weights = self.weights.split(window) if self.weights is not None else [None] * len(parts[0])
        return [Window(*fields) for fields in zip(*parts, weights, strict=True)]


class Position(NamedTuple):
    """`windows` after the place where the lanes have `ordinal` and `offset` (B,)."""

    ordinal: Ints
    offset: Ints
    windows: int


class LaneCollator:
    """The endless windows of one rank's lanes."""

    def __init__(
        self,
        corpus: Corpus,
        *,
        lanes: int,
        window: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        max_document_tokens: int | None = None,
    ) -> None:
        """`lanes` is L, of all ranks. Raises ValueError when the ranks don't divide it."""
        own = rank_lanes(lanes, rank, world_size)
        self.corpus, self.lanes, self.window = corpus, lanes, window
        pieces = [Pieces(store.offsets, max_document_tokens) for store in corpus.stores]
        self._order = ShuffledOrder(pieces, seed, corpus.weights)
        self._own = np.arange(own.start, own.stop)
        # Windows are made a block at a time: that spreads what a lane costs over many more columns.
        self._ahead = min(max(1, _BLOCK_INPUTS // (window * len(own))), _BLOCK_WINDOWS)
        self._block: list[Window] = []
        self._given = 0
        self._continue_at(self._own, np.zeros_like(self._own))
        self.pin_memory = False
        text = f"{corpus.fingerprint}/{max_document_tokens}"
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:32]

    def next_window(self) -> Window:
        """The next K columns; the position moves on by a window."""
        if self._given == len(self._block):
            self._start, self._given = (self._cursor.ordinal.copy(), self._cursor.offset.copy()), 0
            columns = self.window * self._ahead
            plan = self._cursor.advance(columns)
            self._block = fill_window(self.corpus, plan, columns, pin_memory=self.pin_memory).split(self.window)
        self._given += 1
        return self._block[self._given - 1]

    def position(self) -> Position:
        """Where the lanes are, cheaply; `state_dict` works it out."""
        return Position(*self._start, self._given)

    def state_dict(self, position: Position | None = None) -> dict[str, torch.Tensor]:
        """The position: `ordinal` and `offset`, int64 (B,), of this rank's lanes in their order."""
        at = position or self.position()
        cursor = Cursor(self._order, at.ordinal, at.offset, self.lanes)
        cursor.advance(at.windows * self.window)
        return {"ordinal": torch.from_numpy(cursor.ordinal), "offset": torch.from_numpy(cursor.offset)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Continues at a saved position of the same lanes (concatenate or slice those of other ranks by lane).

        Raises ValueError when it is not a position of these lanes in this corpus.
        """
        ordinal, offset = (np.asarray(state[name], dtype=np.int64) for name in ("ordinal", "offset"))
        if ordinal.shape != self._own.shape or offset.shape != self._own.shape:
            raise ValueError(f"position of {len(ordinal)} lanes, but this rank has {len(self._own)} of {self.lanes}")
        if (ordinal % self.lanes != self._own).any() or (ordinal < 0).any():
            raise ValueError(f"the position is not one of lanes {self._own[0]} to {self._own[-1]} of {self.lanes}")
        cursor = Cursor(self._order, ordinal, offset, self.lanes)
        if (offset < 0).any() or (offset >= cursor.length).any():
            raise ValueError("the position lies beyond a document's end: it was saved with another corpus or seed")
        self._continue_at(ordinal, offset)

    def _continue_at(self, ordinal: Ints, offset: Ints) -> None:
        self._cursor = Cursor(self._order, ordinal, offset, self.lanes)
        self._start, self._given = (ordinal.copy(), offset.copy()), 0
        self._block = []


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
    """Every document of the corpus exactly once, in the order of the store, as windows with weights.

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
        assert filled.weights is not None
        filled.weights[columns - first :] = 0
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


def fill_window(corpus: Corpus, plan: Plan, window: int, *, finite: bool = False, pin_memory: bool = False) -> Window:
    """Copies what `plan` names. `finite`: lanes may have run out, so that the window has weights in any case."""
    stores = corpus.stores
    lanes = len(plan.first.lane)
    # One column more than the window: a lane's target is its next input, and after its last token the next EOT.
    rows_BK = np.full((lanes, window + 1), corpus.eot_id, dtype=stores[0].tokens.dtype)
    _copy(rows_BK, [store.tokens for store in stores], plan, extra=1, exact=finite)
    rows_BK[plan.reset_lane, plan.reset_column] = corpus.eot_id
    columns_KB = torch.empty((window + 1, lanes), dtype=torch.int64, pin_memory=pin_memory)
    columns_KB.copy_(torch.from_numpy(rows_BK).t().contiguous())  # turned while it is small, then widened
    reset_KB = torch.zeros((window + 1, lanes), dtype=torch.bool, pin_memory=pin_memory)
    reset_KB.numpy()[plan.reset_column, plan.reset_lane] = True
    weights_KB = None
    if finite or any(store.counted is not None for store in stores):
        counted_BK = np.zeros((lanes, window), dtype=np.uint8)
        _copy(counted_BK, [store.counted for store in stores], plan, ahead=1, exact=finite)
        weights_KB = torch.empty((window, lanes), dtype=torch.float32, pin_memory=pin_memory)
        np.copyto(weights_KB.numpy(), counted_BK.T)
    return Window(columns_KB[:-1], columns_KB[1:], reset_KB[:-1], weights_KB)


def _copy(
    rows_BK: npt.NDArray[Any],
    sources: Sequence[npt.NDArray[Any] | None],
    plan: Plan,
    *,
    ahead: int = 0,
    extra: int = 0,
    exact: bool,
) -> None:
    """Copies the plan's fragments, from `ahead` positions on and `extra` longer; a source of None is all ones.

    Not `exact`: what lies between the end of a lane's first fragment and its later ones may be anything.
    """
    width = rows_BK.shape[1]
    for part in (plan.first, plan.later):  # in this order: `later` repairs what `first` copies too much
        for s, data in enumerate(sources):
            mine = slice(None) if len(sources) == 1 and not exact else np.flatnonzero(part.source == s)
            lane, start, count = part.lane[mine], part.start[mine] + ahead, part.count[mine] + extra
            column = part.column[mine]
            if data is not None and part is plan.first and not exact and len(data) >= width:
                # Rows of a sliding view are copied as runs; left over are those that would pass the store's end.
                last = len(data) - width
                rows_BK[mine] = sliding_window_view(data, width)[np.minimum(start, last)]
                beyond = np.flatnonzero(start > last)
                lane, start, count, column = (x[beyond] for x in (lane, start, count, column))
            target = runs(lane * width + column, count)
            if data is None:
                rows_BK.reshape(-1)[target] = 1
            else:
                rows_BK.reshape(-1)[target] = data[target + np.repeat(start - lane * width - column, count)]


class Prefetcher:
    """Makes windows ahead in a thread; its position is that after the last window handed out.

    `wait_seconds` is the time that `next_window` has waited in all.
    """

    def __init__(self, collator: LaneCollator, depth: int = 2) -> None:
        self.collator, self.depth = collator, depth
        self.wait_seconds = 0.0
        collator.pin_memory = torch.cuda.is_available()
        self._position = collator.position()
        self._thread: threading.Thread | None = None

    def next_window(self) -> Window:
        """The collator's next window. Raises what making it raised."""
        if self._thread is None:
            self._start()
        began = time.perf_counter()
        made = self._queue.get()
        self.wait_seconds += time.perf_counter() - began
        if isinstance(made, BaseException):
            self.close()
            raise made
        window, self._position = made
        return window

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The position after the last window handed out (see `LaneCollator.state_dict`)."""
        return self.collator.state_dict(self._position)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Drops what was made ahead and continues at `state`. Raises ValueError as the collator does."""
        self.close()
        self.collator.load_state_dict(state)
        self._position = self.collator.position()

    def close(self) -> None:
        """Ends the thread; windows made ahead are dropped, the position stays and the next window starts it again."""
        if self._thread is None:
            return
        self._stop.set()
        while self._thread.is_alive():  # it may wait for room in the queue
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)
        self._thread = None
        self.collator.load_state_dict(self.state_dict())
        self._position = self.collator.position()

    def _start(self) -> None:
        self._stop = threading.Event()
        self._queue: queue.Queue[Any] = queue.Queue(self.depth)
        self._thread = threading.Thread(target=self._work, name="windows", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                window = self.collator.next_window()
                self._queue.put((window, self.collator.position()))
        except BaseException as error:
            self._queue.put(error)
