"""The memory that a window takes for its backward pass, as a formula, and what a GPU has left for it.

Axes: S slots, E embedding, H heads, K steps; N blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from gptb_ds.model.configuration import GPTBConfig
from gptb_ds.model.objective import HEAD_ELEMENTS


@dataclass(frozen=True)
class WindowMemory:
    """Bytes that forward keeps for backward; see `window_memory`. `head` is for each logit that exists."""

    lane_step: float
    lane_state: float
    hidden: float
    head: float
    vocabulary: int

    def kept(self, lanes: int, steps: int, recompute_every: int = 0) -> float:
        """Of so many lanes at once: all steps, or the states at the edges and the steps between two of them."""
        head = self.head * min(HEAD_ELEMENTS, lanes * steps * self.vocabulary)
        if recompute_every == 0 or recompute_every >= steps:
            return lanes * steps * (self.lane_step + self.hidden) + head
        edges = -(-steps // recompute_every)
        return lanes * (recompute_every * self.lane_step + edges * self.lane_state + steps * self.hidden) + head


def window_memory(config: GPTBConfig, value_bytes: int) -> WindowMemory:
    """Of GPT-2's blocks on a GPU, `value_bytes` a value (2 in bf16 and fp16, 4 in fp32).

    A block keeps 16 values a slot and width: its input, the two normalised ones, queries, keys and values (3), the
    attention's result, the stream between, and 4 + 4 around the activation; and a few numbers a slot: mean and
    deviation of two normalisations, the attention's normaliser a head. With dropout two masks, a byte a value. Around
    the blocks: the embedded slots and the last normalisation. Of a step the head reads one vector; its logits exist for
    `HEAD_ELEMENTS` at a time: as values, in float32 as shares and gradients, as gradients.
    """
    slots, width, heads, blocks = config.num_slots, config.n_embd, config.n_head, config.n_layer
    masks = 2 * width if config.resid_pdrop else 0
    block = slots * (16 * width * value_bytes + 4 * (4 + heads) + masks)
    around = slots * (width * value_bytes + 8 + masks // 2)
    return WindowMemory(
        lane_step=blocks * block + around,
        lane_state=(slots - 1) * width * value_bytes,
        hidden=width * value_bytes,
        head=2 * value_bytes + 8.0,
        vocabulary=config.vocab_size,
    )


@dataclass(frozen=True)
class GpuMemory:
    """Bytes of a rank's GPU: all of it, what is left for windows beside weights and optimizer, what they need."""

    total: float
    free: float
    window: WindowMemory


def gpu_memory(
    config: PreTrainedConfig, device: torch.device, value_bytes: int, gradients: int, moments: int = 0
) -> GpuMemory | None:
    """As it is before a window; None on a CPU, and for a model whose blocks are not GPT-2's.

    `gradients` and `moments` count the values that this rank will have and has not yet.
    """
    if device.type != "cuda" or not isinstance(config, GPTBConfig):
        return None
    free, total = torch.cuda.mem_get_info(device)
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    later = gradients * value_bytes + moments * 4
    return GpuMemory(total, max(0.0, free + idle - later), window_memory(config, value_bytes))
