"""Attention between a handful of slots: which of transformers' kernels runs on which device.

Axes: B lanes, H heads, S slots, D width of a head.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "gptb_slots"
# cuDNN's and the flash kernels work on tiles of 64 or 128 rows. Over a few slots most of such a tile is empty: with 20
# slots, 1,024 lanes and 12 heads torch's memory-efficient kernel makes a whole window 1.05 times as fast as cuDNN's,
# which is torch's choice, and flash 0.82 times (docs/speed.md). The others follow for what it does not take.
FEW_SLOTS = 32
_FOR_FEW = [getattr(SDPBackend, f"{kind}_ATTENTION") for kind in ("EFFICIENT", "CUDNN", "FLASH")] + [SDPBackend.MATH]


def slot_attention(
    module: torch.nn.Module,
    query_BHSD: torch.Tensor,
    key_BHSD: torch.Tensor,
    value_BHSD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: object,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' attention interface: plain matrix products on a CPU, PyTorch's fused kernel elsewhere.

    Over a few slots the products win on a CPU (tests/benchmarks/bench_step.py); on a GPU one launch beats six. The
    products are those of the module's own family: each file of transformers has its `eager_attention_forward`.
    """
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] = sdpa_attention_forward
    if query_BHSD.device.type == "cpu":
        attend = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    few = query_BHSD.device.type == "cuda" and query_BHSD.shape[2] <= FEW_SLOTS
    if few and not torch.compiler.is_compiling():
        with sdpa_kernel(_FOR_FEW, set_priority=True):
            return attend(module, query_BHSD, key_BHSD, value_BHSD, attention_mask, **kwargs)
    return attend(module, query_BHSD, key_BHSD, value_BHSD, attention_mask, **kwargs)


AttentionInterface.register(NAME, slot_attention)
