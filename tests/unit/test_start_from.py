"""What `model.init_from` names is loaded whole, or refused in one line that names the key and what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from gptb_ds.config import Config, ConfigError
from gptb_ds.model_choice import model_configuration
from gptb_ds.training.start_from import start_from

SHAPE = {"vocab_size": 30, "n_positions": 8, "n_layer": 1, "n_head": 2, "n_embd": 16}
OURS = model_configuration(
    Config(data={"path": ["x"], "lanes": 2}, model={"num_slots": 4, "n_layer": 1, "n_head": 2, "n_embd": 16}), 30, 0
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(1)
    GPT2LMHeadModel(GPT2Config(**SHAPE)).save_pretrained(folder)
    return folder


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return make


def setting(**values: object) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return make


def only(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        shutil.rmtree(folder)
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("{}")

    return make


FC = "transformer.h.0.mlp.c_fc.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (weights(lambda t: t.pop(FC)), "its files lack the tensor 'h.0.mlp.c_fc.weight'"),
        (weights(lambda t: t.update({FC: torch.zeros(16, 32)})), "'h.0.mlp.c_fc.weight' is F32 (16, 32)"),
        (weights(lambda t: t.update({FC: torch.zeros(16, 64, dtype=torch.int8)})), "is I8 (16, 64)"),
        (weights(lambda t: t[FC].fill_(torch.nan)), f"the tensor {FC!r} holds numbers that are not finite"),
        (setting(tie_word_embeddings=False), "its files lack the tensor 'lm_head.weight'"),
        (setting(activation_function="none"), "cannot be loaded: 'none'"),
        (setting(n_layer=2), "has another shape: n_layer 1 (there: 2)"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 50), "its weights cannot be read"),
        (lambda folder: (folder / "model.safetensors").unlink(), "lacks model.safetensors"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded: It looks like the config file"),
        (only("adapter_config.json"), "holds an adapter; merge it into its model first"),
        (only("model.onnx"), "holds no model (no config.json)"),
        (only("checkpoints/step-00000001/manifest.json"), "is a run or a checkpoint; name what `gptb-ds export"),
        (lambda folder: shutil.rmtree(folder), "no such folder (models of the hub are named OWNER/NAME)"),
    ],
)
def test_what_is_no_whole_model_is_refused(
    change: Callable[[Path], object], words: str, saved: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "gpt2"))
    change(folder)
    said: list[str] = []
    with pytest.raises(ConfigError) as caught:
        start_from(OURS, str(folder), said.append)
    line = str(caught.value)
    assert words in line and str(folder) in line and "\n" not in line
    assert said == []


def test_a_whole_one_is_loaded_and_said(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    model = start_from(OURS, str(saved), said.append)
    assert torch.equal(model.transformer.wte.weight, load_file(saved / "model.safetensors")["transformer.wte.weight"])
    assert said == [f"{saved}: 16 tensors loaded; new: transformer.initial_embeds"]
    assert capfd.readouterr() == ("", "")  # no bar, no table


def test_an_empty_name_is_no_value() -> None:
    """A variable of a shell that is not set must not start a run from nothing, or put it into this folder."""
    for values in ({"model": {"init_from": ""}}, {"run": {"dir": ""}}, {"data": {"path": [""], "lanes": 2}}):
        with pytest.raises(ValueError, match="at least 1 character"):
            Config(**({"data": {"path": ["x"], "lanes": 2}} | values))
