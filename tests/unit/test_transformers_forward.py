"""The forward pass is a causal language model's of transformers: masks, embeddings, labels, outputs, Trainer.

Axes: B lanes, T tokens, S slots, E embedding, V vocabulary.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gptb_ds import GPTBLMHeadModel
from tests.harness.models import V, random_ids, small_gptb

B, T = 3, 9


def masked(keep: list[list[int]]) -> torch.Tensor:
    return torch.tensor(keep)


# What a lane reads of nine tokens: padding left, right, in the middle, and none.
MASK = masked([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0, 1, 1, 1]])


@pytest.mark.parametrize("lanes", [[0], [1], [2], [0, 1, 2]], ids=str)
def test_a_masked_token_leaves_the_state_bit_for_bit(lanes: list[int]) -> None:
    model, ids = small_gptb(torch.float64), random_ids(B, T)
    padded = model(ids[lanes], attention_mask=MASK[lanes])
    for row, lane in enumerate(lanes):
        read = MASK[lane].bool()
        alone = model(ids[lane : lane + 1, read])
        torch.testing.assert_close(padded.logits[row, read], alone.logits[0])
        torch.testing.assert_close(padded.past_hidden_states[row], alone.past_hidden_states[0])
    # Bit for bit: what stands under the mask, and how much of it, changes nothing at all.
    other = torch.where(MASK[lanes].bool(), ids[lanes], random_ids(B, T, seed=5)[lanes])
    assert torch.equal(model(other, attention_mask=MASK[lanes]).past_hidden_states, padded.past_hidden_states)
    state = padded.past_hidden_states
    nothing = model(ids[lanes], past_hidden_states=state, attention_mask=torch.zeros_like(ids[lanes]))
    assert torch.equal(nothing.past_hidden_states, state)


def test_a_mask_works_on_continuation_and_may_cover_what_was_read_before() -> None:
    model, ids = small_gptb(torch.float64), random_ids(B, T)
    whole = model(ids, attention_mask=MASK)
    first = model(ids[:, :4], attention_mask=MASK[:, :4])
    for mask in (MASK, MASK[:, 4:]):
        second = model(ids[:, 4:], attention_mask=mask, past_hidden_states=first.past_hidden_states)
        torch.testing.assert_close(second.past_hidden_states, whole.past_hidden_states)
        torch.testing.assert_close(second.logits, whole.logits[:, 4:])


def test_a_reset_on_a_masked_token_does_nothing() -> None:
    model, ids = small_gptb(torch.float64), random_ids(B, T)
    reset = ~MASK.bool()
    told, plain = model(ids, attention_mask=MASK, reset=reset), model(ids, attention_mask=MASK)
    assert torch.equal(told.past_hidden_states, plain.past_hidden_states)
    assert torch.equal(told.logits[MASK.bool()], plain.logits[MASK.bool()])


def test_padding_takes_no_gradient() -> None:
    model, ids = small_gptb(torch.float64), random_ids(B, T)
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    output = model(inputs_embeds=embeds, attention_mask=MASK)
    output.past_hidden_states.pow(3).sum().backward()
    felt = embeds.grad.abs().sum(-1) > 0
    assert torch.equal(felt, MASK.bool())


def test_labels_are_shifted_inside() -> None:
    model, ids = small_gptb(), random_ids(B, T)
    labels = ids.clone()
    labels[1, 5:] = -100
    output = model(ids, labels=labels)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(output.loss, expected)
    counted = int((labels[:, 1:] != -100).sum())
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=2 * counted).loss, expected / 2)
    assert model(ids[:, :1], labels=ids[:, :1]).loss == 0  # one token has nothing to predict


def test_embeddings_in_place_of_tokens() -> None:
    model, ids = small_gptb(), random_ids(B, T)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)


def test_outputs_are_a_model_output_and_unpack_as_the_originals() -> None:
    model, ids = small_gptb(), random_ids(B, T)
    output = model(ids, labels=ids)
    logits, past_hidden_states, loss = output
    assert logits is output.logits is output["logits"] and past_hidden_states is output.past_hidden_states
    assert loss is output.loss is output[0] and output[1] is logits
    assert list(output.keys()) == ["loss", "logits", "past_key_values", "past_hidden_states"]
    assert output.past_key_values.state is past_hidden_states
    assert model(ids, use_cache=False).past_key_values is None
    plain = model(ids, return_dict=False, use_cache=False)
    assert type(plain) is tuple and torch.equal(plain[0], logits) and torch.equal(plain[1], past_hidden_states)


def test_hidden_states_are_the_layers_of_the_tokens_slot() -> None:
    model, ids = small_gptb(torch.float64), random_ids(B, T)
    output = model(ids, attention_mask=MASK, output_hidden_states=True)
    assert len(output.hidden_states) == model.config.n_layer + 1
    assert {tuple(layer.shape) for layer in output.hidden_states} == {(B, T, model.config.n_embd)}
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)
    embedded = model.transformer.wte(ids) + model.transformer.wpe.weight[model.config.num_slots - 1]
    torch.testing.assert_close(output.hidden_states[0], embedded)
    torch.testing.assert_close(output.logits, model(ids, attention_mask=MASK).logits)


def test_logits_to_keep_and_a_long_prompt_keep_the_last_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = small_gptb(torch.float64), random_ids(2, 40)
    whole = model(ids)
    monkeypatch.setattr("gptb_ds.model.recurrence.READ_CHUNK", 7)
    with torch.no_grad():
        last = model(ids, logits_to_keep=3)
        pieces = model(ids)
    assert last.logits.shape == (2, 3, V)
    torch.testing.assert_close(last.logits, whole.logits[:, -3:])
    torch.testing.assert_close(pieces.logits, whole.logits)
    torch.testing.assert_close(last.past_hidden_states, whole.past_hidden_states)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "either input_ids or inputs_embeds"),
        ({"input_ids": random_ids(2, 4), "inputs_embeds": torch.zeros(2, 4, 16)}, ValueError, "either input_ids"),
        ({"inputs_embeds": torch.zeros(2, 4, 8)}, ValueError, r"inputs_embeds has shape \(2, 4, 8\); expected .* 16\)"),
        ({"input_ids": random_ids(2, 4), "attention_mask": torch.ones(2, 3)}, ValueError, r"attention_mask has shape"),
        ({"input_ids": random_ids(2, 4), "attention_mask": torch.ones(1, 4)}, ValueError, r"expected \(2, 4\)"),
        ({"input_ids": random_ids(2, 4), "attention_mask": torch.ones(2, 1, 4, 4)}, ValueError, r"expected \(2, 4\)"),
        ({"input_ids": random_ids(2, 4), "past_hidden_state": None}, TypeError, "no argument past_hidden_state"),
        ({"input_ids": random_ids(2, 4), "output_attentions": True}, ValueError, "output_attentions"),
    ],
)
def test_one_clear_line_for_what_does_not_fit(arguments: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        small_gptb()(**arguments)


def test_gradient_checkpointing_switch_gives_the_same_gradients() -> None:
    ids = random_ids(B, T)

    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model = small_gptb(torch.float64).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        model(ids, labels=ids).loss.backward()
        return [p.grad for p in model.parameters()]

    for ours, plain in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(ours, plain)


def test_the_vocabulary_can_be_resized() -> None:
    model, ids = small_gptb(), random_ids(B, T)
    before = model(ids).logits
    model.resize_token_embeddings(V + 3)
    after = model(torch.cat((ids, torch.full((B, 1), V + 2)), dim=1)).logits
    assert model.config.vocab_size == after.shape[-1] == V + 3
    assert model.lm_head.weight is model.transformer.wte.weight
    torch.testing.assert_close(after[:, :T, :V], before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_follows_the_weights(dtype: torch.dtype) -> None:
    model, ids = small_gptb(dtype), random_ids(B, T)
    output = model(ids, attention_mask=MASK, labels=ids)
    assert output.logits.dtype == output.past_hidden_states.dtype == dtype and output.loss.dtype == torch.float32
    assert output.logits.isfinite().all()


@pytest.mark.slow
def test_one_step_exports_with_the_state_as_plain_input_and_output() -> None:
    class Step(torch.nn.Module):
        def __init__(self, model: GPTBLMHeadModel) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            output = self.model(tokens, past_hidden_states=state, use_cache=False)
            return output.logits, output.past_hidden_states

    model, ids = small_gptb(), random_ids(B, 2)
    state = model(ids[:, :1]).past_hidden_states
    lanes = torch.export.Dim("lanes", min=2, max=4096)
    exported = torch.export.export(
        Step(model), (ids[:, :1], state), dynamic_shapes={"tokens": {0: lanes}, "state": {0: lanes}}
    ).module()
    for lane_count in (3, 2):
        logits, new_state = exported(ids[:lane_count, 1:], state[:lane_count])
        expected = model(ids[:lane_count, 1:], past_hidden_states=state[:lane_count])
        torch.testing.assert_close(logits, expected.logits)
        torch.testing.assert_close(new_state, expected.past_hidden_states)


@pytest.mark.slow
def test_torch_compile_of_the_model_gives_the_same() -> None:
    model, ids = small_gptb(), random_ids(B, 4)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, labels=ids).loss, model(ids, labels=ids).loss)


@pytest.mark.slow
def test_transformers_trainer_trains_it(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = small_gptb(n_embd=32).train()
    # A language of one sentence: only who remembers predicts it.
    row = torch.tensor([1, 2, 1, 3, 1, 4, 1, 5])
    data = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)}] * 64
    arguments = TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=6, per_device_train_batch_size=8, learning_rate=3e-3, report_to=[],
        save_strategy="no", logging_steps=1000, use_cpu=True, disable_tqdm=True, gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data[:8])
    before = trainer.evaluate()["eval_loss"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    assert trainer.evaluate()["eval_loss"] < before / 4
    again = GPTBLMHeadModel.from_pretrained(_saved(trainer, tmp_path / "saved"))
    torch.testing.assert_close(again(row[None]).logits, model.eval()(row[None]).logits)


def _saved(trainer: Any, folder: Path) -> Path:
    trainer.save_model(str(folder))
    return folder


@pytest.mark.slow
def test_a_device_map_places_it(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model, ids = small_gptb(), random_ids(B, T)
    model.save_pretrained(tmp_path)
    placed = GPTBLMHeadModel.from_pretrained(tmp_path, device_map={"": "cpu"})
    torch.testing.assert_close(placed(ids).logits, model(ids).logits)
    offloaded = GPTBLMHeadModel.from_pretrained(
        tmp_path,
        device_map={"transformer": "cpu", "lm_head": "cpu"},
        offload_folder=str(tmp_path / "offload"),
    )
    torch.testing.assert_close(offloaded(ids).logits, model(ids).logits)
