"""The tests of GPTB's configuration: its keys, its errors, and plain GPT-2 configurations."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from gptb_ds import GPTBConfig, GPTBLMHeadModel, GPTBModel
from gptb_ds.model import as_gptb_config, warn_if_memoryless

SHAPE = {"vocab_size": 11, "n_positions": 24, "n_embd": 8, "n_layer": 1, "n_head": 2}
PLAIN = SHAPE | {"bos_token_id": None, "eos_token_id": None}


def test_defaults_are_the_originals() -> None:
    config = GPTBConfig()
    assert (config.num_slots, config.rebias, config.tie_word_embeddings, config.model_type) == (20, True, True, "gptb")


def test_dropout_sets_gpt2s_three() -> None:
    config = GPTBConfig(dropout=0.25, **SHAPE)
    assert config.resid_pdrop == config.embd_pdrop == config.attn_pdrop == 0.25


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_slots": 1}, "num_slots is 1; .* at least 2"),
        ({"num_slots": 2.5}, "num_slots is 2.5; .* whole number"),
        ({"num_slots": 25}, "num_slots 25 is beyond n_positions 24"),
        ({"n_head": 3}, "n_embd 8 is not divisible by n_head 3"),
    ],
)
def test_what_cannot_be_is_a_value_error(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTBConfig(**(SHAPE | changes))
    config = GPTBConfig(**SHAPE)
    for key, value in changes.items():
        object.__setattr__(config, key, value)
    with pytest.raises(ValueError, match=message):
        GPTBModel(config)


def test_plain_gpt2_configuration_is_accepted_and_left_alone() -> None:
    config = GPT2Config(**PLAIN)
    config.rebias = False
    before = config.to_dict()
    model = GPTBLMHeadModel(config)
    assert type(model.config) is GPTBConfig and (model.config.num_slots, model.config.rebias) == (20, False)
    assert config.to_dict() == before and config._attn_implementation is None


def test_plain_gpt2_configuration_may_name_slots_as_the_original_did() -> None:
    config = GPT2Config(**PLAIN)
    assert as_gptb_config(config).rebias is True
    config.max_length = 7
    assert as_gptb_config(config).num_slots == 7
    config.num_slots = 5
    assert as_gptb_config(config).num_slots == 5
    config._attn_implementation = "sdpa"
    assert GPTBModel(config).config._attn_implementation == "sdpa"


def test_model_owns_its_configuration() -> None:
    config = GPTBConfig(**SHAPE)
    model = GPTBLMHeadModel(config)
    assert model.config is not config and model.transformer.config is model.config
    assert config._attn_implementation is None


def test_other_architectures_are_refused() -> None:
    with pytest.raises(ValueError, match="not from LlamaConfig"):
        GPTBModel(LlamaConfig(hidden_size=8, num_attention_heads=2))


def test_memoryless_choice_warns() -> None:
    with pytest.warns(UserWarning, match="memoryless"):
        warn_if_memoryless(GPTBConfig(rebias=False, **SHAPE))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_memoryless(GPTBConfig(**SHAPE))
        warn_if_memoryless(GPT2Config(**PLAIN))


@pytest.mark.parametrize("attention", ["eager", "sdpa", None])
@pytest.mark.parametrize("rebias", [True, False])
def test_every_attention_module_knows_its_direction(attention: str | None, rebias: bool) -> None:
    model = GPTBModel(GPTBConfig(rebias=rebias, attn_implementation=attention, **SHAPE))
    assert all(block.attn.is_causal is not rebias for block in model.h)


def test_reordered_attention_takes_the_path_that_has_it() -> None:
    config = GPTBConfig(reorder_and_upcast_attn=True, **SHAPE)
    model = GPTBLMHeadModel(config)
    assert model.config._attn_implementation == "eager"
    plain = GPTBLMHeadModel(GPTBConfig(**SHAPE))
    plain.load_state_dict(model.state_dict())
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(model.eval()(ids).logits, plain.eval()(ids).logits)
