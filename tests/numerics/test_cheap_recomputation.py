"""train.recompute_cheap: the same gradients to the last bit, with norms and activations freed in between."""

from __future__ import annotations

import pytest
import torch

from gptb_ds.config import ConfigError, load_config
from gptb_ds.model import cheap
from gptb_ds.model.objective import WindowObjective
from gptb_ds.model.window_model import WindowModel
from gptb_ds.training.sizes import _kept_bytes
from tests.harness.backbones import small_decoder
from tests.harness.models import small_gptb

LANES, STEPS = 3, 5


def built(family: str) -> WindowModel:
    torch.manual_seed(0)
    return (small_decoder(family) if family else small_gptb(dropout=0.1)).train()


def gradients(model: WindowModel, dtype: torch.dtype, recompute_cheap: bool) -> dict[str, torch.Tensor]:
    model = model.to(dtype)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    ids, targets = torch.randint(model.config.vocab_size, (2, STEPS, LANES))
    objective = WindowObjective(model, recompute_cheap=recompute_cheap)
    loss, state = objective(ids, targets, torch.rand(ids.shape) < 0.3, model.empty_state(LANES))
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"loss": loss, "state": state}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["", "llama", "gpt_neox", "gemma2"])
def test_gradients_are_the_same_bit_by_bit(family: str, dtype: torch.dtype) -> None:
    plain, other = (gradients(built(family), dtype, recompute_cheap) for recompute_cheap in (False, True))
    assert plain.keys() == other.keys()
    for name, value in plain.items():
        assert torch.equal(other[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_can_be_made_again_is_freed_after_the_forward_pass(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes: list[cheap.Recipe] = []
    monkeypatch.setattr(cheap, "Recipe", lambda *parts: recipes.append(recipe := MADE(*parts)) or recipe)
    model = built("").to(dtype)
    ids = torch.zeros((STEPS, LANES), dtype=torch.int64)
    objective = WindowObjective(model, recompute_cheap=True)
    loss, _state = objective(ids, ids, torch.zeros_like(ids, dtype=torch.bool), model.empty_state(LANES))
    # Of a step: two norms and an activation a block, and the last norm, of which head and next step have copies.
    assert len(recipes) == STEPS * (3 * model.config.n_layer + 1)
    assert [recipe.storage.expired() for recipe in recipes] == [True] * (len(recipes) - 1) + [False]  # the new state
    loss.backward()


MADE = cheap.Recipe


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_keeps_six_widths_less(dtype: torch.dtype) -> None:
    model = small_gptb(dropout=0.0).train().to(dtype)
    shape, steps = model.config, 4
    few, more = (
        [_kept_bytes(model, 2, n, recompute_cheap) for n in (steps, 2 * steps)] for recompute_cheap in (True, False)
    )
    saved = (more[1] - more[0]) - (few[1] - few[0])
    values = 2 * steps * shape.n_layer * shape.num_slots * 6 * shape.n_embd
    assert saved == values * dtype.itemsize


def test_it_is_one_or_the_other() -> None:
    with pytest.raises(ConfigError, match=r"train.recompute_cheap .* choose one"):
        load_config(None, {"data.path": "s", "train.recompute_cheap": True, "train.recompute_every": 4})
    with pytest.raises(ConfigError, match=r"train.recompute_cheap is not offered with model.kind lstm"):
        load_config(None, {"data.path": "s", "train.recompute_cheap": True, "model.kind": "lstm"})
