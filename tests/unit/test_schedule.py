"""What changes over a run: pure functions of the tokens trained so far."""

from __future__ import annotations

import itertools
import math

import pytest

from gptb_ds.config import ConfigError, OptimConfig, TrainConfig, load_config
from gptb_ds.training.schedule import BatchPlan, adam_betas, adam_count, learning_rate, rate_plan, run_tokens

WINDOW = 64  # tokens


def rates(optim: OptimConfig, train: TrainConfig, batches: BatchPlan | None = None) -> list[float]:
    """The rate of every update of a run, in order."""
    batches = batches or BatchPlan(WINDOW, train.batch_phases())
    plan, tokens, found = rate_plan(optim, train, batches), 0, []
    while tokens < plan.end:
        number = batches.updates_per_window(tokens)
        for _ in range(number):
            found.append(learning_rate(tokens, WINDOW // number, optim, plan))
            tokens += WINDOW // number
    return found


def test_shapes_of_the_schedules():
    cosine = rates(OptimConfig(lr=2.0, warmup_updates=10, schedule="cosine"), TrainConfig(updates=100))
    assert cosine[0] == pytest.approx(0.2) and cosine[9] == pytest.approx(2.0)
    assert all(a > b > 0 for a, b in itertools.pairwise(cosine[9:]))
    middle = 10 + (101 - 10) / 2
    assert cosine[int(middle) - 1] == pytest.approx(1.0, abs=0.03)
    linear = OptimConfig(lr=1.0, warmup_updates=0, schedule="linear")
    assert rates(linear, TrainConfig(updates=3)) == pytest.approx([0.75, 0.5, 0.25])
    constant = OptimConfig(lr=1.0, warmup_updates=2, schedule="constant")
    assert rates(constant, TrainConfig(updates=4)) == pytest.approx([0.5, 1, 1, 1])


def test_updates_and_tokens_of_a_plan_are_each_others_inverse():
    plan = BatchPlan(WINDOW, ((8, 200), (2, 500), (1, None)))
    tokens, updates = 0, 0
    while tokens < 20 * WINDOW:
        assert plan.updates_after(tokens) == updates
        number = plan.updates_per_window(tokens)
        for part in range(number):
            assert plan.tokens_after(updates + part) == tokens + part * WINDOW // number
        tokens, updates = tokens + WINDOW, updates + number
    # 200 tokens are reached in the fourth window of 64, 500 in the eighth.
    assert (updates, tokens) == (4 * 8 + 4 * 2 + 12, 20 * WINDOW)


def test_a_run_in_updates_ends_at_the_window_that_holds_its_last():
    batches = BatchPlan(WINDOW, ((4, 100), (1, None)))
    assert run_tokens(TrainConfig(updates=8), batches) == 2 * WINDOW
    assert run_tokens(TrainConfig(updates=7), batches) == 2 * WINDOW
    assert run_tokens(TrainConfig(updates=10), batches) == 4 * WINDOW
    assert run_tokens(TrainConfig(tokens=4 * WINDOW - 1), batches) == 4 * WINDOW


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_is_linear_and_no_update_has_rate_0(schedule):
    optim = OptimConfig(lr=1.0, warmup_updates=4, schedule=schedule)
    found = rates(optim, TrainConfig(updates=20))
    assert len(found) == 20
    assert found[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert min(found) > 0 and max(found) == pytest.approx(1.0)


def test_cosine_equals_its_formula():
    found = rates(OptimConfig(lr=2.0, warmup_updates=3), TrainConfig(updates=10))
    want = [2.0 * (1 + math.cos(math.pi * (update + 1 - 3) / (11 - 3))) / 2 for update in range(3, 10)]
    assert found[3:] == pytest.approx(want)


def test_warm_up_in_tokens_equals_warm_up_in_as_many_updates():
    in_updates = rates(OptimConfig(warmup_updates=5), TrainConfig(updates=20))
    in_tokens = rates(OptimConfig(warmup_tokens=5 * WINDOW), TrainConfig(tokens=20 * WINDOW))
    assert in_updates == in_tokens


def test_stable_then_a_decay_that_starts_where_it_is_told():
    train = TrainConfig(updates=30)
    from_update = rates(OptimConfig(lr=1.0, warmup_updates=2, schedule="wsd", decay_from=20), train)
    assert from_update[2:20] == [1.0] * 18
    assert from_update[20:] == pytest.approx([1 - math.sqrt(k / 11) for k in range(1, 11)])
    by_length = rates(OptimConfig(lr=1.0, warmup_updates=2, schedule="wsd", decay_updates=10), train)
    in_tokens = rates(OptimConfig(lr=1.0, warmup_updates=2, schedule="wsd", decay_tokens=10 * WINDOW), train)
    assert from_update == by_length == in_tokens


def test_a_decay_from_a_checkpoint_goes_on_from_the_same_stable_rate():
    long = rates(OptimConfig(lr=1.0, warmup_updates=2, schedule="wsd"), TrainConfig(updates=1000))
    short = rates(OptimConfig(lr=1.0, warmup_updates=2, schedule="wsd", decay_from=50), TrainConfig(updates=60))
    assert short[:50] == long[:50]


def test_warm_up_counts_the_small_updates_of_a_batch_warm_up():
    train = TrainConfig(updates=24, updates_per_window=["4:128", "1"])
    found = rates(OptimConfig(lr=1.0, warmup_updates=8, schedule="constant"), train)
    assert found[:8] == pytest.approx([k / 8 for k in range(1, 9)])
    assert found[8:] == [1.0] * 16


def test_scaling_with_the_tokens_of_an_update():
    plain = OptimConfig(lr=1.0, warmup_updates=0, schedule="constant")
    train = TrainConfig(updates=3)
    for rule, power in (("linear", 1.0), ("sqrt", 0.5)):
        scaled = plain.model_copy(update={"lr_scaling": rule, "lr_tokens": 16})
        assert rates(scaled, train) == pytest.approx([4.0**power] * 3)
    assert rates(plain, train) == [1.0] * 3


def test_betas_as_half_lives_forget_as_fast_per_token_whatever_the_update():
    optim = OptimConfig(beta1_half_life=1000, beta2_half_life=50_000)
    for tokens in (1, 64, 500, 20_000):
        first, second = adam_betas(tokens, optim)
        assert first ** (1000 / tokens) == pytest.approx(0.5)
        assert second ** (50_000 / tokens) == pytest.approx(0.5)
    assert adam_betas(64, OptimConfig(beta1=0.8, beta2=0.99)) == (0.8, 0.99)


def test_the_count_of_bias_correction_says_how_much_was_forgotten_across_a_change_of_size():
    optim = OptimConfig(beta2_half_life=5000)
    kept = 1.0  # of the second moment's start from zero
    tokens = updates = 0
    for size, number in ((16, 100), (64, 30), (512, 4)):
        for _ in range(number):
            beta2 = adam_betas(size, optim)[1]
            assert beta2 ** adam_count(updates, tokens, size, optim) == pytest.approx(kept)
            kept, tokens, updates = kept * beta2, tokens + size, updates + 1
    assert adam_count(updates, tokens, 512, OptimConfig()) == updates


@pytest.mark.parametrize(
    ("over", "names"),
    [
        ({"optim.decay_from": 5}, ["optim.decay_from", "wsd"]),
        (
            {"optim.schedule": "wsd", "optim.decay_from": 5, "optim.decay_tokens": 9},
            ["optim.decay_tokens", "optim.decay_from"],
        ),
        ({"optim.schedule": "wsd", "optim.decay_from": 1000}, ["optim.decay_from 1000", "train.updates 1000"]),
        ({"optim.lr_scaling": "sqrt"}, ["optim.lr_scaling", "optim.lr_tokens"]),
        ({"optim.beta1_half_life": 5}, ["optim.beta2_half_life"]),
        ({"optim.warmup_tokens": 99, "train.tokens": 9}, ["optim.warmup_tokens 99", "train.tokens 9"]),
        ({"train.updates_per_window": ["2:10", "4"]}, ["train.updates_per_window 2:10 4", "fall"]),
        ({"train.updates_per_window": ["4:10", "2:10", "1"]}, ["growing"]),
        ({"train.updates_per_window": ["4", "1"]}, ["'4'", "N:TOKENS"]),
        ({"train.updates_per_window": "4:10"}, ["'4:10'", "no end"]),
        ({"train.updates_per_window": "0"}, ["'0'", "above 0"]),
        ({"train.updates_per_window": ["4:50%", "1"]}, ["'4:50%'", "train.tokens"]),
        ({"train.updates_per_window": "3", "train.lane_groups": 2}, ["train.lane_groups 2"]),
        ({"train.updates_per_window": "128"}, ["train.updates_per_window 128", "data.lanes 64"]),
        ({"train.updates_per_window": "auto:4"}, ["train.measure_noise", "train.tokens"]),
        (
            {"train.updates_per_window": "auto:4", "train.measure_noise": True, "train.tokens": 9999},
            ["optim.warmup_updates", "optim.warmup_tokens"],
        ),
        ({"train.measure_noise": True, "train.precision": "fp16"}, ["fp16"]),
    ],
)
def test_what_does_not_fit_is_refused_with_key_and_remedy(over, names):
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"data.path": "x", **over})
    for name in names:
        assert name in str(caught.value)
