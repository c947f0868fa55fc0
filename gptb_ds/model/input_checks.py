"""What a recurrence is called with: shapes, types, masks and caches, and a line for each that does not fit.

Axes: B lanes, K steps (T where lanes come first), S slots, E embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedConfig

from .cache import GPTBCache

# Arguments that transformers' tokenizers and Trainer hand to any model, and that mean nothing here.
IGNORED = frozenset({"position_ids", "token_type_ids", "cache_position", "output_attentions"})


def check_options(ignored: Mapping[str, object], use_cache: object, config: PreTrainedConfig) -> None:
    """Raises TypeError for an argument that a recurrence does not have, ValueError for a value that it can't follow."""
    if unknown := sorted(ignored.keys() - IGNORED):
        raise TypeError(f"{config.model_type}'s forward has no argument {', '.join(unknown)}")
    if ignored.get("output_attentions") or config.output_attentions:
        raise ValueError("output_attentions: attention is among slots, not among tokens, and is not returned")
    if use_cache is not None and not isinstance(use_cache, bool):
        raise ValueError(f"use_cache is {use_cache!r}; expected True, False or None (as the configuration says)")


def check_tensors(**arguments: object) -> None:
    """Raises ValueError for an argument that is there and no tensor."""
    for name, value in arguments.items():
        if value is not None and not isinstance(value, torch.Tensor):
            hint = '; give its "input_ids"' if name == "input_ids" and isinstance(value, Mapping) else ""
            raise ValueError(f"{name} is a {type(value).__name__}; expected a torch.Tensor{hint}")


def check_generate(input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> None:
    """Raises ValueError for no tokens (B, T), and for a mask that does not fit those that `generate` gets.

    transformers drops a mask of nothing but ones before the model sees it, whatever its shape.
    """
    check_tensors(input_ids=input_ids, attention_mask=attention_mask)
    if input_ids is not None and 0 in input_ids.shape:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; expected (lanes, steps), at least one of each")
    if input_ids is None or attention_mask is None or input_ids.dim() != 2:
        return
    _check_mask_shape(attention_mask, *input_ids.shape)


def _check_mask_shape(attention_mask: torch.Tensor, lanes: int, steps: int) -> None:
    if attention_mask.dim() != 2 or attention_mask.shape[0] != lanes or attention_mask.shape[1] < steps:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; expected ({lanes}, {steps}), one number for each"
            " token (0 = not read)"
        )


def check_labels(labels: torch.Tensor | None, given: torch.Tensor | None) -> None:
    """Raises ValueError for labels of another shape than the tokens (B, T) `given`, or of another type than int64."""
    check_tensors(labels=labels, input_ids=given)
    if labels is None or given is None:
        return
    if labels.shape != given.shape[:2]:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}; expected {tuple(given.shape[:2])} like input_ids (they are"
            " shifted inside)"
        )
    if labels.dtype != torch.int64:
        raise ValueError(f"labels has type {labels.dtype}; expected torch.int64")


def check_logits_to_keep(kept: object) -> int:
    """The number of last tokens whose logits are wanted, 0 = all. Raises ValueError for what is no such number.

    A tensor names tokens, and all are computed.
    """
    if isinstance(kept, torch.Tensor):
        return 0
    if isinstance(kept, bool) or not isinstance(kept, int) or kept < 0:
        raise ValueError(f"logits_to_keep is {kept!r}; expected 0 (all) or the number of last tokens")
    return kept


def chosen_layers(asked: bool | int | Sequence[int] | None, layers: int) -> set[int]:
    """The numbers of the layers that `output_hidden_states` asks for, of `layers` outputs; negative ones from the end.

    Raises ValueError for a layer that there is not.
    """
    if isinstance(asked, bool) or asked is None:
        return set(range(layers)) if asked else set()
    numbers = [asked] if isinstance(asked, int) else list(asked)
    if wrong := [number for number in numbers if not -layers <= number < layers]:
        raise ValueError(f"output_hidden_states asks for layer {wrong[0]}; there are 0 (the embedding) to {layers - 1}")
    return {number % layers for number in numbers}


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
        if not embeds_KBE.is_floating_point():
            raise ValueError(f"inputs_embeds has type {embeds_KBE.dtype}; expected floating-point numbers")
    check_state(state, shape[0], config)
    if reset_KB is not None and (_lanes_first(reset_KB) != shape[:2] or reset_KB.dtype != torch.bool):
        raise ValueError(
            f"reset has shape {_lanes_first(reset_KB)} and type {reset_KB.dtype}; expected {shape[:2]} like"
            " input_ids, bool"
        )
    if not isinstance(recompute_every, int) or recompute_every < 0:
        raise ValueError(f"recompute_every is {recompute_every!r}; expected 0 (off) or a number of steps")


def check_state(state_BSE: torch.Tensor | None, lanes: int, config: PreTrainedConfig) -> None:
    """Raises ValueError for a state of another shape than `lanes` lanes of the model of `config` have."""
    if state_BSE is None:
        return
    expected = (lanes, config.num_slots - 1, config.hidden_size)
    if tuple(state_BSE.shape) != expected:
        raise ValueError(
            f"past_hidden_states has shape {tuple(state_BSE.shape)}; expected {expected}: (lanes, num_slots - 1, width)"
        )
    if not state_BSE.is_floating_point():
        raise ValueError(f"past_hidden_states has type {state_BSE.dtype}; expected floating-point numbers")


def check_device(state_BSE: torch.Tensor | None, like: torch.Tensor) -> None:
    """Raises ValueError for a state without numbers; one on another device than the weights is brought to them."""
    if state_BSE is not None and state_BSE.is_meta and not like.is_meta:
        raise ValueError(f"past_hidden_states is on the device 'meta', without numbers; the model is on {like.device}")


def read_mask(
    attention_mask: torch.Tensor | None, given_TB: torch.Tensor, cache: GPTBCache | None = None
) -> torch.Tensor | None:
    """(T, B) bool: which of this call's tokens are read. A mask may also cover the tokens that came before them.

    Raises ValueError for another shape, and on the CPU for other values than 0 and 1 (an additive mask, say); on a GPU
    to look would mean to wait for it.
    """
    if attention_mask is None:
        return None
    check_tensors(attention_mask=attention_mask)
    steps, lanes = given_TB.shape[:2]
    _check_mask_shape(attention_mask, lanes, steps)
    covered = attention_mask.shape[1]
    if isinstance(cache, GPTBCache) and cache.layer.begins_here and covered not in (steps, cache.layer.seen + steps):
        raise ValueError(
            f"attention_mask covers {covered} tokens; expected the {steps} of this call, or {cache.layer.seen + steps}"
            " with those that past_key_values has read"
        )
    looks = attention_mask.device.type == "cpu" and not torch.compiler.is_compiling()
    if looks and not ((attention_mask == 0) | (attention_mask == 1)).all():
        raise ValueError("attention_mask holds other values than 0 (not read) and 1 (read)")
    return attention_mask[:, -steps:].to(given_TB.device).bool().t()


def state_of(
    cache: GPTBCache | None, state: torch.Tensor | None, lanes: int, config: PreTrainedConfig
) -> torch.Tensor | None:
    """The state (B, S-1, E) in a cache, or the given one; None = the learned initial state.

    Raises ValueError for what is no state, or one of another shape.
    """
    if cache is None:
        return state
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
