"""`model.backbone` and the sizes beside it describe the model, and each that does not hold up is one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedConfig

from gptb_ds.config import Config, ConfigError, load_config
from gptb_ds.model import GPTBConfig, GPTBDecoderConfig
from gptb_ds.model_choice import model_configuration, with_backbone

SIZES = {"model.num_slots": 6, "model.n_layer": 2, "model.n_head": 4, "model.n_embd": 16}
LLAMA = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 20, "vocab_size": 29}


def config_of(sizes: dict[str, Any] = SIZES, **model: Any) -> Config:
    return load_config(None, {"data.path": "s", **sizes, **{f"model.{key}": value for key, value in model.items()}})


def described(**model: Any) -> PreTrainedConfig:
    return model_configuration(config_of(**model), 29, 3)


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(**LLAMA, num_key_value_heads=2, rms_norm_eps=1e-3, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_the_default_is_gpt2() -> None:
    config = described(n_inner=40, dropout=0.1)
    assert type(config) is GPTBConfig and config.n_inner == 40 and config.attn_pdrop == 0.1


def test_a_family_has_our_sizes_and_its_own_ratio() -> None:
    config = described(backbone="llama", n_kv_head=2, dropout=0.1, initializer_range=0.05, carry="shift")
    assert type(config) is GPTBDecoderConfig and config.backbone.model_type == "llama"
    assert (config.num_slots, config.carry, config.tie_word_embeddings) == (6, "shift", True)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (16, 2, 4)
    assert config.backbone.num_key_value_heads == 2 and config.backbone.attention_dropout == 0.1
    assert config.backbone.intermediate_size == 40  # 11008 / 4096 of 16, in eights
    assert config.vocab_size == 29 and config.eos_token_id == config.backbone.eos_token_id == 3
    assert described(backbone="llama", n_inner=24).backbone.intermediate_size == 24
    assert described(backbone="opt").backbone.ffn_dim == described(backbone="gpt_neox").backbone.intermediate_size == 64


def test_a_folder_says_the_sizes(llama_folder: Path) -> None:
    config = with_backbone(config_of({}, backbone=str(llama_folder), num_slots=6))
    assert (config.model.n_layer, config.model.n_head, config.model.n_embd) == (3, 4, 16)
    assert (config.model.n_kv_head, config.model.n_inner) == (2, 20)
    found = model_configuration(config, 29, 3)
    assert isinstance(found, GPTBDecoderConfig)
    assert found.backbone.rms_norm_eps == 1e-3 and found.tie_word_embeddings is False
    with pytest.raises(ConfigError, match=f"model.n_layer 2: model.backbone {llama_folder} has 3; leave it out"):
        with_backbone(config_of({}, backbone=str(llama_folder), n_layer=2))


def test_a_folder_of_a_gpt2_is_the_usual_model(tmp_path: Path) -> None:
    GPT2LMHeadModel(
        GPT2Config(vocab_size=29, n_positions=32, n_embd=16, n_layer=1, n_head=2, activation_function="relu")
    ).save_pretrained(tmp_path)
    config = with_backbone(config_of({}, backbone=str(tmp_path)))
    found = model_configuration(config, 29, 3)
    assert type(found) is GPTBConfig and found.activation_function == "relu"
    assert (found.n_layer, found.n_embd, found.position_rows) == (1, 16, 32)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"backbone": "llama", "n_kv_head": 3}, r"n_kv_head 3 does not fit .* choose one of \[1, 2, 4\]"),
        ({"n_kv_head": 2}, "n_kv_head 2 does not fit model.backbone gpt2 .* leave it out"),
        ({"kind": "lstm", "backbone": "llama"}, "model.backbone is not offered with model.kind lstm"),
        ({"kind": "gpt2", "n_inner": 9}, "model.n_inner is not offered with model.kind gpt2"),
    ],
)
def test_keys_that_do_not_go_together(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(**model)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"backbone": "lama"}, "backbone 'lama': no decoder of transformers, and no folder .* did you mean llama"),
        ({"backbone": "gpt_neox", "n_kv_head": 2}, "backbone gpt_neox: it has no num_key_value_heads; leave that out"),
        ({"backbone": "/nowhere/at/all"}, "no folder with a config.json"),
    ],
)
def test_what_there_is_not_is_refused_in_a_line(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        described(**model)
    assert "\n" not in str(caught.value)
