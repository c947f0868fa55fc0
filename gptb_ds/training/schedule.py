"""The learning rate as a pure function of the update: nothing of it has to be saved."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from transformers import get_scheduler

from gptb_ds.config import OptimConfig

_NAMES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def learning_rate(update: int, optim: OptimConfig, updates: int) -> float:
    """The rate of the update after `update` others, of `updates` in all: linear warm-up, then the schedule.

    The shapes are those of `transformers.get_scheduler`; counted so that neither the first nor the last update has
    rate 0.
    """
    return optim.lr * _factor(optim.schedule, optim.warmup_updates, updates)(update + 1)


@lru_cache
def _factor(schedule: str, warmup: int, updates: int) -> Callable[[int], float]:
    nothing = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = get_scheduler(_NAMES[schedule], nothing, num_warmup_steps=warmup, num_training_steps=updates + 1)
    return scheduler.lr_lambdas[0]
