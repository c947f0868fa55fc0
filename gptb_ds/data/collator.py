"""The windows of training: copies what `lanes` plans out of the stores, ahead of the training where asked.

Axes: B lanes of this rank, K steps of a window.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from gptb_ds.data.corpus import Corpus
from gptb_ds.data.curriculum import Curriculum
from gptb_ds.data.document_order import Ints, Locate, ShuffledOrder, below, keys_of
from gptb_ds.data.lanes import Cursor, rank_lanes
from gptb_ds.data.stagger import StaggeredOrder
from gptb_ds.data.window import Window, fill_window

_BLOCK_INPUTS = 1 << 20  # inputs of a block of windows (8 MiB), and
_BLOCK_WINDOWS = 64  # the most windows of one
_WORDS = 1 << 32
_KEEP_STREAM = 1 << 41  # of keys, beside those of the order


@dataclass(frozen=True)
class Block:
    """Windows that were made in one go, and where the lanes stood before the first: `ordinal` and `offset` (B,).

    `column`: so many columns were read before.
    """

    ordinal: Ints
    offset: Ints
    column: int
    windows: list[Window]


class LaneCollator:
    """The endless windows of one rank's lanes.

    Windows are made a block at a time, because a lane costs the same to plan for one column as for a thousand. With
    `ahead` a thread makes so many blocks beyond the one in use, while the device computes. So planning is always
    further than training, and the place where it stands is of no use to a checkpoint. The position is kept in one form
    only: where the block in use began, and how many of its windows were handed out. `state_dict` replays these from
    the block's beginning, which costs as much as planning a block.

    `wait_seconds` is the time that `next_window` has taken in all.
    """

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
        stagger: bool = False,
        curriculum: Curriculum | None = None,
        keep_state_probability: float = 0.0,
        ahead: int = 0,
    ) -> None:
        """`lanes` is L, of all ranks; `stagger` puts them out of step (`StaggeredOrder`).

        `curriculum`: documents begin short, and grow (`grow`). `keep_state_probability`: so often a document starts
        without its reset flag, on top of the state that the one before left; never a lane's first.

        Raises ValueError when the ranks don't divide the lanes.
        """
        own = rank_lanes(lanes, rank, world_size)
        self.corpus, self.lanes, self.window, self.ahead = corpus, lanes, window, ahead
        self._order: Locate = ShuffledOrder(corpus.pieces(max_document_tokens), seed, corpus.shares)
        if stagger:
            corpus.check_cuts("data.stagger on")
            self._order = StaggeredOrder(self._order, lanes, seed)
        self._own = np.arange(own.start, own.stop)
        self._block_windows = min(max(1, _BLOCK_INPUTS // (window * len(own))), _BLOCK_WINDOWS)
        self._thread: _ReadAhead | None = None
        self.wait_seconds = 0.0
        self.curriculum, self._seed, self._keep_state = curriculum, seed, keep_state_probability
        self._block, self._given = Block(self._own, np.zeros_like(self._own), 0, []), 0
        self._cursor = self._cursor_at(self._block.ordinal, self._block.offset, 0)
        text = f"{corpus.fingerprint}/{max_document_tokens}" + ("/own epochs" if corpus.shares else "")
        text += "/stagger" if stagger else ""
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:32]

    def next_window(self) -> Window:
        """The next K columns; the position moves on by a window. Raises what making them raised."""
        began = time.perf_counter()
        if self._given == len(self._block.windows):
            self._block, self._given = self._next_block(), 0
        self._given += 1
        self.wait_seconds += time.perf_counter() - began
        return self._block.windows[self._given - 1]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The position after the last window handed out: `ordinal` and `offset`, int64 (B,), lane by lane."""
        cursor = self._cursor_at(self._block.ordinal, self._block.offset, self._block.column)
        cursor.advance(self._given * self.window)
        return {"ordinal": torch.from_numpy(cursor.ordinal), "offset": torch.from_numpy(cursor.offset)}

    @property
    def column(self) -> int:
        """How many columns were handed out since the lanes began."""
        return self._block.column + self._given * self.window

    def grow(self) -> None:
        """Documents that begin from now on are longer: the curriculum has grown at the next window's first column."""
        assert self.curriculum is not None
        self.close()
        at, column = self.state_dict(), self.column
        self.curriculum = self.curriculum.after(column)
        self._continue_at(at["ordinal"].numpy(), at["offset"].numpy(), column)

    def load_state_dict(self, state: dict[str, torch.Tensor], column: int = 0, grown: Sequence[int] = ()) -> None:
        """Continues at a saved position of the same lanes (concatenate or slice those of other ranks by lane).

        `column`: columns read before, and `grown`: those at which the curriculum has grown; only it depends on them.
        What was made ahead is dropped. Raises ValueError when it is not a position of these lanes in this corpus.
        """
        ordinal, offset = (np.asarray(state[name], dtype=np.int64) for name in ("ordinal", "offset"))
        if ordinal.shape != self._own.shape or offset.shape != self._own.shape:
            raise ValueError(f"position of {len(ordinal)} lanes, but this rank has {len(self._own)} of {self.lanes}")
        if (ordinal % self.lanes != self._own).any() or (ordinal < 0).any():
            raise ValueError(f"the position is not one of lanes {self._own[0]} to {self._own[-1]} of {self.lanes}")
        curriculum = self.curriculum
        if curriculum is not None:
            self.curriculum = replace(curriculum, grown=tuple(grown))
        cursor = self._cursor_at(ordinal, offset, column)
        if (offset < 0).any() or (offset >= cursor.length).any():
            self.curriculum = curriculum
            raise ValueError("the position lies beyond a document's end: it was saved with another corpus or seed")
        if self._thread is not None:
            self._thread.close()
            self._thread = None
        self._continue_at(ordinal, offset, column)

    def close(self) -> None:
        """Ends the thread. What it made is dropped; the position stays, and the next window starts it again."""
        if self._thread is not None:
            self._thread.close()
            self._thread = None
            at, column = self.state_dict(), self.column
            self._continue_at(at["ordinal"].numpy(), at["offset"].numpy(), column)

    def _continue_at(self, ordinal: Ints, offset: Ints, column: int) -> None:
        self._cursor = self._cursor_at(ordinal, offset, column)
        self._block, self._given = Block(ordinal.copy(), offset.copy(), column, []), 0

    def _cursor_at(self, ordinal: Ints, offset: Ints, column: int) -> Cursor:
        cut = None if self.curriculum is None else self.curriculum.cut
        return Cursor(self._order, ordinal, offset, self.lanes, column=column, cut=cut)

    def _keeps_state(self, ordinal: Ints) -> npt.NDArray[np.bool_]:
        """Which documents start without a reset: drawn by seed and ordinal, so the same on any ranks."""
        drawn = below(np.uint64(_WORDS), keys_of(self._seed, _KEEP_STREAM, ordinal))
        return (drawn < np.uint64(round(self._keep_state * _WORDS))) & (ordinal >= self.lanes)

    def _next_block(self) -> Block:
        if not self.ahead:
            return self._make_block()
        if self._thread is None:
            self._thread = _ReadAhead(self._make_block, self.ahead)
        try:
            return self._thread.take()
        except BaseException:
            self.close()
            raise

    def _make_block(self) -> Block:
        """The next block of the plan; called by the thread alone where there is one."""
        ordinal, offset, column = self._cursor.ordinal.copy(), self._cursor.offset.copy(), self._cursor.column
        columns = self.window * self._block_windows
        plan = self._cursor.advance(columns)
        # A copy to a GPU overlaps with computing only out of pinned memory.
        filled = fill_window(
            self.corpus,
            plan,
            columns,
            pin_memory=self.ahead > 0 and torch.cuda.is_available(),
            keeps_state=self._keeps_state if self._keep_state else None,
        )
        return Block(ordinal, offset, column, filled.split_columns(self.window))


class _ReadAhead:
    """A thread that makes blocks until it is closed, at most `depth` beyond those taken."""

    def __init__(self, make: Callable[[], Block], depth: int) -> None:
        self._make, self._stop = make, threading.Event()
        self._made: queue.Queue[Block | BaseException] = queue.Queue(depth)
        self._thread = threading.Thread(target=self._work, name="windows", daemon=True)
        self._thread.start()

    def take(self) -> Block:
        """The next block. Raises what making it raised."""
        made = self._made.get()
        if isinstance(made, BaseException):
            raise made
        return made

    def close(self) -> None:
        """Returns when the thread has ended."""
        self._stop.set()
        while self._thread.is_alive():  # it may wait for room in the queue
            try:
                self._made.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                self._made.put(self._make())
        except BaseException as error:
            self._made.put(error)
