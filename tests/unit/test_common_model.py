"""What transformers' `ModelTesterMixin` asks of every model, in our words, of GPT-2 and of a Llama made recurrent.

docs/transformers.md lists all of its tests: which hold, and which do not apply and why.
Axes: B lanes, T tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from gptb_ds.model import GPTBDecoderLMHeadModel, GPTBLMHeadModel
from tests.harness.backbones import small_decoder
from tests.harness.models import V, random_ids, small_gptb

B, T = 3, 7
IDS = random_ids(B, T)
MASK = torch.ones_like(IDS)
MASK[1, :3] = 0
MAKE = {"gpt2": small_gptb, "llama": partial(small_decoder, "llama")}


@pytest.fixture(params=MAKE)
def model(request: pytest.FixtureRequest) -> GPTBLMHeadModel | GPTBDecoderLMHeadModel:
    return MAKE[request.param]()


def both(model: PreTrainedModel) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The model without a head, and the one with it."""
    return model.transformer, model


def same_weights(ours: PreTrainedModel, theirs: PreTrainedModel) -> None:
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name


# Folders


def test_saved_twice_it_is_the_same(model: PreTrainedModel, tmp_path: Path) -> None:
    for part in both(model):
        part.save_pretrained(tmp_path / "once")
        assert (tmp_path / "once" / "generation_config.json").exists() == part.can_generate()
        again = type(part).from_pretrained(tmp_path / "once")
        again.save_pretrained(tmp_path / "twice")
        again = type(part).from_pretrained(tmp_path / "twice")
        same_weights(again, part)
        assert torch.equal(again(IDS, attention_mask=MASK)[0], part(IDS, attention_mask=MASK)[0])


def test_a_head_s_folder_loads_without_it_and_a_body_s_folder_with_a_new_head(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    assert model.base_model_prefix == "transformer" and model.base_model is model.transformer
    model.save_pretrained(tmp_path / "head")
    model.transformer.save_pretrained(tmp_path / "body")
    same_weights(AutoModel.from_pretrained(tmp_path / "head"), model.transformer)
    with_head, report = type(model).from_pretrained(tmp_path / "body", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]  # the head is the embedding
    same_weights(with_head, model)


@pytest.mark.parametrize("kind", MAKE)
def test_an_untied_head_is_a_weight_of_its_own(kind: str, tmp_path: Path) -> None:
    model = MAKE[kind](tie_word_embeddings=False)
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    same_weights(again, model)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == {"lm_head.weight"}


def test_weights_in_memory_make_a_model(model: PreTrainedModel) -> None:
    for part in both(model):
        made = type(part).from_pretrained(None, config=part.config, state_dict=part.state_dict())
        same_weights(made, part)


def test_weights_that_are_missing_are_drawn_as_new_ones_are(model: PreTrainedModel) -> None:
    made = type(model).from_pretrained(None, config=model.config, state_dict={})
    new = type(model)(model.config)
    for (name, tensor), (_, fresh) in zip(made.named_parameters(), new.named_parameters(), strict=True):
        assert not tensor.is_meta and tensor.isfinite().all(), name
        if fresh.numel() > 50:  # drawn: the same spread; set: the same value
            assert tensor.std().item() == pytest.approx(fresh.std().item(), rel=0.5), name


def test_weights_of_another_shape_can_be_left_out(model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["transformer.initial_embeds"] = torch.zeros(2, 16)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError):
        type(model).from_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    assert loaded.transformer.initial_embeds.shape == model.transformer.initial_embeds.shape
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_it_is_built_and_loaded_on_any_device(model: PreTrainedModel, tmp_path: Path) -> None:
    with torch.device("meta"):
        assert all(p.is_meta for p in type(model)(model.config).parameters())
    model.save_pretrained(tmp_path)
    with torch.device("cpu"):
        same_weights(type(model).from_pretrained(tmp_path), model)
    low = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16} and low.config.dtype == torch.bfloat16


# Outputs


def test_a_row_does_not_depend_on_its_neighbours(model: PreTrainedModel) -> None:
    for part in both(model):
        together = part(IDS, attention_mask=MASK, output_hidden_states=True)
        for row in range(B):
            alone = part(IDS[row : row + 1], attention_mask=MASK[row : row + 1], output_hidden_states=True)
            torch.testing.assert_close(together[0][row : row + 1], alone[0])
            for layer, layer_alone in zip(together.hidden_states, alone.hidden_states, strict=True):
                torch.testing.assert_close(layer[row : row + 1], layer_alone)
        assert torch.equal(part(IDS, attention_mask=MASK)[0], together[0])  # and twice it is the same


def test_a_tuple_has_what_a_dict_has(model: PreTrainedModel) -> None:
    for part in both(model):
        for extra in ({}, {"output_hidden_states": True}, {"use_cache": False}):
            plain, named = part(IDS, return_dict=False, **extra), part(IDS, return_dict=True, **extra).to_tuple()
            assert type(plain) is tuple and len(plain) == len(named)
            pairs = [pair for pair in zip(plain, named, strict=True) if isinstance(pair[0], torch.Tensor)]
            assert pairs and all(torch.equal(*pair) for pair in pairs)


def test_layers_can_be_chosen(model: PreTrainedModel) -> None:
    whole = model(IDS, output_hidden_states=True).hidden_states
    assert len(whole) == model.config.num_hidden_layers + 1
    for asked, there in ((1, {1}), ([0, -1], {0, len(whole) - 1}), ([], set())):
        chosen = model(IDS, output_hidden_states=asked).hidden_states
        assert len(chosen) == len(whole)
        for number, layer in enumerate(chosen):
            assert torch.equal(layer, whole[number]) if number in there else layer is None
    model.config.output_hidden_states = True
    assert len(model(IDS).hidden_states) == len(whole)


