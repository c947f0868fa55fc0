"""Attention between a handful of slots: which of transformers' kernels runs on which device.

Axes: B lanes, H heads, S slots, D width of a head.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "gptb_slots"


def slot_attention(
    module: torch.nn.Module,
    query_BHSD: torch.Tensor,
    key_BHSD: torch.Tensor,
    value_BHSD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' attention interface: plain matrix products on a CPU, PyTorch's fused kernel elsewhere.

    Over a few slots the products win on a CPU (tests/benchmarks/bench_step.py); on a GPU one launch beats six. The
    products are those of the module's own family: each file of transformers has its `eager_attention_forward`.
    """
    attend: Any = sdpa_attention_forward
    if query_BHSD.device.type == "cpu":
        attend = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    return attend(module, query_BHSD, key_BHSD, value_BHSD, attention_mask, **kwargs)


AttentionInterface.register(NAME, slot_attention)
