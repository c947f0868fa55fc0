"""A model that starts from a trained decoder's weights."""

from __future__ import annotations

import torch
from transformers import AutoConfig, GPT2Config

from .configuration import as_gptb_config, inherited
from .modeling import GPTBLMHeadModel


def warm_start(config: GPT2Config, path: str) -> GPTBLMHeadModel:
    """A model whose blocks start from the GPT-2 (or GPTB) at `path`, a folder or a hub name, in float32, for training.

    Only `initial_embeds` is new, unless `path` has one of the same shape. What `INHERITED` names follows `path`.

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
    pairs = [(key, getattr(config, key), getattr(source, key)) for key in ("n_layer", "n_head", "n_embd", "vocab_size")]
    wrong = [f"{key} {ours} (there: {theirs})" for key, ours, theirs in pairs if ours != theirs]
    if wrong:
        raise ValueError(f"the model at {path} has another shape: {', '.join(wrong)}; set what it has")
    return GPTBLMHeadModel.from_pretrained(path, config=config, dtype=torch.float32, use_safetensors=True).train()
