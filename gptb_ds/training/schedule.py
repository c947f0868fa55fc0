"""What changes over a run, as pure functions of the tokens trained so far: nothing of it has to be saved.

Tokens are counted over all lanes. A window is K columns of all lanes; an update takes a window, or a part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from transformers import get_scheduler

from gptb_ds.config import OptimConfig, TrainConfig

_NAMES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant_with_warmup",
    "wsd": "warmup_stable_decay",
}


@dataclass(frozen=True)
class BatchPlan:
    """How many updates each window makes: (number, until so many tokens were trained), the last one to the end.

    A window keeps the number it began with, so that a phase ends at a window's edge.
    """

    window_tokens: int
    phases: tuple[tuple[int, int | None], ...] = ((1, None),)

    def updates_per_window(self, tokens: int) -> int:
        """Of the window that begins when `tokens` were trained."""
        return next(number for number, until in self.phases if until is None or tokens < until)

    def updates_after(self, tokens: int) -> int:
        """Updates made when `tokens`, a window's edge, were trained."""
        total = start = 0
        for number, until in self.phases:
            end = tokens if until is None else min(tokens, self._edge(until))
            total += max(0, end - start) // self.window_tokens * number
            start = max(start, end)
        return total

    def tokens_after(self, updates: int) -> int:
        """Tokens trained by so many updates; within a window, its share."""
        start = 0
        for number, until in self.phases:
            if until is not None:
                inside = max(0, self._edge(until) - start) // self.window_tokens * number
                if updates >= inside:
                    updates, start = updates - inside, max(start, self._edge(until))
                    continue
            return start + updates * self.window_tokens // number
        raise AssertionError("the last phase has no end")

    def _edge(self, tokens: int) -> int:
        """The first window's edge at which at least `tokens` were trained."""
        return -(-tokens // self.window_tokens) * self.window_tokens


@dataclass(frozen=True)
class RatePlan:
    """Where the learning rate's parts meet, in tokens: the end of its warm-up, the start of its decay, its end."""

    warmup: int
    decay: int
    end: int


def run_tokens(train: TrainConfig, batches: BatchPlan) -> int:
    """Tokens of the whole run: whole windows, at least `train.tokens` of them or `train.updates` updates."""
    wanted = train.tokens if train.tokens is not None else batches.tokens_after(train.updates)
    return -(-wanted // batches.window_tokens) * batches.window_tokens


def rate_plan(optim: OptimConfig, train: TrainConfig, batches: BatchPlan) -> RatePlan:
    """The learning rate's plan for a run; what the configuration says in updates is turned into tokens."""
    end = run_tokens(train, batches)
    warmup = optim.warmup_tokens
    if warmup is None:
        warmup = batches.tokens_after(optim.warmup_updates)
    if optim.decay_from is not None:
        decay = batches.tokens_after(optim.decay_from)
    elif optim.decay_tokens is not None:
        decay = end - optim.decay_tokens
    elif optim.decay_updates is not None:
        decay = batches.tokens_after(batches.updates_after(end) - optim.decay_updates)
    else:
        decay = end - round(0.2 * end)
    return RatePlan(warmup, max(warmup, decay), end)


def learning_rate(before: int, tokens: int, optim: OptimConfig, plan: RatePlan) -> float:
    """The rate of an update of `tokens` tokens that comes after `before` others: linear warm-up, then the schedule.

    The shapes are those of `transformers.get_scheduler`, counted so that neither the first nor the last update has
    rate 0. "wsd" (warm-up, stable, decay; 2404.06395) falls by 1 - sqrt at its end, the best of the shapes that
    2405.18392 compares. `optim.lr_scaling` multiplies the rate by the (square root of the) update's tokens over
    `optim.lr_tokens`: linear for SGD (1706.02677), the square root for Adam (2205.10287).
    """
    rate = optim.lr * _factor(optim.schedule, plan.warmup, plan.decay, plan.end + tokens)(before + tokens)
    if optim.lr_tokens is not None:
        rate *= (tokens / optim.lr_tokens) ** {"none": 0.0, "sqrt": 0.5, "linear": 1.0}[optim.lr_scaling]
    return rate


@lru_cache
def _factor(schedule: str, warmup: int, decay: int, end: int) -> Callable[[int], float]:
    nothing = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    shape = {"num_decay_steps": end - decay, "decay_type": "1-sqrt"} if schedule == "wsd" else None
    scheduler = get_scheduler(
        _NAMES[schedule],
        nothing,
        num_warmup_steps=warmup,
        num_training_steps=end,
        scheduler_specific_kwargs=shape,
    )
    return scheduler.lr_lambdas[0]


def adam_betas(tokens: int, optim: OptimConfig) -> tuple[float, float]:
    """Adam's two betas for an update of `tokens` tokens.

    A beta that is given as a half-life in tokens (2507.07101) forgets as fast per token whatever the size of an update:
    beta = 0.5 ** (tokens / half-life).
    """
    lives = ((optim.beta1, optim.beta1_half_life), (optim.beta2, optim.beta2_half_life))
    first, second = (beta if life is None else 0.5 ** (tokens / life) for beta, life in lives)
    return first, second


def adam_count(applied_updates: int, applied_tokens: int, tokens: int, optim: OptimConfig) -> float:
    """The count of steps that Adam's bias correction (1 - beta ** count) must stand at before an update.

    It says how much of the moments is still their start from zero. With betas that follow the update's size, what has
    been forgotten is 0.5 ** (trained tokens / half-life), which is today's beta to the power of trained tokens over
    today's tokens an update. With fixed betas it is the number of updates that were applied.
    """
    if optim.beta2_half_life is None:
        return float(applied_updates)
    return applied_tokens / tokens
