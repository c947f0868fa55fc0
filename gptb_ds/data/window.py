"""A window of token columns: what it holds, and how it is copied out of the stores.

Axes: B lanes of this rank, K steps of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.stride_tricks import sliding_window_view

from gptb_ds.data.corpus import Corpus
from gptb_ds.data.document_order import Ints
from gptb_ds.data.lanes import CopyPlan, runs

_TURNED_LANES = 256


@dataclass(frozen=True)
class Window:
    """K columns of this rank's lanes. `loss_weights` None: every target counts 1.

    `input_ids` and `targets` (K, B) int64, `reset` (K, B) bool, `loss_weights` (K, B) float32. A lane's target is its
    next input, so the two share memory: treat them as read-only.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    reset: torch.Tensor
    loss_weights: torch.Tensor | None = None

    @property
    def lanes(self) -> int:
        """B, the number of its lanes."""
        return self.input_ids.shape[1]

    @property
    def counted(self) -> float:
        """How many targets count in the loss: their number, or the sum of their weights.

        It reads the weights, so ask before the window moves to a device: a GPU would be waited for.
        """
        if self.loss_weights is None:
            return float(self.targets.numel())
        return self.loss_weights.double().sum().item()

    def to(self, device: torch.device) -> Window:
        """The window on `device`; a copy out of pinned memory is not waited for."""
        return self._from_parts([[tensor.to(device, non_blocking=True)] for tensor in self._tensors()])[0]

    def without(self, skips: Sequence[tuple[range, range]], first_lane: int, first_column: int) -> Window:
        """With loss weights of 0 where the columns of `skips`, (lanes, columns), are; `first_...` are this window's.

        All ranks must call it with the same skips and column: any skip in these columns gives all of them loss weights,
        so that they count targets alike.
        """
        steps = range(first_column, first_column + self.targets.shape[0])
        here = [
            (lanes, columns) for lanes, columns in skips if columns.start < steps.stop and columns.stop > steps.start
        ]
        if not here:
            return self
        weights_KB = torch.ones(self.targets.shape) if self.loss_weights is None else self.loss_weights.clone()
        for lanes, columns in here:
            low, high = max(lanes.start - first_lane, 0), max(lanes.stop - first_lane, 0)
            weights_KB[max(columns.start - first_column, 0) : columns.stop - first_column, low:high] = 0
        return replace(self, loss_weights=weights_KB)

    def split_lanes(self, groups: int) -> list[Window]:
        """Its lanes in `groups` equal parts, without copying: part g has the lanes g, g + groups, g + 2 groups, ...

        So that a lane's part is its global number modulo `groups`, on any number of ranks.
        """
        return self._from_parts([[tensor[:, g::groups] for g in range(groups)] for tensor in self._tensors()])

    def split_columns(self, columns: int) -> list[Window]:
        """Its columns in windows of `columns`, without copying."""
        return self._from_parts([tensor.split(columns) for tensor in self._tensors()])

    def _tensors(self) -> list[torch.Tensor]:
        fields = [self.input_ids, self.targets, self.reset]
        return fields if self.loss_weights is None else [*fields, self.loss_weights]

    @staticmethod
    def _from_parts(parts: Sequence[Sequence[torch.Tensor]]) -> list[Window]:
        return [Window(*tensors) for tensors in zip(*parts, strict=True)]


def fill_window(
    corpus: Corpus,
    plan: CopyPlan,
    window: int,
    *,
    finite: bool = False,
    pin_memory: bool = False,
    keeps_state: Callable[[Ints], npt.NDArray[np.bool_]] | None = None,
) -> Window:
    """Copies what `plan` names. `finite`: lanes may have run out, so that the window has loss weights in any case.

    `keeps_state` says, by their ordinals, at which documents' starts the reset flag is left out.
    """
    stores = corpus.stores
    lanes = len(plan.first.lane)
    # One column more than the window: a lane's target is its next input, and after its last token the next EOT.
    rows_BK = np.full((lanes, window + 1), corpus.eot_id, dtype=stores[0].tokens.dtype)
    _copy(rows_BK, [store.tokens for store in stores], plan, extra=1, exact=finite)
    rows_BK[plan.reset_lane, plan.reset_column] = corpus.eot_id
    # (B, K+1) -> (K+1, B): turned while the ids are 2 or 4 bytes wide, then widened to the 8 that torch wants.
    columns_KB = torch.empty((window + 1, lanes), dtype=torch.int64, pin_memory=pin_memory)
    columns_KB.copy_(torch.from_numpy(_turned(rows_BK)))
    reset_KB = torch.zeros((window + 1, lanes), dtype=torch.bool, pin_memory=pin_memory)
    reset_KB.numpy()[plan.reset_column, plan.reset_lane] = (
        True if keeps_state is None else ~keeps_state(plan.reset_ordinal)
    )
    targets_KB = columns_KB[1:]
    if any(store.targets is not None for store in stores):
        targets_KB = _own_targets(targets_KB, corpus, plan)
    weights_KB = None
    if finite or any(store.counted is not None for store in stores):
        counted_BK = np.zeros((lanes, window), dtype=np.uint8)
        _copy(counted_BK, [store.counted for store in stores], plan, ahead=1, exact=finite)
        _weigh_cut_ends(counted_BK, corpus, plan)
        weights_KB = torch.empty((window, lanes), dtype=torch.float32, pin_memory=pin_memory)
        np.copyto(weights_KB.numpy(), counted_BK.T)
    return Window(columns_KB[:-1], targets_KB, reset_KB[:-1], weights_KB)


