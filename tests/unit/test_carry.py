"""`carry: shift`: the outputs of slots 1..S-1 become the state.

Axes: B lanes, K steps, S slots, E embedding.
"""

from __future__ import annotations

import warnings

import pytest
import torch

from gptb_ds import GPTBConfig
from gptb_ds.model import warn_if_memoryless
from tests.harness.models import random_ids, small_gptb


def slots_after_a_step(model: torch.nn.Module, state_BSE: torch.Tensor, ids_B1: torch.Tensor) -> torch.Tensor:
    """Outputs (B, S, E) of all slots, from the backbone alone."""
    transformer = model.transformer
    x_BSE = torch.cat((state_BSE, transformer.wte(ids_B1)), dim=1)
    return transformer.run_slots(x_BSE, transformer.slot_context(x_BSE))


@pytest.mark.parametrize("recent", [0, 2])
def test_the_state_is_the_outputs_moved_down_a_slot_with_the_newest_last(recent: int):
    model = small_gptb(carry="shift", recent_tokens=recent)
    state_BSE = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
    ids_B1 = random_ids(3, 1)
    with torch.no_grad():
        y_BSE = slots_after_a_step(model, state_BSE, ids_B1)
        output = model(ids_B1, past_hidden_states=state_BSE)
    kept = 5 - recent
    expected = [y_BSE[:, 1:kept], y_BSE[:, -1:]]
    if recent:
        expected += [state_BSE[:, kept + 1 :], model.transformer.wte(ids_B1)]
    torch.testing.assert_close(output.past_hidden_states, torch.cat(expected, dim=1))
    torch.testing.assert_close(output.logits[:, -1], model.lm_head(y_BSE[:, -1]))


def test_the_original_carries_the_outputs_of_the_states_own_slots():
    assert GPTBConfig().carry == "outputs"
    assert small_gptb().config.carry == "outputs"


def test_a_causal_model_that_shifts_is_not_memoryless():
    model = small_gptb(carry="shift", rebias=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_memoryless(model.config)
    first, second = random_ids(1, 6), random_ids(1, 6)
    second[0, 0] = (first[0, 0] + 1) % 20 + 1
    second[0, 1:] = first[0, 1:]
    assert not torch.allclose(model(first).logits[:, -1], model(second).logits[:, -1])


def test_another_carry_is_refused():
    with pytest.raises(ValueError, match="carry is 'sideways'; it must be one of outputs, shift"):
        GPTBConfig(carry="sideways")
