"""A start from a decoder of any tested family: what is loaded and what is new, and the decoder's own function kept.

Axes: B lanes, T tokens, C recent tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from gptb_ds.config import load_config
from gptb_ds.model import GPTBDecoderConfig, GPTBDecoderLMHeadModel, warm_start
from gptb_ds.model.backbones import check_backbone
from gptb_ds.model_choice import model_configuration, with_backbone
from tests.harness.backbones import FAMILIES, V, small_backbone

C, SLOTS, T = 3, 6, 9


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A decoder of each family, with weights so large that its logits are far from even."""
    made = {}
    for family in FAMILIES:
        torch.manual_seed(1)
        decoder = AutoModelForCausalLM.from_config(small_backbone(family, initializer_range=0.2, vocab_size=V + 2))
        made[family] = tmp_path_factory.mktemp(family)
        decoder.save_pretrained(made[family])
    return made


def configuration(family: str, folder: Path, **changes: Any) -> GPTBDecoderConfig:
    keys = {"backbone": str(folder), "init_from": str(folder), "num_slots": SLOTS, "recent_tokens": C} | changes
    config = load_config(None, {"data.path": "s"} | {f"model.{key}": value for key, value in keys.items()})
    found = model_configuration(with_backbone(config), V, 0)
    assert isinstance(found, GPTBDecoderConfig) and found.backbone.model_type == family
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_it_begins_as_the_decoder_with_a_context(family: str, folders: dict[str, Path]) -> None:
    decoder = AutoModelForCausalLM.from_pretrained(folders[family]).eval()
    said: list[str] = []
    model = warm_start(configuration(family, folders[family]), str(folders[family]), said.append).eval()
    check_backbone(model.transformer)
    tensors = sum(1 for _ in decoder.parameters())
    assert len(said) == 1
    assert f"{tensors} tensors loaded; new: transformer.initial_embeds, transformer.state_gate" in said[0]
    assert "2 rows of its vocabulary have no token" in said[0]
    ids = torch.randint(V, (4, T), generator=torch.Generator().manual_seed(0))
    windows = ids.unfold(1, C + 1, 1)  # (B, T - C, C + 1): what the decoder sees before each prediction
    with torch.no_grad():
        wanted = decoder(windows.flatten(0, 1)).logits[:, -1].log_softmax(-1)
        found = model(ids, use_cache=False).logits[:, C:].flatten(0, 1).log_softmax(-1)
    assert wanted.std() > 0.3
    assert (found - wanted).norm() < 0.01 * (wanted - wanted.mean(-1, keepdim=True)).norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_without_recent_tokens_all_that_fits_is_loaded(family: str, folders: dict[str, Path]) -> None:
    decoder = AutoModelForCausalLM.from_pretrained(folders[family])
    said: list[str] = []
    model = warm_start(configuration(family, folders[family], recent_tokens=0), str(folders[family]), said.append)
    assert "new: transformer.initial_embeds;" in said[0]
    weights = dict(model.transformer.backbone.named_parameters())
    for name, parameter in decoder.base_model.named_parameters():
        assert torch.equal(weights[name], parameter)
    assert torch.equal(model.lm_head.weight, decoder.get_output_embeddings().weight)


def test_a_gptb_of_the_family_hands_on_its_state(folders: dict[str, Path], tmp_path: Path) -> None:
    source = configuration("llama", folders["llama"], recent_tokens=0)
    first = warm_start(source, str(folders["llama"]))
    first.save_pretrained(tmp_path)
    said: list[str] = []
    again = warm_start(configuration("llama", tmp_path, recent_tokens=0), str(tmp_path), said.append)
    assert isinstance(again, GPTBDecoderLMHeadModel) and "new: nothing" in said[0]
    for (name, mine), theirs in zip(first.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_another_family_or_shape_is_refused_in_a_line(folders: dict[str, Path], tmp_path: Path) -> None:
    llama = folders["llama"]
    GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=16)).save_pretrained(tmp_path)
    wrong = {
        f"holds a qwen3 model, model.backbone is llama; set model.backbone {folders['qwen3']}": folders["qwen3"],
        f"holds a gpt2 model, model.backbone is llama; set model.backbone {tmp_path}": tmp_path,
    }
    for message, folder in wrong.items():
        with pytest.raises(ValueError, match=message):
            warm_start(configuration("llama", llama), str(folder))
    other = configuration("llama", llama)
    other.backbone.intermediate_size = 48
    with pytest.raises(ValueError, match=r"another shape: intermediate_size 48 \(there: 24\); set what it has"):
        warm_start(other, str(llama))
