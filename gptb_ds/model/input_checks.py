"""What a recurrence is called with: shapes, types, masks and caches, and a line for each that does not fit.

Axes: B lanes, K steps (T where lanes come first), S slots, E embedding.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig

from .cache import GPTBCache


def check_inputs(
    ids_KB: torch.Tensor | None,
    embeds_KBE: torch.Tensor | None,
    state: torch.Tensor | None,
    reset_KB: torch.Tensor | None,
    recompute_every: int,
    config: PreTrainedConfig,
) -> None:
    """Raises ValueError for the first argument of a recurrence, time first, whose shape or type does not fit."""
    if (ids_KB is None) == (embeds_KBE is None):
        raise ValueError("give either input_ids or inputs_embeds, not both and not neither")
    width = config.hidden_size
    if ids_KB is not None:
        shape = _lanes_first(ids_KB)
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"input_ids has shape {shape}; expected (lanes, steps), at least one of each")
        if ids_KB.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids has type {ids_KB.dtype}; expected whole numbers (torch.int64 or int32)")
    else:
        assert embeds_KBE is not None
        shape = _lanes_first(embeds_KBE)
        if len(shape) != 3 or 0 in shape or shape[2] != width:
            raise ValueError(f"inputs_embeds has shape {shape}; expected (lanes, steps, {width})")
    check_state(state, shape[0], config)
    if reset_KB is not None and (_lanes_first(reset_KB) != shape[:2] or reset_KB.dtype != torch.bool):
        raise ValueError(
            f"reset has shape {_lanes_first(reset_KB)} and type {reset_KB.dtype}; expected {shape[:2]} like"
            " input_ids, bool"
        )
    if recompute_every < 0:
        raise ValueError(f"recompute_every is {recompute_every}; expected 0 (off) or a number of steps")


def check_state(state_BSE: torch.Tensor | None, lanes: int, config: PreTrainedConfig) -> None:
    """Raises ValueError for a state of another shape than `lanes` lanes of the model of `config` have."""
    expected = (lanes, config.num_slots - 1, config.hidden_size)
    if state_BSE is not None and tuple(state_BSE.shape) != expected:
        raise ValueError(
            f"past_hidden_states has shape {tuple(state_BSE.shape)}; expected {expected}: (lanes, num_slots - 1, width)"
        )


def read_mask(attention_mask: torch.Tensor | None, given_TB: torch.Tensor) -> torch.Tensor | None:
    """(T, B) bool: which of this call's tokens are read. A mask may also cover the tokens that came before them."""
    if attention_mask is None:
        return None
    steps, lanes = given_TB.shape[:2]
    if attention_mask.dim() != 2 or attention_mask.shape[0] != lanes or attention_mask.shape[1] < steps:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; expected ({lanes}, {steps}), one number for each"
            " token (0 = not read)"
        )
    return attention_mask[:, -steps:].to(given_TB.device).bool().t()


def state_of(cache: GPTBCache, state: torch.Tensor | None, config: PreTrainedConfig, lanes: int) -> torch.Tensor | None:
    """The state (B, S-1, E) in a cache; None = the learned initial state. Raises ValueError for what is no state."""
    if not isinstance(cache, GPTBCache):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}; this model keeps its state in a GPTBCache (the"
            " past_key_values that it returns)"
        )
    if state is not None:
        raise ValueError("give the state as past_key_values or as past_hidden_states, not both")
    if cache.state is not None and cache.state.shape[0] != lanes:
        raise ValueError(
            f"past_key_values holds {cache.state.shape[0]} lanes, the tokens have {lanes};"
            " cache.batch_repeat_interleave(n) gives each lane n times"
        )
    check_state(cache.state, lanes, config)
    return cache.state


def _lanes_first(tensor_KB: torch.Tensor) -> tuple[int, ...]:
    shape = tuple(tensor_KB.shape)
    return (shape[1], shape[0], *shape[2:]) if len(shape) > 1 else shape