def test_logits_can_be_those_of_some_tokens(model: PreTrainedModel) -> None:
    whole = model(IDS).logits
    torch.testing.assert_close(model(IDS, logits_to_keep=2).logits, whole[:, -2:])
    torch.testing.assert_close(model(IDS, logits_to_keep=torch.tensor([0, 3])).logits, whole[:, [0, 3]])


def test_labels_that_are_shifted_already_take_their_place(model: PreTrainedModel) -> None:
    shifted = torch.cat((IDS[:, 1:], torch.full((B, 1), -100)), dim=1)
    expected = model(IDS, labels=IDS).loss
    torch.testing.assert_close(model(IDS, shift_labels=shifted).loss, expected)
    torch.testing.assert_close(model(IDS, labels=IDS.flip(1), shift_labels=shifted).loss, expected)
    assert not torch.allclose(model(IDS, shift_labels=shifted.roll(1, 1)).loss, expected)
    # Trainer leaves an evaluation's loss out when data lack any argument with "label" in its name.
    assert [name for name in inspect.signature(model.forward).parameters if "label" in name] == ["labels"]


@pytest.mark.parametrize("kind", MAKE)
def test_every_kind_of_attention_gives_the_same(kind: str, tmp_path: Path) -> None:
    model = MAKE[kind](torch.float64)
    near = {"atol": 1e-3, "rtol": 1e-2}  # Llama's eager attention takes its softmax in float32
    expected = model(IDS, attention_mask=MASK).logits
    model.save_pretrained(tmp_path)
    for attention in ("eager", "sdpa"):
        loaded = type(model).from_pretrained(tmp_path, attn_implementation=attention)
        assert loaded.config._attn_implementation == attention
        torch.testing.assert_close(loaded(IDS, attention_mask=MASK).logits, expected, **near)
        model.set_attn_implementation(attention)
        torch.testing.assert_close(model(IDS, attention_mask=MASK).logits, expected, **near)


# Embeddings


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", MAKE)
def test_the_vocabulary_grows_and_shrinks(kind: str, tied: bool, tmp_path: Path) -> None:
    model = MAKE[kind](tie_word_embeddings=tied)
    before = model(IDS).logits
    model.resize_token_embeddings(V + 5)
    assert (
        model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == model.lm_head.out_features == V + 5
    )
    torch.testing.assert_close(model(IDS).logits[..., :V], before)
    model(IDS + 5)  # the new tokens are there
    model.save_pretrained(tmp_path)
    same_weights(type(model).from_pretrained(tmp_path), model)
    model.resize_token_embeddings(V, pad_to_multiple_of=8)
    assert model.config.vocab_size == 32 and (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    torch.testing.assert_close(model(IDS).logits[..., :V], before)


def test_embeddings_can_be_replaced(model: PreTrainedModel) -> None:
    new = torch.nn.Embedding(V, 16)
    for part in both(model):
        part.set_input_embeddings(new)
        assert part.get_input_embeddings() is new
    assert model.main_input_name == "input_ids"
    assert next(iter(inspect.signature(model.forward).parameters)) == "input_ids"


# Training


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_every_weight_learns_with_and_without_gradient_checkpointing(
    model: PreTrainedModel, reentrant: bool | None
) -> None:
    model.train()
    model.gradient_checkpointing_enable(*(() if reentrant is None else ({"use_reentrant": reentrant},)))
    model(IDS, attention_mask=MASK, labels=IDS, num_items_in_batch=torch.tensor(11)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_replicas_of_data_parallel_return_what_can_be_gathered(model: PreTrainedModel) -> None:
    """As torch.nn.parallel.scatter_gather.gather does it on GPUs: by keys, and the class made again of pairs."""
    whole = model(IDS, labels=IDS)
    model._is_replica = True
    parts = [model(IDS[row : row + 1], labels=IDS[row : row + 1]) for row in range(B)]
    first = parts[0]
    gathered = type(first)((key, torch.cat([part[key].reshape(1, -1) for part in parts])) for key in first)
    assert set(gathered.keys()) == {"loss", "logits", "past_hidden_states"}
    torch.testing.assert_close(gathered["logits"].reshape(whole.logits.shape), whole.logits)
    torch.testing.assert_close(gathered["loss"].mean(), whole.loss)


def test_gradients_reach_what_stands_before_frozen_weights(model: PreTrainedModel) -> None:
    model.train().requires_grad_(False)
    model.enable_input_require_grads()
    model(IDS, labels=IDS).loss.backward()
    model.disable_input_require_grads()
    felt: list[Any] = []
    model.get_input_embeddings().register_forward_hook(lambda _m, _i, out: felt.append(out.requires_grad))
    model(IDS)
    assert felt == [False]


# transformers' exporters


@pytest.mark.slow
def test_transformers_exporter_takes_the_model_and_its_state(model: PreTrainedModel) -> None:
    exporters = pytest.importorskip("transformers.exporters.exporter_dynamo")
    configs = pytest.importorskip("transformers.exporters.configs")
    with torch.no_grad():
        cache = model(IDS[:, :3]).past_key_values
        inputs = {"input_ids": IDS[:, 3:], "past_key_values": cache.copy()}
        expected = model(IDS[:, 3:], past_key_values=cache.copy()).logits
        exported = exporters.DynamoExporter().export(model, dict(inputs), config=configs.DynamoConfig())
        program = getattr(exported, "program", exported)
        output = program.module()(**(inputs | {"past_key_values": cache.copy()}))
    torch.testing.assert_close(output["logits"], expected, atol=1e-5, rtol=1e-4)