def _turned(rows_BK: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
    """Its transpose (K, B), some lanes at a time: their rows stay in the cache while they are read column by column."""
    turned_KB = np.empty(rows_BK.shape[::-1], dtype=rows_BK.dtype)
    for start in range(0, len(rows_BK), _TURNED_LANES):
        turned_KB[:, start : start + _TURNED_LANES] = rows_BK[start : start + _TURNED_LANES].T
    return turned_KB


def _own_targets(next_KB: torch.Tensor, corpus: Corpus, plan: CopyPlan) -> torch.Tensor:
    """The targets (K, B): the next inputs, but what stands in the store where it has targets of its own."""
    targets_BK = next_KB.t().clone(memory_format=torch.contiguous_format)
    window = targets_BK.shape[1]
    for part in (plan.first, plan.later):
        for s, store in enumerate(corpus.stores):
            if store.targets is not None:
                mine = np.flatnonzero(part.source == s)
                lane, column, start, count = part.lane[mine], part.column[mine], part.start[mine], part.count[mine]
                target = runs(lane * window + column, count)
                taken = store.targets[target + np.repeat(start - lane * window - column, count)]
                targets_BK.numpy().reshape(-1)[target] = taken
    return targets_BK.t().contiguous()


def _weigh_cut_ends(counted_BK: npt.NDArray[np.uint8], corpus: Corpus, plan: CopyPlan) -> None:
    """The EOT that closes a cut piece counts as the piece's last token does.

    What follows in the store is the flag of the token after the cut. It says nothing about this EOT: a piece that holds
    a prompt only would train an EOT after it.
    """
    lanes, window = counted_BK.shape
    ends_BK = np.zeros((lanes, window + 1), dtype=bool)
    ends_BK[plan.reset_lane, plan.reset_column] = True
    for part in (plan.first, plan.later):
        column, after = part.column + part.count, part.start + part.count
        for s, store in enumerate(corpus.stores):
            mine = np.flatnonzero((part.source == s) & ends_BK[part.lane, column])
            if store.counted is not None and mine.size:
                cut = mine[store.tokens[after[mine]] != corpus.eot_id]
                counted_BK[part.lane[cut], column[cut] - 1] = store.counted[after[cut] - 1]


def _copy(
    rows_BK: npt.NDArray[np.integer],
    sources: Sequence[npt.NDArray[np.integer] | None],
    plan: CopyPlan,
    *,
    ahead: int = 0,
    extra: int = 0,
    exact: bool,
) -> None:
    """Copies the plan's fragments, from `ahead` positions on and `extra` longer; a source of None is all ones.

    Most lanes are inside one document for the whole window. Copying each lane's fragment token by token, through an
    index of every token, costs as much for these as for the few lanes that change documents. So the first fragment of
    every lane is copied as a whole row, as if its document went on to the window's end: rows of a sliding view of the
    store are runs of memory. What such a row has too much (the neighbour in the store) is then covered by the lane's
    later fragments, which is why those come second. A lane without later fragments has none too much.

    `exact` forbids that: where lanes can run out, nothing covers what the row had too much.
    """
    width = rows_BK.shape[1]
    for part in (plan.first, plan.later):
        for s, data in enumerate(sources):
            mine = slice(None) if len(sources) == 1 and not exact else np.flatnonzero(part.source == s)
            lane, start, count = part.lane[mine], part.start[mine] + ahead, part.count[mine] + extra
            column = part.column[mine]
            if data is not None and part is plan.first and not exact and len(data) >= width:
                # A row that would pass the store's end is copied by its count instead.
                last = len(data) - width
                rows_BK[mine] = sliding_window_view(data, width)[np.minimum(start, last)]
                beyond = np.flatnonzero(start > last)
                lane, start, count, column = (x[beyond] for x in (lane, start, count, column))
            # Places in the flat (B * K) rows; the place in the store is as far from the fragment's start.
            target = runs(lane * width + column, count)
            if data is None:
                rows_BK.reshape(-1)[target] = 1
            else:
                rows_BK.reshape(-1)[target] = data[target + np.repeat(start - lane * width - column, count)]
