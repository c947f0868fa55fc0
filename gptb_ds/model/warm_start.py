"""A model that starts from a trained decoder's weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, GPT2Config

from .configuration import as_gptb_config, inherited
from .modeling import GPTBLMHeadModel


def warm_start(config: GPT2Config, path: str, report: Callable[[str], None] = lambda line: None) -> GPTBLMHeadModel:
    """A model whose blocks start from the GPT-2 (or GPTB) at `path`, a folder or a hub name, in float32, for training.

    What `INHERITED` names follows `path`. `report` is told, in a line, what was loaded and what is new: the initial
    state, unless `path` has one of the same shape. A vocabulary that was padded to a round size keeps its rows. With
    `config.preserve_decoder` the model begins as that decoder with a context of `recent_tokens` + 1 tokens; before a
    document's first tokens stands the end of text.

    Raises ValueError when the shape of the model at `path` is not that of `config`, or when it has cross-attention.
    """
    config = as_gptb_config(config)
    source = AutoConfig.from_pretrained(path)
    if not isinstance(source, GPT2Config):
        raise ValueError(f"{path} holds a {source.model_type} model; GPTB starts from a GPT-2")
    if source.add_cross_attention:
        raise ValueError(f"the model at {path} has cross-attention, which GPTB has no use for; choose another")
    for key, value in inherited(source).items():
        setattr(config, "slot_positions" if key == "n_positions" and config.slot_positions else key, value)
    pairs = [(key, getattr(config, key), getattr(source, key)) for key in ("n_layer", "n_head", "n_embd")]
    wrong = [f"{key} {ours} (there: {theirs})" for key, ours, theirs in pairs if ours != theirs]
    if config.vocab_size > source.vocab_size:
        wrong.append(f"vocab_size {config.vocab_size} (there: {source.vocab_size})")
    if wrong:
        raise ValueError(f"the model at {path} has another shape: {', '.join(wrong)}; set what it has")
    padding = source.vocab_size - config.vocab_size
    config.vocab_size = source.vocab_size
    loaded: Any = GPTBLMHeadModel.from_pretrained(
        path, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    model: GPTBLMHeadModel = loaded[0]
    new = sorted(loaded[1]["missing_keys"])
    if config.preserve_decoder and any(name.endswith("initial_embeds") for name in new):
        end = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
        with torch.no_grad():
            model.transformer.initial_embeds[-config.recent_tokens :] = model.transformer.wte.weight[end or 0]
    count = sum(1 for name, _ in model.named_parameters() if name not in new)
    report(
        f"{path}: {count} tensors loaded; new: {', '.join(new) or 'nothing'}"
        + (f"; {padding} rows of its vocabulary have no token" if padding else "")
    )
    return model.train()
