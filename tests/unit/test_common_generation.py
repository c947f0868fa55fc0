"""What transformers' `GenerationTesterMixin` asks of every model, in our words, of GPT-2 and of a Llama made recurrent.

That each mode gives what a plain loop over steps gives is in test_transformers_generate; here is what `generate`
returns beside the tokens, and how it takes its input. docs/transformers.md lists all tests of the mixin.
Axes: B lanes, T tokens, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.generation import (
    GenerateBeamDecoderOnlyOutput,
    GenerateDecoderOnlyOutput,
)

from gptb_ds.model import GPTBCache
from tests.harness.backbones import small_decoder
from tests.harness.models import V, random_ids, small_gptb

B, T, NEW = 2, 5, 6
IDS = random_ids(B, T)
ENDLESS = {"eos_token_id": None}
MODELS = {
    "gpt2": small_gptb(torch.float64, seed=2, pad_token_id=0, tie_word_embeddings=False, **ENDLESS),
    "llama": small_decoder("llama", torch.float64, seed=2, pad_token_id=0, tie_word_embeddings=False, **ENDLESS),
}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sample": {"do_sample": True, "top_k": 7},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "beams that sample": {"do_sample": True, "num_beams": 3},
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return MODELS[request.param]


def generate(model: PreTrainedModel, ids: torch.Tensor | None = IDS, **settings: Any) -> Any:
    torch.manual_seed(0)
    return model.generate(ids, **({"max_new_tokens": NEW, "do_sample": False} | settings))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_what_a_dict_holds(model: PreTrainedModel, mode: str, use_cache: bool) -> None:
    settings = MODES[mode] | {"use_cache": use_cache}
    everything = {"output_scores": True, "output_logits": True, "output_hidden_states": True}
    found = generate(model, return_dict_in_generate=True, **everything, **settings)
    beams = settings.get("num_beams", 1)
    assert type(found) is (GenerateDecoderOnlyOutput if beams == 1 else GenerateBeamDecoderOnlyOutput)
    assert torch.equal(found.sequences, generate(model, **settings))
    assert found.sequences.shape == (B * settings.get("num_return_sequences", 1), T + NEW)
    assert len(found.scores) == len(found.logits) == len(found.hidden_states) == NEW
    assert {score.shape for score in found.scores} == {(B * beams, V)}
    for step, layers in enumerate(found.hidden_states):
        steps = T if step == 0 else 1 if use_cache else T + step
        assert [layer.shape for layer in layers] == [(B * beams, steps, 16)] * (model.config.num_hidden_layers + 1)
    if use_cache:
        assert isinstance(found.past_key_values, GPTBCache)
        assert found.past_key_values.state.shape == (B * beams, model.config.num_slots - 1, 16)
        assert found.past_key_values.get_seq_length() == T + NEW - 1  # the last token was chosen, not read
    else:
        assert found.past_key_values is None
    if mode == "greedy":
        read = model(found.sequences[:, :-1]).logits[:, T - 1 :]
        torch.testing.assert_close(torch.stack(found.logits, 1), read.float(), check_dtype=False, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_the_cache_changes_nothing(model: PreTrainedModel, mode: str) -> None:
    assert torch.equal(generate(model, **MODES[mode]), generate(model, **MODES[mode], use_cache=False))


def test_transition_scores_are_the_tokens_log_likelihoods(model: PreTrainedModel) -> None:
    found = generate(model, return_dict_in_generate=True, output_scores=True)
    scores = model.compute_transition_scores(found.sequences, found.scores, normalize_logits=True)
    log_likelihoods = model(found.sequences[:, :-1]).logits.log_softmax(-1)
    expected = log_likelihoods.gather(2, found.sequences[:, 1:, None])[:, T - 1 :, 0]
    torch.testing.assert_close(scores, expected.float(), check_dtype=False, atol=1e-5, rtol=1e-4)


def test_it_starts_from_nothing_but_a_beginning(model: PreTrainedModel) -> None:
    tokens = generate(model, None, bos_token_id=3)
    assert torch.equal(tokens, generate(model, torch.tensor([[3]])))
    with pytest.raises(ValueError, match="bos_token_id"):
        generate(model, None)


def test_embeddings_take_the_place_of_tokens(model: PreTrainedModel) -> None:
    embeds = model.get_input_embeddings()(IDS)
    for settings in ({}, {"num_beams": 3}, {"do_sample": True}):
        tokens = generate(model, **settings)
        assert torch.equal(generate(model, None, inputs_embeds=embeds, **settings), tokens[:, T:])
        assert torch.equal(generate(model, inputs_embeds=embeds, **settings), tokens)  # with the ids beside them
    other = generate(model, None, inputs_embeds=torch.randn(B, T, 16, dtype=torch.float64))
    assert other.shape == (B, NEW)


@pytest.mark.parametrize("padded", [False, True])
def test_going_on_equals_going_through(model: PreTrainedModel, padded: bool) -> None:
    mask = torch.ones_like(IDS)
    mask[0, : 2 if padded else 0] = 0
    both: dict[str, Any] = {"return_dict_in_generate": True, "output_scores": True}
    whole = generate(model, attention_mask=mask, **both)
    first = generate(model, attention_mask=mask, max_new_tokens=NEW - 2, **both)
    longer = torch.nn.functional.pad(mask, (0, NEW - 2), value=1)
    cache = first.past_key_values
    rest = generate(model, first.sequences, past_key_values=cache, attention_mask=longer, max_new_tokens=2, **both)
    assert torch.equal(rest.sequences, whole.sequences)
    for ours, theirs in zip(first.scores + rest.scores, whole.scores, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(rest.past_key_values.state, whole.past_key_values.state)


def test_a_padded_batch_goes_on_as_it_would_in_one_call(model: PreTrainedModel) -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 1]])
    whole = model(IDS, attention_mask=mask)
    first = model(IDS[:, :2], attention_mask=mask[:, :2], use_cache=True)
    second = model(IDS[:, 2:], attention_mask=mask, past_key_values=first.past_key_values)
    torch.testing.assert_close(second.logits[:, -1], whole.logits[:, -1])


def test_logits_of_all_tokens_or_of_the_last_choose_the_same(model: PreTrainedModel) -> None:
    for settings in ({}, {"prompt_lookup_num_tokens": 3}):
        ids = IDS[:1] if settings else IDS
        assert torch.equal(generate(model, ids, logits_to_keep=0, **settings), generate(model, ids, **settings))


def test_arguments_are_handed_on_to_the_model(model: PreTrainedModel) -> None:
    inputs = model.prepare_inputs_for_generation(IDS, output_hidden_states=True, of_a_subclass="yes")
    assert torch.equal(inputs["input_ids"], IDS)
    assert inputs["output_hidden_states"] is True and inputs["of_a_subclass"] == "yes"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_kind_of_attention_generates_the_same(model: PreTrainedModel, attention: str, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention, dtype=torch.float64)
    assert torch.equal(generate(loaded), generate(model))


@pytest.mark.parametrize(
    "settings", [{"prompt_lookup_num_tokens": 4}, {"assistant": True}, {"assistant_early_exit": 1}], ids=str
)
def test_assisted_decoding_returns_what_plain_decoding_returns(
    model: PreTrainedModel, settings: dict[str, Any]
) -> None:
    if settings.get("assistant"):
        settings = {"assistant_model": MODELS["llama" if model is MODELS["gpt2"] else "gpt2"]}  # the other one
    both = {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True}
    plain, assisted = generate(model, IDS[:1], **both), generate(model, IDS[:1], **both, **settings)
    assert torch.equal(plain.sequences, assisted.sequences)
    for ours, theirs in zip(assisted.scores, plain.scores, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(assisted.hidden_states) == len(plain.hidden_states)
