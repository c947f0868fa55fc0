"""What a model of transformers can be given by mistake is refused in one line that says what, and what was expected.

Axes: B lanes, T tokens, S slots, E embedding, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from gptb_ds import GPTBLMHeadModel
from gptb_ds.cli import main
from gptb_ds.model import GPTBCache
from tests.harness.backbones import small_decoder
from tests.harness.models import V, random_ids, small_gptb

B, T, S, E = 2, 4, 6, 16
IDS = random_ids(B, T)
STATE = torch.zeros(B, S - 1, E)


MODELS = {"gpt2": small_gptb(), "llama": small_decoder("llama")}

FORWARD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({"input_ids": None}, "either input_ids or inputs_embeds"),
    "tokens and embeddings": ({"inputs_embeds": torch.zeros(B, T, E)}, "either input_ids or inputs_embeds"),
    "a list": ({"input_ids": IDS.tolist()}, r"input_ids is a list; expected a torch\.Tensor"),
    "what a tokenizer returns": ({"input_ids": {"input_ids": IDS}}, 'input_ids is a dict; .* give its "input_ids"'),
    "no tokens": ({"input_ids": IDS[:, :0]}, r"input_ids has shape \(2, 0\); expected \(lanes, steps\), at least one"),
    "no lanes": ({"input_ids": IDS[:0]}, r"input_ids has shape \(0, 4\)"),
    "one axis": ({"input_ids": IDS[0]}, r"input_ids has shape \(4,\); expected \(lanes, steps\)"),
    "three axes": ({"input_ids": IDS[None]}, r"input_ids has shape \(1, 2, 4\)"),
    "numbers that are no tokens": ({"input_ids": IDS.float()}, r"type torch\.float32; expected whole numbers"),
    "flags as tokens": ({"input_ids": IDS.bool()}, r"type torch\.bool; expected whole numbers"),
    "a token too large": ({"input_ids": IDS + V}, f"the vocabulary is 0 to {V - 1}; use the tokenizer"),
    "a token below zero": ({"input_ids": IDS - V}, f"the vocabulary is 0 to {V - 1}; use the tokenizer"),
    "embeddings too narrow": (
        {"input_ids": None, "inputs_embeds": torch.zeros(B, T, E - 1)},
        r"inputs_embeds has shape \(2, 4, 15\); expected \(lanes, steps, 16\)",
    ),
    "embeddings of whole numbers": (
        {"input_ids": None, "inputs_embeds": torch.zeros(B, T, E, dtype=torch.int64)},
        "inputs_embeds has type torch.int64; expected floating-point",
    ),
    "a mask too short": ({"attention_mask": torch.ones(B, T - 1)}, r"attention_mask has shape \(2, 3\)"),
    "a mask of another batch": ({"attention_mask": torch.ones(B + 1, T)}, r"shape \(3, 4\); expected \(2, 4\)"),
    "a mask with four axes": ({"attention_mask": torch.ones(B, 1, T, T)}, r"shape \(2, 1, 4, 4\); expected \(2, 4\)"),
    "a mask of additions": ({"attention_mask": torch.full((B, T), -1e9)}, "other values than 0 .* and 1"),
    "a mask that is a dict": ({"attention_mask": {"full_attention": None}}, "attention_mask is a dict"),
    "a mask of more than was read": (
        {"attention_mask": torch.ones(B, T + 3), "past_key_values": GPTBCache()}, "covers 7 tokens; expected the 4",
    ),
    "labels of another length": ({"labels": IDS[:, 1:]}, r"labels has shape \(2, 3\); expected \(2, 4\)"),
    "labels of another batch": ({"labels": IDS[:1]}, r"labels has shape \(1, 4\); expected \(2, 4\)"),
    "shifted labels of another length": ({"shift_labels": IDS[:, 1:]}, r"labels has shape \(2, 3\)"),
    "labels of floats": ({"labels": IDS.float()}, r"labels has type torch\.float32; expected torch\.int64"),
    "labels that are a list": ({"labels": IDS.tolist()}, "labels is a list"),
    "labels out of range": ({"labels": IDS + V}, r"labels hold tokens from .* the vocabulary is 0 to 28 \(-100"),
    "labels below zero": ({"labels": IDS * 0 - 1}, "labels hold tokens from -1 to -1"),
    "a state of another batch": ({"past_hidden_states": STATE[:1]}, r"shape \(1, 5, 16\); expected \(2, 5, 16\)"),
    "a state of other slots": ({"past_hidden_states": STATE[:, 1:]}, r"shape \(2, 4, 16\); expected \(2, 5, 16\)"),
    "a state of another width": ({"past_hidden_states": STATE[..., 1:]}, r"shape \(2, 5, 15\); expected \(2, 5, 16\)"),
    "a state of whole numbers": ({"past_hidden_states": STATE.long()}, "past_hidden_states has type torch.int64"),
    "a state without numbers": ({"past_hidden_states": STATE.to("meta")}, "past_hidden_states is on the device 'meta'"),
    "a state that is a list": ({"past_hidden_states": STATE.tolist()}, "past_hidden_states is a list"),
    "a state twice": ({"past_hidden_states": STATE, "past_key_values": GPTBCache(STATE)}, "not both"),
    "a cache of another batch": ({"past_key_values": GPTBCache(STATE[:1])}, "holds 1 lanes, the tokens have 2"),
    "a cache of another model": ({"past_key_values": GPTBCache(STATE[:, 1:])}, r"expected \(2, 5, 16\)"),
    "a cache of keys and values": ({"past_key_values": DynamicCache()}, "a DynamicCache; .* its state in a GPTBCache"),
    "keys and values in tuples": ({"past_key_values": ((STATE, STATE),)}, "a tuple; .* its state in a GPTBCache"),
    "use_cache in words": ({"use_cache": "yes"}, "use_cache is 'yes'; expected True, False or None"),
    "use_cache as a number": ({"use_cache": 2}, "use_cache is 2; expected True, False or None"),
    "attention weights": ({"output_attentions": True}, "output_attentions: attention is among slots"),
    "a layer that is not there": ({"output_hidden_states": [0, 7]}, "output_hidden_states asks for layer 7"),
    "logits of fewer than no tokens": ({"logits_to_keep": -2}, "logits_to_keep is -2; expected 0"),
    "a reset of another shape": ({"reset": torch.zeros(B, 1, dtype=torch.bool)}, r"reset has shape \(2, 1\)"),
    "a reset that is no flag": ({"reset": torch.zeros(B, T)}, r"type torch\.float32; expected \(2, 4\) like .*, bool"),
    "recomputation in words": ({"recompute_every": "auto"}, "recompute_every is 'auto'; expected 0"),
}  # fmt: skip


def one_line(error: pytest.ExceptionInfo[BaseException]) -> None:
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backbone", MODELS)
@pytest.mark.parametrize("what", FORWARD)
def test_the_forward_pass_refuses(what: str, backbone: str) -> None:
    changes, message = FORWARD[what]
    with pytest.raises(ValueError, match=message) as error:
        MODELS[backbone](**({"input_ids": IDS} | changes))
    one_line(error)


def test_an_argument_that_is_not_there_is_a_type_error_as_in_python() -> None:
    for model in (MODELS["gpt2"], MODELS["gpt2"].transformer):
        with pytest.raises(TypeError, match=r"no argument past_hidden_state$"):
            model(IDS, past_hidden_state=STATE)


GENERATE: dict[str, tuple[dict[str, Any], str]] = {
    "a list": ({"inputs": IDS.tolist()}, "input_ids is a list"),
    "no tokens": ({"inputs": IDS[:, :0]}, r"input_ids has shape \(2, 0\)"),
    "a token too large": ({"inputs": IDS + V}, f"the vocabulary is 0 to {V - 1}; use the tokenizer"),
    "a full mask of another length": ({"attention_mask": torch.ones(B, T - 1)}, r"shape \(2, 3\); expected \(2, 4\)"),
    "a full mask of another batch": ({"attention_mask": torch.ones(1, T)}, r"shape \(1, 4\); expected \(2, 4\)"),
    "a state of other slots": ({"past_hidden_states": STATE[:, 1:]}, r"shape \(2, 4, 16\); expected \(2, 5, 16\)"),
    "a state of another batch": ({"past_hidden_states": STATE[:1]}, "holds 1 lanes, the tokens have 2"),
    "a state twice": ({"past_hidden_states": STATE, "past_key_values": GPTBCache(STATE)}, "not both"),
    "a cache for fewer beams": ({"past_key_values": GPTBCache(STATE), "num_beams": 2}, "2 lanes, the tokens have 4"),
    "a cache of keys and values": ({"past_key_values": DynamicCache()}, "its state in a GPTBCache"),
    "a static cache": ({"cache_implementation": "static"}, "cache_implementation 'static': the state has one size"),
    "attention weights": ({"output_attentions": True, "return_dict_in_generate": True}, "attention is among slots"),
    "a misspelt argument": ({"past_hidden_state": STATE}, "past_hidden_state"),
}  # fmt: skip


@pytest.mark.parametrize("backbone", MODELS)
@pytest.mark.parametrize("what", GENERATE)
def test_generate_refuses(what: str, backbone: str) -> None:
    changes, message = GENERATE[what]
    with pytest.raises(ValueError, match=message) as error:
        MODELS[backbone].generate(**({"inputs": IDS, "max_new_tokens": 2} | changes))
    one_line(error)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"state_BSE": [1]}, "the state is a list; expected floating-point numbers"),
        ({"state_BSE": STATE[0]}, r"a tensor \(5, 16\) of torch\.float32; expected floating-point numbers"),
        ({"state_BSE": STATE.long()}, r"a tensor \(2, 5, 16\) of torch\.int64"),
        ({"kept": -1}, "kept is -1; expected the number of states"),
        ({"kept": "all"}, "kept is 'all'"),
    ],
)
def test_a_cache_is_not_made_of(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTBCache(**given)


def test_a_cache_goes_back_no_further_than_it_came() -> None:
    with torch.no_grad():
        cache = MODELS["gpt2"](IDS).past_key_values
    with pytest.raises(ValueError, match="has read 4 tokens: it can't go back by 5"):
        cache.crop(-5)
    assert cache.get_seq_length() == T  # as it was
    with pytest.raises(OSError, match=r"No such file .*/nowhere/state\.safetensors'"):
        cache.save("/nowhere/state.safetensors", MODELS["gpt2"])


def test_transformers_own_loading_raises_for_what_is_no_such_model(tmp_path: Path) -> None:
    """Its own errors, as for every model; the verbs' one line is tested in test_only_whole_models."""
    (tmp_path / "empty").mkdir()
    with pytest.raises((OSError, ValueError), match="empty"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "empty")
    MODELS["gpt2"].save_pretrained(tmp_path / "model")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        GPTBLMHeadModel.from_pretrained(tmp_path / "model", num_slots=4)
    with pytest.raises(ValueError, match="num_slots 9 is beyond n_positions 6"):
        GPTBLMHeadModel.from_pretrained(tmp_path / "model", num_slots=9)


def test_generate_says_before_it_works_that_a_state_can_t_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for out in (tmp_path / "missing" / "state", tmp_path):
        assert main(["generate", "no-model", "--prompt", "a", "--state-out", str(out)]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"gptb-ds generate: --state-out {out}: ") and said.count("\n") == 1
