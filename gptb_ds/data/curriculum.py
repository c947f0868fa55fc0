"""A curriculum by length: the documents of a task begin short, and grow when the run says so.

All arrays are int64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from gptb_ds.data.document_order import Ints


@dataclass(frozen=True)
class Curriculum:
    """How much of its document a lane reads: a share that doubles at each of the columns in `grown`, up to all.

    A document of n tokens is read as its first ceil(n * `limit` / `longest`): lengths that are uniform from 1 to
    `longest` in the store are uniform from 1 to `limit` in the lanes. The limit is that of the column at which the
    document begins, so a document keeps its length. With the columns of growth given, what a lane reads is a function
    of the content, the seed and L, as it is without.
    """

    start: int
    longest: int
    grown: tuple[int, ...] = ()

    @property
    def limit(self) -> int:
        """The most tokens of a document that begins now."""
        return int(self._limits(np.array([len(self.grown)]))[0])

    @property
    def is_full(self) -> bool:
        """Whether documents are read to their end."""
        return self.limit == self.longest

    def after(self, column: int) -> Curriculum:
        """It has grown once more: documents that begin at this column or later are longer."""
        return replace(self, grown=(*self.grown, column))

    def cut(self, inputs: Ints, column: Ints) -> Ints:
        """How many inputs (its EOT and tokens) are read of each document, which has `inputs` and begins at `column`."""
        limits = self._limits(np.searchsorted(np.array(self.grown, dtype=np.int64), column, side="right"))
        return 1 + -(-(inputs - 1) * limits // self.longest)

    def _limits(self, steps: Ints) -> Ints:
        most = (self.longest // self.start).bit_length()  # doublings beyond this change nothing, but would overflow
        return np.minimum(self.longest, self.start << np.minimum(steps, most))
