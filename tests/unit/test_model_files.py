"""The tests of the model's folders: initialisation, round trips through Auto classes, GPT-2 as a warm start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
)

from gptb_ds import GPTBConfig, GPTBLMHeadModel, GPTBModel
from gptb_ds.model import warm_start
from gptb_ds.model.configuration import INHERITED

SHAPE = {"vocab_size": 31, "n_positions": 12, "n_embd": 16, "n_layer": 2, "n_head": 2}
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 30]])


def build(seed: int = 0, **changes: object) -> GPTBLMHeadModel:
    torch.manual_seed(seed)
    return GPTBLMHeadModel(GPTBConfig(num_slots=6, **(SHAPE | changes))).eval()


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(3)
    GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **SHAPE)).save_pretrained(folder)
    return folder


def test_initialisation_follows_the_seed() -> None:
    one, same, other = build(0), build(0), build(1)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[name]), name
    assert not torch.equal(one.transformer.initial_embeds, other.transformer.initial_embeds)
    assert not torch.equal(one.transformer.wte.weight, other.transformer.wte.weight)


def test_initialisation_is_gpt2s_and_a_unit_normal_state() -> None:
    model = build(n_embd=128).transformer
    assert 0.9 < model.initial_embeds.std() < 1.1 and abs(model.initial_embeds.mean()) < 0.1
    block = model.h[1]
    assert abs(block.mlp.c_fc.weight.std() / 0.02 - 1) < 0.05
    assert abs(block.mlp.c_proj.weight.std() / (0.02 / 4**0.5) - 1) < 0.05  # 2 blocks, 2 residual paths each
    assert (block.attn.c_attn.bias == 0).all() and (block.ln_1.weight == 1).all()


def test_blocks_start_exactly_as_transformers_gpt2_does() -> None:
    torch.manual_seed(0)
    gpt2 = GPT2Model(GPT2Config(bos_token_id=0, eos_token_id=0, **SHAPE)).state_dict()
    torch.manual_seed(0)
    ours = GPTBModel(GPTBConfig(num_slots=6, **SHAPE)).state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in gpt2.items())


def test_names_are_gpt2s_plus_the_initial_state() -> None:
    ours = set(build().state_dict())
    theirs = set(GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **SHAPE)).state_dict())
    assert ours - theirs == {"transformer.initial_embeds"} and theirs <= ours


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_through_auto_classes(tmp_path: Path, tied: bool) -> None:
    model = build(tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.transformer.wte.weight) is tied
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) is not tied

    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is GPTBConfig and config.num_slots == 6 and config.rebias is True
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is GPTBLMHeadModel
    assert (again.lm_head.weight is again.transformer.wte.weight) is tied
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is GPTBModel
    assert torch.equal(base(IDS)[1], model(IDS).past_hidden_states)


def test_causal_models_come_back_causal(tmp_path: Path) -> None:
    model = build(rebias=False)
    model.save_pretrained(tmp_path)
    for attention in ("eager", "sdpa"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention)
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits)


def test_gpt2_folder_is_a_warm_start(gpt2_folder: Path) -> None:
    gpt2 = GPT2LMHeadModel.from_pretrained(gpt2_folder).state_dict()

    def start(seed: int) -> GPTBLMHeadModel:
        torch.manual_seed(seed)
        return warm_start(GPTBConfig(num_slots=6, dropout=0.0, **(SHAPE | {"n_positions": 8})), str(gpt2_folder))

    model, same, other = start(0), start(0), start(1)
    for name, tensor in model.state_dict().items():
        assert name == "transformer.initial_embeds" or torch.equal(tensor, gpt2[name]), name
    initial = model.transformer.initial_embeds
    assert initial.shape == (5, 16) and 0.6 < initial.std() < 1.4
    assert torch.equal(initial, same.transformer.initial_embeds)
    assert not torch.equal(initial, other.transformer.initial_embeds)
    assert model.training and model.config.n_positions == 12 and model.config.embd_pdrop == 0.0
    assert model.lm_head.weight is model.transformer.wte.weight


def test_gpt2_folder_loads_directly_with_defaults(gpt2_folder: Path) -> None:
    model = GPTBLMHeadModel.from_pretrained(gpt2_folder, num_slots=4, dropout=0.5)
    assert model.config.num_slots == 4 and model.config.attn_pdrop == 0.5 and model.config.model_type == "gptb"
    assert model.transformer.initial_embeds.shape == (3, 16)
    assert model.transformer.initial_embeds.abs().sum() > 0


def test_gpt2_without_a_head_is_a_warm_start(tmp_path: Path) -> None:
    gpt2 = GPT2Model(GPT2Config(bos_token_id=0, eos_token_id=0, **SHAPE))
    gpt2.save_pretrained(tmp_path)
    model = warm_start(GPTBConfig(num_slots=6, **SHAPE), str(tmp_path))
    assert torch.equal(model.transformer.h[1].mlp.c_fc.weight, gpt2.h[1].mlp.c_fc.weight)
    assert torch.equal(model.lm_head.weight, gpt2.wte.weight)


def test_warm_start_of_another_shape_says_which(gpt2_folder: Path, tmp_path: Path) -> None:
    config = GPTBConfig(num_slots=6, **(SHAPE | {"n_layer": 3, "vocab_size": 32}))
    with pytest.raises(ValueError, match=r"n_layer 3 \(there: 2\), vocab_size 32 \(there: 31\)"):
        warm_start(config, str(gpt2_folder))
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a llama model"):
        warm_start(config, str(tmp_path))


def test_warm_start_from_a_gptb_keeps_its_initial_state(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    again = warm_start(model.config, str(tmp_path))
    assert torch.equal(again.transformer.initial_embeds, model.transformer.initial_embeds)


@pytest.mark.slow
def test_importing_the_package_registers_the_model_and_leaves_deepspeed_alone(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    program = (
        "import sys, gptb_ds, transformers;"
        f"print(type(transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})).__name__,"
        " 'deepspeed' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["GPTBLMHeadModel", "False"]


def test_a_warm_start_takes_over_what_no_key_names(tmp_path: Path) -> None:
    shape = SHAPE | {"activation_function": "relu", "layer_norm_epsilon": 1e-6, "n_inner": 24}
    source = GPT2Config(scale_attn_by_inverse_layer_idx=True, tie_word_embeddings=False, **shape)
    gpt2 = GPT2LMHeadModel(source)
    gpt2.save_pretrained(tmp_path)
    model = warm_start(GPTBConfig(num_slots=6, **SHAPE), str(tmp_path))
    for name in INHERITED:
        assert getattr(model.config, name) == getattr(source, name), name
    assert torch.equal(model.lm_head.weight, gpt2.lm_head.weight)
    assert not torch.equal(model.lm_head.weight, model.transformer.wte.weight)
    GPT2LMHeadModel(GPT2Config(add_cross_attention=True, **SHAPE)).save_pretrained(tmp_path / "crossed")
    with pytest.raises(ValueError, match="has cross-attention"):
        warm_start(GPTBConfig(num_slots=6, **SHAPE), str(tmp_path / "crossed"))
