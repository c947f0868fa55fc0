"""The times of phases add up to the time that has passed, whatever is inside what."""

from __future__ import annotations

import threading

from gptb_ds import phases
from gptb_ds.phases import PhaseClock, phase


class Clock:
    """A time that the test moves."""

    def __init__(self) -> None:
        self.time, self.settled = 0.0, 0

    def settle(self) -> None:
        self.settled += 1

    def now(self) -> float:
        return self.time


def test_each_moment_is_charged_to_the_innermost_phase():
    time = Clock()
    clock = PhaseClock(time.settle, time.now)
    phases.use(clock)
    try:
        time.time = 1
        with phase("backward"):
            time.time = 3
            with phase("communication"):
                time.time = 7
            time.time = 8
        with phase("backward"):
            time.time = 18
        time.time = 20
    finally:
        phases.use(None)
    with phase("nobody asks"):
        time.time = 21
    clock.close()
    assert clock.seconds == {"other": 1 + 3, "backward": 2 + 1 + 10, "communication": 4}
    assert sum(clock.seconds.values()) == time.time and time.settled == 7


def test_a_phase_may_take_all_and_other_threads_count_nothing():
    time = Clock()
    clock = PhaseClock(time.settle, time.now)
    clock.charge_all_to("set-up")
    with clock.within("forward"):
        time.time = 5
    clock.charge_all_to(None)

    def elsewhere() -> None:
        with clock.within("checkpoint"):
            time.time = 7

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    clock.close()
    assert clock.seconds == {"set-up": 5, "other": 2}
