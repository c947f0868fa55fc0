"""Columns that are computed again without a record of the first pass: gradients, hooks, and what stays of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gptb_ds.model.modeling import GPTBLMHeadModel
from gptb_ds.model.objective import WindowObjective
from gptb_ds.model.recurrence import SlotRecurrence
from tests.harness.models import small_gptb

LANES, STEPS = 3, 8
KINDS: list[dict[str, Any]] = [
    {},
    {"rebias": False, "tie_word_embeddings": False},
    {"carry": "shift"},
    {"recent_tokens": 2, "preserve_decoder": True},
]


def loss_of(model: GPTBLMHeadModel, every: int, **options: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    ids, targets = torch.randint(model.config.vocab_size, (2, STEPS, LANES), generator=generator)
    reset = torch.rand(ids.shape, generator=generator) < 0.3
    weights = torch.rand(ids.shape, generator=generator)
    loss, _ = WindowObjective(model, every, **options)(ids, targets, reset, model.empty_state(LANES), weights)
    return loss


def gradients(model: GPTBLMHeadModel, every: int, **options: Any) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss = loss_of(model, every, **options)
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"loss": loss.detach()}


@pytest.mark.parametrize("every", [1, 3, 7])
@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: " ".join(kind) or "plain")
def test_gradients_are_those_of_a_window_that_keeps_everything(kind: dict[str, Any], sums: bool, every: int) -> None:
    model = small_gptb(torch.float64, **kind).train()
    assert model.recomputes_apart
    kept, again = (gradients(model, c, fp32_sums=sums) for c in (0, every))
    assert kept.keys() == again.keys()
    for name, value in kept.items():
        torch.testing.assert_close(again[name], value, rtol=1e-10, atol=1e-12, msg=name)


def test_bf16_gradients_are_as_good_as_those_of_torchs_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_gptb().train()
    want = gradients(model, 0)
    model = model.bfloat16()
    own = gradients(model, 3)
    monkeypatch.setattr(SlotRecurrence, "recomputes_apart", property(lambda self: False))
    checkpoints = gradients(model, 3)

    def error(found: dict[str, torch.Tensor]) -> float:
        return sum(float((found[name] - value).double().norm()) for name, value in want.items())

    assert error(own) < 1.1 * error(checkpoints)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_gets_its_gradient_once_a_window(dtype: torch.dtype) -> None:
    model = small_gptb(dtype).train()
    arrived: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))
    gradients(model, 2)
    assert sorted(arrived) == sorted(name for name, _ in model.named_parameters())


def test_a_hook_on_a_weight_sees_its_whole_gradient() -> None:
    model = small_gptb().train()
    want = gradients(model, 0)
    seen: list[torch.Tensor] = []
    handle = model.transformer.h[0].attn.c_attn.weight.register_hook(seen.append)
    gradients(model, 2)
    handle.remove()
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], want["transformer.h.0.attn.c_attn.weight"])


def test_the_first_pass_records_nothing_of_the_blocks() -> None:
    def nodes(layers: int, every: int) -> int:
        reached, waiting = set(), [loss_of(small_gptb(n_layer=layers).train(), every).grad_fn]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in reached and not type(node).__name__.startswith("AccumulateGrad"):
                reached.add(node)
                waiting += [following for following, _ in node.next_functions]
        return len(reached)

    assert nodes(1, 0) + 100 < nodes(2, 0)
    assert nodes(1, 2) == nodes(2, 2) < 100


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_dropout_is_left_to_torchs_checkpoints(dropout: float) -> None:
    transformer = small_gptb(dropout=dropout).train().transformer
    assert transformer.recomputes_apart == (dropout == 0)
    assert transformer.eval().recomputes_apart
