"""What is no whole GPTB is refused in one line: numbers out of random weights would look like a result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    ByT5Tokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from gptb_ds.cli import main
from gptb_ds.loading import load_any
from gptb_ds.model import GPTBConfig, GPTBLMHeadModel, GPTBModel

SHAPE = {"vocab_size": 259, "n_positions": 4, "n_layer": 1, "n_head": 2, "n_embd": 16}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    torch.manual_seed(1)
    GPTBLMHeadModel(GPTBConfig(num_slots=4, **SHAPE)).save_pretrained(folder)
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    return folder


@pytest.fixture
def export(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "export"))


def refusal(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What each verb that takes a model says: one line, the same words, exit code 2, nothing written or printed."""
    said = []
    for verb in (["evaluate", "--data", "nowhere"], ["generate"], ["export", "--out", str(folder.parent / "out")]):
        capsys.readouterr()
        assert main([verb[0], str(folder), *verb[1:]]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1, captured.err
        said.append(captured.err.removeprefix(f"gptb-ds {verb[0]}: "))
    assert len(set(said)) == 1
    assert not (folder.parent / "out").exists()
    return said[0]


def change_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: t for name, t in tensors.items() if t is not None}, path, metadata={"format": "pt"})


def test_another_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    llama = LlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(llama).save_pretrained(tmp_path / "llama")
    GPT2LMHeadModel(GPT2Config(**SHAPE)).save_pretrained(tmp_path / "gpt2")
    t5 = T5Config(vocab_size=259, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    for kind in ("llama", "gpt2", "t5"):
        ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / kind)
        said = refusal(tmp_path / kind, capsys)
        assert f"holds a model of type '{kind}', this reads 'gptb'" in said
        assert ("--model.init_from" in said) == (kind != "t5")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"transformer__initial_embeds": None}, "lacks the tensor 'transformer.initial_embeds'"),
        (
            {"transformer__ln_f__bias": None, "transformer__wte__weight": None},
            "lacks the tensor 'transformer.ln_f.bias' and 1 more tensors",
        ),
        ({"transformer__h__7__ln_1__bias": torch.zeros(16)}, "has a tensor 'transformer.h.7.ln_1.bias'"),
        ({"transformer__ln_f__bias": torch.zeros(17)}, "'transformer.ln_f.bias' is F32 (17,)"),
        ({"transformer__ln_f__bias": torch.zeros(16, dtype=torch.int32)}, "'transformer.ln_f.bias' is I32 (16,)"),
        (
            {"transformer__ln_f__bias": torch.full((16,), torch.nan)},
            "'transformer.ln_f.bias' holds numbers that are not",
        ),
        ({"transformer__ln_f__weight": torch.arange(16) / 0}, "'transformer.ln_f.weight' holds numbers that are not"),
    ],
)
def test_tensors_must_be_the_models(export: Path, changes: dict, words: str, capsys: pytest.CaptureFixture[str]):
    change_weights(export, **changes)
    assert words in refusal(export, capsys)


def test_damaged_files_are_named(export: Path, capsys: pytest.CaptureFixture[str]):
    weights = (export / "model.safetensors").read_bytes()
    for content in (weights[:100], weights[:-8], b"", b"\xff" * 64):
        (export / "model.safetensors").write_bytes(content)
        assert "its weights cannot be read" in refusal(export, capsys)
    (export / "model.safetensors").unlink()
    assert "lacks model.safetensors" in refusal(export, capsys)
    for content in ('{"weight_map": 3}', '{"weight_map'):
        (export / "model.safetensors.index.json").write_text(content)
        assert f"{export}: its weights cannot be read" in refusal(export, capsys)


def test_a_configuration_that_makes_no_model_is_named(export: Path, capsys: pytest.CaptureFixture[str]):
    values = json.loads((export / "config.json").read_text())
    for content, words in (
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        (json.dumps(values | {"model_type": None}), "holds a model of type None"),
        (json.dumps(values | {"num_slots": 1}), "makes no model: num_slots is 1"),
        (json.dumps(values | {"n_embd": "wide"}), "makes no model"),
        (json.dumps(values | {"n_layer": 2}), "lacks the tensor 'transformer.h.1."),
        (json.dumps(values | {"vocab_size": 300}), "is F32 (259, 16)"),
        (json.dumps(values | {"activation_function": "none"}), "makes no model: 'none'"),
        (json.dumps(values | {"rebias": "no"}), "makes no model: rebias is 'no'; it must be true or false"),
        (json.dumps(values | {"eos_token_id": 259}), "its eos_token_id 259 is beyond its 259 rows"),
        (json.dumps(values | {"quantization_config": {"quant_method": "gptq"}}), "its weights are quantised"),
    ):
        (export / "config.json").write_text(content)
        assert words in refusal(export, capsys)


def test_an_adapter_is_no_model(export: Path, capsys: pytest.CaptureFixture[str]):
    (export / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert f"{export}: holds an adapter, which is not read" in refusal(export, capsys)
    (export / "config.json").unlink()
    assert f"{export}: holds an adapter, which is not read" in refusal(export, capsys)


def test_a_missing_or_broken_tokenizer_is_named(export: Path, capsys: pytest.CaptureFixture[str]):
    (export / "tokenizer_config.json").write_text("{")
    assert f"{export}: its tokenizer cannot be read" in refusal(export, capsys)
    for path in export.glob("*token*"):
        path.unlink()
    assert "no tokenizer files" in refusal(export, capsys)


def test_whole_ones_still_load(export: Path, tmp_path: Path):
    """A tied head may be in the file or not; a GPTBModel has none; shards and low precision are whole models too."""
    want = load_any(str(export))[0]
    change_weights(export, lm_head__weight=want.transformer.wte.weight.detach().clone())
    folders = {"head": export}
    for name, save in (
        ("body", lambda folder: GPTBModel.from_pretrained(export).save_pretrained(folder)),
        ("shards", lambda folder: want.save_pretrained(folder, max_shard_size="8KB")),
        ("untied", lambda folder: untied().save_pretrained(folder)),
    ):
        folders[name] = tmp_path / name
        save(folders[name])
        ByT5Tokenizer(extra_ids=0).save_pretrained(folders[name])
    assert (folders["shards"] / "model.safetensors.index.json").exists()
    for name, folder in folders.items():
        got = load_any(str(folder))[0]
        assert got.dtype == torch.float32
        if name != "untied":
            assert torch.equal(got.lm_head.weight, want.lm_head.weight)
    change_weights(folders["untied"], lm_head__weight=None)
    with pytest.raises(ValueError, match=r"lacks the tensor 'lm_head.weight'"):
        load_any(str(folders["untied"]))


def untied() -> GPTBLMHeadModel:
    return GPTBLMHeadModel(GPTBConfig(num_slots=4, tie_word_embeddings=False, **SHAPE))
