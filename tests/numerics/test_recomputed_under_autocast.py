"""What is computed again in the backward pass is what the forward pass computed, under torch's autocast too."""

from __future__ import annotations

import torch

from gptb_ds.model.objective import WindowObjective
from tests.harness.models import small_gptb

LANES, STEPS = 3, 6


def gradients(recompute_every: int) -> dict[str, torch.Tensor]:
    model = small_gptb().train()
    ids, targets = torch.randint(model.config.vocab_size, (2, STEPS, LANES), generator=torch.Generator().manual_seed(1))
    reset = torch.zeros_like(ids, dtype=torch.bool)
    reset[0] = True
    with torch.autocast("cpu", torch.bfloat16):
        objective = WindowObjective(model, recompute_every, fp32_sums=False)
        loss, _ = objective(ids, targets, reset, model.empty_state(LANES))
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_are_those_of_a_window_that_keeps_everything() -> None:
    want, found = gradients(0), gradients(2)
    assert want.keys() == found.keys()
    for name, value in want.items():
        # A weight's gradients are added up in another order; computed in another precision they are off by a hundredth.
        error = (found[name] - value).norm() / value.norm()
        assert error < 1e-6, name
