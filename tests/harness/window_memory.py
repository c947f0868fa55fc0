"""The memory that a window takes for its backward pass, as a formula; docs/gpu.md has it in symbols.

Axes: S slots, E embedding, H heads, K steps; N blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

from gptb_ds.model.configuration import GPTBConfig
from gptb_ds.model.objective import HEAD_ELEMENTS


@dataclass(frozen=True)
class KeptBytes:
    """Bytes that forward keeps for backward; see `kept_bytes`. `head` is for each logit that exists."""

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


def kept_bytes(config: GPTBConfig, value_bytes: int) -> KeptBytes:
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
    return KeptBytes(
        lane_step=blocks * block + around,
        lane_state=(slots - 1) * width * value_bytes,
        hidden=width * value_bytes,
        head=2 * value_bytes + 8.0,
        vocabulary=config.vocab_size,
    )
