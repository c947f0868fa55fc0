"""When a loss has jumped, and what is left out after it."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from gptb_ds.training.engine import UpdateResult
from gptb_ds.training.loss_jumps import HISTORY, READY, LossAverage, left_out, next_rewind
from gptb_ds.training.snapshots import Snapshots
from gptb_ds.training.train_state import TrainState


def after(losses: list[float]) -> LossAverage:
    average = LossAverage()
    for loss in losses:
        average = average.after(loss)
    return average


def test_the_first_losses_weigh_alike():
    losses = [random.Random(3).gauss(2.0, 0.5) for _ in range(READY)]
    average = after(losses)
    assert average.mean == pytest.approx(statistics.mean(losses))
    assert average.variance == pytest.approx(statistics.pvariance(losses))
    assert average.limit(6.0) == pytest.approx(statistics.mean(losses) + 6 * statistics.pstdev(losses))


def test_later_the_old_ones_are_forgotten():
    long_ago = after([8.0] * 100 + [2.0, 2.2] * (4 * HISTORY))
    assert long_ago.mean == pytest.approx(2.1, abs=0.01)
    assert math.sqrt(long_ago.variance) == pytest.approx(0.1, abs=0.02)


def test_nothing_is_a_jump_at_the_start():
    assert after([1.0] * (READY - 1)).limit(6.0) == math.inf
    assert after([1.0] * READY).limit(6.0) == pytest.approx(1.0)


def test_what_is_left_out_grows_while_jumps_follow_one_another():
    rewinds: list[list[int]] = []
    for number in (100, 101, 103, 107):
        rewinds.append(next_rewind(rewinds, number))
        assert all(number in columns for columns in left_out(rewinds[-1:], 1))
    assert rewinds == [[100, 0], [101, 1], [103, 3], [107, 7]]
    assert left_out(rewinds, 8) == [range(800, 808), range(800, 824), range(800, 856), range(800, 920)]
    assert next_rewind(rewinds, 107 + 7 + READY) == [107 + 7 + READY, 15]
    assert next_rewind(rewinds, 107 + 7 + READY + 1) == [107 + 7 + READY + 1, 0]


def test_nothing_before_the_first_column_is_left_out():
    assert left_out([[2, 3]], 4) == [range(24)]


def test_a_loss_that_rose_for_good_is_a_jump_a_few_times_only():
    state, jumps = TrainState(), 0
    for loss in [2.0, 2.1] * 100 + [3.0] * 20:
        jumps += loss > state.losses.limit(6.0)
        Snapshots.follow_loss(state, [UpdateResult(loss, 1.0, True)])
    assert 1 <= jumps <= 3


def test_what_is_not_finite_or_counts_nothing_is_no_part_of_the_average():
    state = TrainState()
    for losses in ([math.inf, 1.0], [None], [None, 3.0], []):
        Snapshots.follow_loss(state, [UpdateResult(loss, 1.0, True) for loss in losses])
    assert state.losses == LossAverage(3.0, 0.0, 1)
