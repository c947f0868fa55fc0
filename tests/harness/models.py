"""Small random models whose state matters, for tests of what transformers does with them."""

from __future__ import annotations

from typing import Any

import torch

from gptb_ds import GPTBConfig, GPTBLMHeadModel

V = 29


def small_gptb(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> GPTBLMHeadModel:
    """In eval mode, without dropout; weights so large that a token is felt many steps later."""
    torch.manual_seed(seed)
    values: dict[str, Any] = {
        "vocab_size": V, "n_positions": 6, "num_slots": 6, "n_embd": 16, "n_layer": 2, "n_head": 2, "dropout": 0.0,
        "initializer_range": 0.3,
    }  # fmt: skip
    return GPTBLMHeadModel(GPTBConfig(**(values | changes))).to(dtype).eval()


def random_ids(lanes: int, steps: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, V, (lanes, steps), generator=torch.Generator().manual_seed(seed))
