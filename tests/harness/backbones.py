"""Small GPTBs over other decoders than GPT-2, with weights so large that a token is felt many steps later."""

from __future__ import annotations

from typing import Any

import torch

from gptb_ds.model import GPTBDecoderConfig, GPTBDecoderLMHeadModel
from gptb_ds.model.backbones import TESTED, named_backbone

V = 29
FAMILIES = TESTED
# Those whose keys and values have heads of their own, so that several heads may share them.
GROUPED = ("llama", "qwen3", "gemma", "phi3")


def small_backbone(family: str, *, dropout: float = 0.0, **values: Any) -> Any:
    """A decoder's configuration: width 16, two layers (Gemma 3: of both kinds), two heads."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    if family in GROUPED:
        sizes["num_key_value_heads"] = 1
    if family == "gemma3_text":
        values = {"layer_types": ["sliding_attention", "full_attention"]} | values
    return named_backbone(family, sizes, dropout=dropout, **({"vocab_size": V, "initializer_range": 0.3} | values))


def decoder_config(family: str, backbone: dict[str, Any] | None = None, **changes: Any) -> GPTBDecoderConfig:
    return GPTBDecoderConfig(
        backbone_config=small_backbone(family, **(backbone or {})), **({"num_slots": 6, "eos_token_id": 0} | changes)
    )


def small_decoder(
    family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> GPTBDecoderLMHeadModel:
    """In eval mode, without dropout."""
    torch.manual_seed(seed)
    return GPTBDecoderLMHeadModel(decoder_config(family, **changes)).to(dtype).eval()
