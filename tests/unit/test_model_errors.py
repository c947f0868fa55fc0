"""The tests of what a caller of the model can get wrong: one clear line each."""

from __future__ import annotations

import pytest
import torch

from gptb_ds import GPTBConfig, GPTBLMHeadModel

LONG = torch.int64


@pytest.fixture(scope="module")
def model() -> GPTBLMHeadModel:
    config = GPTBConfig(vocab_size=11, n_positions=4, n_embd=8, n_layer=1, n_head=2, num_slots=4)
    return GPTBLMHeadModel(config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.zeros(3, dtype=LONG)}, r"input_ids has shape \(3,\); expected \(lanes, steps\)"),
        ({"input_ids": torch.zeros(3, 0, dtype=LONG)}, r"input_ids has shape \(3, 0\)"),
        ({"input_ids": torch.zeros(3, 2)}, "input_ids has type torch.float32; expected whole numbers"),
        ({"input_ids": torch.full((2, 2), 11)}, "tokens from 11 to 11, but the vocabulary is 0 to 10"),
        ({"input_ids": torch.tensor([[3, -1]])}, "tokens from -1 to 3, but the vocabulary is 0 to 10"),
        (
            {"past_hidden_states": torch.zeros(2, 4, 8)},
            r"past_hidden_states has shape \(2, 4, 8\); expected \(2, 3, 8\)",
        ),
        ({"past_hidden_states": torch.zeros(1, 3, 8)}, r"past_hidden_states has shape \(1, 3, 8\)"),
        ({"reset": torch.zeros(2, dtype=torch.bool)}, r"reset has shape \(2,\) .*expected \(2, 5\)"),
        ({"reset": torch.zeros(2, 5)}, "reset has shape .* type torch.float32; .* bool"),
        ({"labels": torch.zeros(2, 4, dtype=LONG)}, r"labels has shape \(2, 4\); expected \(2, 5\)"),
        ({"labels": torch.full((2, 5), 12)}, "labels hold tokens from 12 to 12, but the vocabulary is 0 to 10"),
        ({"recompute_every": -1}, "recompute_every is -1"),
    ],
)
def test_one_clear_line(model: GPTBLMHeadModel, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        model(**({"input_ids": torch.zeros(2, 5, dtype=LONG)} | arguments))
    assert "\n" not in str(error.value) and error.value.__cause__ is None


def test_uncounted_labels() -> None:
    torch.manual_seed(0)
    model = GPTBLMHeadModel(
        GPTBConfig(vocab_size=11, n_positions=4, n_embd=8, n_layer=1, n_head=2, num_slots=4, dropout=0.0)
    )
    ids, labels = torch.tensor([[1, 2, 3]]), torch.tensor([[2, -100, 4]])
    logits, _, loss = model(ids, labels=labels)
    by_hand = -logits.log_softmax(-1)[0, 1, 4]  # shifted: position 0 is scored on -100, position 1 on 4
    torch.testing.assert_close(loss, by_hand)
    nothing = model(ids, labels=torch.full_like(labels, -100)).loss
    nothing.backward()
    assert nothing.item() == 0 and all(p.grad.isfinite().all() for p in model.parameters())
