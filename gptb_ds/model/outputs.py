"""What the models return: transformers' outputs that also unpack as the original GPTB's tuples do.

Axes: B lanes, T steps, S slots, E embedding, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from .cache import GPTBCache


@dataclass
class GPTBModelOutput(ModelOutput):
    """`last_hidden_state` (B, T, E), the state (B, S-1, E), and each layer's outputs of the token's slot when asked.

    Unpacks as `outputs, state`. Everything else (keys, indices, `to_tuple`) is as transformers has it.
    """

    last_hidden_state: torch.Tensor | None = None
    past_hidden_states: torch.Tensor | None = None
    past_key_values: GPTBCache | None = None
    hidden_states: tuple[torch.Tensor | None, ...] | None = None

    def __iter__(self) -> Iterator[object]:
        return iter((self.last_hidden_state, self.past_hidden_states))


@dataclass
class GPTBOutput(ModelOutput):
    """`loss` (a scalar, when labels were given), `logits` (B, T, V), and the state: `past_hidden_states` (B, S-1, E).

    `past_key_values` is the same state as transformers' `generate` carries it; `hidden_states` are the outputs
    (B, T, E) of the embedding and of each block at the token's slot, when asked for. Unpacks as the original's loop
    does: `logits, past_hidden_states, loss = model(tokens, past_hidden_states=past_hidden_states)`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: GPTBCache | None = None
    past_hidden_states: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor | None, ...] | None = None

    def __iter__(self) -> Iterator[object]:
        return iter((self.logits, self.past_hidden_states, self.loss))


@dataclass
class GatheredOutput(GPTBOutput):
    """What a replica of `torch.nn.DataParallel` returns: its gather walks over an output by its keys.

    transformers' Trainer makes such replicas when it is started without a launcher on a machine with several GPUs.
    """

    def __iter__(self) -> Iterator[object]:
        return iter(self.keys())
