"""What a process spends its time on: phases that are entered and left, of which one is current at any time.

The times of all phases add up to the time that has passed, because each moment is charged to the innermost phase.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

OTHER = "other"


class PhaseClock:
    """Seconds by phase, of the thread that made it."""

    def __init__(self, settle: Callable[[], None], now: Callable[[], float] = time.perf_counter) -> None:
        """`settle` returns when what was launched has run (on a GPU): then it is charged to who launched it."""
        self.seconds: dict[str, float] = {}
        self._settle, self._now = settle, now
        self._stack, self._since = [OTHER], now()
        self._all: str | None = None
        self._mark: Callable[[str], AbstractContextManager[object]] = nullcontext
        self._thread = threading.get_ident()

    def charge(self, phase: str, seconds: float) -> None:
        """Adds time that has passed elsewhere."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def charge_all_to(
        self, phase: str | None, mark: Callable[[str], AbstractContextManager[object]] = nullcontext
    ) -> None:
        """From here on all time is charged to `phase`, and phases are marked only; None: to each phase its own again.

        Call it outside of all phases.
        """
        self.close()
        self._all, self._mark = phase, mark

    def close(self) -> None:
        """Charges what has passed until now."""
        self._settle()
        now = self._now()
        self.charge(self._all or self._stack[-1], now - self._since)
        self._since = now

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Time inside is charged to `phase`, less what inner phases take. Of other threads nothing is counted."""
        if threading.get_ident() != self._thread:
            yield
        elif self._all is not None:
            with self._mark(phase):
                yield
        else:
            self.close()
            self._stack.append(phase)
            try:
                yield
            finally:
                self.close()
                self._stack.pop()


class _Process:
    """This process's clock, if there is one."""

    clock: PhaseClock | None = None


def use(clock: PhaseClock | None) -> None:
    """From here on `phase` charges this clock; None: nothing is charged."""
    _Process.clock = clock


@contextmanager
def phase(name: str) -> Iterator[None]:
    """What is inside is `name`. A function of the process, so that nobody has to hand a clock through the layers."""
    clock = _Process.clock
    if clock is None:
        yield
        return
    with clock.within(name):
        yield
