"""A model that starts from a trained decoder's weights.

Axes: B lanes, T tokens, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, PreTrainedConfig, PreTrainedModel

from .backbones import adapted_backbone, build_decoder
from .configuration import as_gptb_config, inherited
from .decoder import AnyGPTB, GPTBDecoderLMHeadModel
from .decoder_configuration import GPTBDecoderConfig
from .modeling import GPTBLMHeadModel

Report = Callable[[str], None]
Facts = dict[str, Collection[str]]  # what transformers says of a loading: names by what is the matter with them


def _nobody(line: str) -> None:
    pass


def warm_start(config: GPT2Config | GPTBDecoderConfig, path: str, report: Report = _nobody) -> AnyGPTB:
    """A model whose blocks start from the decoder (or GPTB) at `path`, a folder or hub name, in float32, for training.

    It must be of the family of `config`'s backbone. What a run does not say (`INHERITED` in GPT-2; all but sizes,
    dropout and tokens in others) follows `path`. `report` is told, in a line, what was loaded and what is new: the
    initial state, unless `path` has one of the same shape. A vocabulary that was padded to a round size keeps its rows.
    With `config.preserve_decoder` the model begins as that decoder with a context of `recent_tokens` + 1 tokens; before
    a document's first tokens stands the end of text.

    Raises ValueError, in a line, when the model at `path` is of another family or shape, has cross-attention, or does
    more between blocks and logits than is known here.
    """
    source = AutoConfig.from_pretrained(path)
    if isinstance(config, GPTBDecoderConfig):
        return _from_decoder(config, source, path, report)
    if not isinstance(source, GPT2Config):
        raise ValueError(
            f"{path} holds a {source.model_type} model; GPTB starts from a GPT-2 unless model.backbone says another:"
            f" set model.backbone {path}"
        )
    return _from_gpt2(config, source, path, report)


def _from_gpt2(config: GPT2Config, source: GPT2Config, path: str, report: Report) -> GPTBLMHeadModel:
    config = as_gptb_config(config)
    if source.add_cross_attention:
        raise ValueError(f"the model at {path} has cross-attention, which GPTB has no use for; choose another")
    for key, value in inherited(source).items():
        setattr(config, "slot_positions" if key == "n_positions" and config.slot_positions else key, value)
    pairs = [(key, getattr(config, key), getattr(source, key)) for key in ("n_layer", "n_head", "n_embd")]
    _check_shape(pairs, config.vocab_size, source.vocab_size, path)
    padding = source.vocab_size - config.vocab_size
    config.vocab_size = source.vocab_size
    loaded = GPTBLMHeadModel.from_pretrained(
        path, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    model, facts = cast("tuple[GPTBLMHeadModel, Facts]", loaded)
    new = sorted(facts["missing_keys"])
    _begin_with_end_of_text(model, new)
    report(_line(model, path, new, padding))
    return model.train()


def _from_decoder(
    config: GPTBDecoderConfig, source: PreTrainedConfig, path: str, report: Report
) -> GPTBDecoderLMHeadModel:
    is_ours = isinstance(source, GPTBDecoderConfig)
    theirs: Any = source.backbone if isinstance(source, GPTBDecoderConfig) else source
    ours = config.backbone
    if theirs.model_type != ours.model_type:
        raise ValueError(
            f"{path} holds a {theirs.model_type} model, model.backbone is {ours.model_type}; set model.backbone {path}"
        )
    names = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size")
    pairs = [(name, getattr(ours, name, None), getattr(theirs, name, None)) for name in names]
    _check_shape(pairs, config.vocab_size, theirs.vocab_size, path)
    padding = theirs.vocab_size - config.vocab_size
    loaded = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    decoder, facts = cast("tuple[PreTrainedModel, Facts]", loaded)
    missing = set(facts["missing_keys"])
    head = decoder.get_output_embeddings()
    config = config.own_copy()
    config.backbone_config = adapted_backbone(
        theirs,
        dropout=getattr(ours, "attention_dropout", 0.0),
        **{key: getattr(ours, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    config.tie_word_embeddings = head.weight is decoder.get_input_embeddings().weight
    config.head_bias = head.bias is not None
    model = build_decoder(config)
    if is_ours:
        weights = dict(decoder.named_parameters())
    else:
        weights = {f"transformer.backbone.{name}": p for name, p in decoder.base_model.named_parameters()}
        weights |= {f"lm_head.{name}": p for name, p in head.named_parameters()}
        prefix = f"{decoder.base_model_prefix}."
        missing = {
            f"transformer.backbone.{name.removeprefix(prefix)}" if name.startswith(prefix) else name for name in missing
        }
    new = []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            there = weights.get(name)
            if there is None or name in missing or there.shape != parameter.shape:
                new.append(name)
            else:
                parameter.copy_(there)
    _check_head(model, decoder, path)
    _begin_with_end_of_text(model, new)
    report(_line(model, path, sorted(new), padding))
    return model.train()


@torch.no_grad()
def _check_head(model: GPTBDecoderLMHeadModel, decoder: PreTrainedModel, path: str) -> None:
    """One token through the decoder: what its head makes of the last hidden state must be what ours does."""
    if isinstance(decoder, GPTBDecoderLMHeadModel):
        return
    ids_BT = torch.zeros((1, 1), dtype=torch.long)
    theirs_BTV = decoder.eval()(ids_BT, use_cache=False).logits
    ours_BTV = model.eval().logits_of(decoder.base_model(ids_BT, use_cache=False).last_hidden_state)
    if not torch.allclose(ours_BTV, theirs_BTV, rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"the head of the model at {path} is no linear map of a kind that is known here; choose another"
        )


def _check_shape(pairs: list[tuple[str, object, object]], vocabulary: int, there: int, path: str) -> None:
    wrong = [f"{key} {ours} (there: {theirs})" for key, ours, theirs in pairs if ours != theirs]
    if vocabulary > there:
        wrong.append(f"vocab_size {vocabulary} (there: {there})")
    if wrong:
        raise ValueError(f"the model at {path} has another shape: {', '.join(wrong)}; set what it has")


def _begin_with_end_of_text(model: AnyGPTB, new: Collection[str]) -> None:
    """Before a document's first tokens, a preserved decoder sees the end of the text before it."""
    config = model.config
    if config.preserve_decoder and "transformer.initial_embeds" in new:
        end = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
        with torch.no_grad():
            first = config.num_slots - 1 - config.recent_tokens
            model.transformer.initial_embeds[first:] = model.transformer.embed(torch.tensor(end or 0))


def _line(model: AnyGPTB, path: str, new: list[str], padding: int) -> str:
    count = sum(1 for name, _ in model.named_parameters() if name not in new)
    rows = f"; {padding} rows of its vocabulary have no token" if padding else ""
    return f"{path}: {count} tensors loaded; new: {', '.join(new) or 'nothing'}{rows}"
