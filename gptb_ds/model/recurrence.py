"""GPTB's recurrence, whatever the backbone: token columns one after another, for training and as transformers calls it.

Axes: B lanes, K steps of this call (T where lanes come first), S slots, E embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import NamedTuple, TypeVar, cast

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig

from .cache import GPTBCache
from .compiled_step import Backend, CompiledStep
from .gradient_sums import GradientSums, recomputed_in
from .input_checks import (
    check_device,
    check_inputs,
    check_options,
    check_tensors,
    chosen_layers,
    read_mask,
    state_of,
)
from .outputs import GPTBModelOutput
from .step import Shared, SlotStep

# Columns embedded and kept at once when no gradient is needed: the memory of a prompt of any length.
READ_CHUNK = 256


Item = TypeVar("Item")


class Unrolled(NamedTuple):
    """`hidden_KBE`: outputs of the last slot (only the last ones, when asked); the newest state is `states[-1]`."""

    hidden_KBE: torch.Tensor
    states: list[torch.Tensor]
    layers: list[torch.Tensor] | None


class SlotRecurrence(SlotStep):
    """Mix-in before a transformers decoder: makes it read `[state, token]` and hand its outputs back as the state.

    What one column does, and what a backbone supplies for it, is in `SlotStep`; here they follow one another. Nothing
    detaches, is kept on a module between calls, or changes a caller's tensor; a caller's cache is brought up to date,
    as by transformers' own models.
    """

    _compiled_step: CompiledStep | None = None

    def unroll(
        self,
        input_ids_KB: torch.Tensor,
        state_BSE: torch.Tensor | None = None,
        reset_KB: torch.Tensor | None = None,
        recompute_every: int = 0,
        sums: GradientSums | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Consumes K token columns, time first as a window holds them: (last slot's outputs (K, B, E), new state).

        `input_ids_KB` (K, B) whole numbers. `state_BSE` (B, S-1, E), None = the learned initial state in every lane.
        `reset_KB` (K, B) bool: where it is set, the lane's state becomes the initial state before that token is read;
        no gradient reaches the state it replaces. `recompute_every` = c > 0 keeps only the state at every c-th step for
        the backward pass and recomputes inside: same gradients, also with dropout. `sums`: what adds up the gradients
        of the weights, when the caller has entered it.

        It calls the module and not a function of it: DeepSpeed's hooks, which gather `initial_embeds` at ZeRO-3, stand
        on `nn.Module.__call__`.

        Raises ValueError for shapes that do not fit, and on the CPU for a token outside the vocabulary (on a GPU the
        check would stall it: there the embedding itself raises a device-side assertion).
        """
        return self(input_ids_KB, state_BSE, reset_KB, recompute_every, time_major=True, sums=sums)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        past_hidden_states: torch.Tensor | None = None,
        reset: torch.Tensor | None = None,
        recompute_every: int = 0,
        *,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: GPTBCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        return_dict: bool | None = None,
        keep_last: int = 0,
        time_major: bool = False,
        sums: GradientSums | None = None,
        **ignored: object,
    ) -> GPTBModelOutput | tuple[object, ...]:
        """As `unroll`, but lanes first and as transformers' base models are called.

        `input_ids` and `reset` (B, T), or `inputs_embeds` (B, T, E). `attention_mask` (B, T or more, of which the last
        T count): where it is 0 the token is not read and the lane's state stays as it was. The state comes from
        `past_key_values` or as `past_hidden_states` (B, S-1, E). `keep_last` = n > 0 returns the outputs of the last n
        tokens only. `output_hidden_states` may name layers instead of all. Without gradients a call of any length needs
        the memory of `READ_CHUNK` tokens and its outputs. `ignored`: what transformers' tokenizers and Trainer hand to
        any model and means nothing here (`input_checks.IGNORED`).

        Returns `GPTBModelOutput`, which unpacks as `outputs (B, T, E), state`; a tuple without `return_dict`.
        """
        if time_major:
            assert input_ids is not None
            check_inputs(input_ids, None, past_hidden_states, reset, recompute_every, self.config)
            unrolled = self._unroll(input_ids, None, past_hidden_states, reset, None, recompute_every, sums=sums)
            return unrolled.hidden_KBE, unrolled.states[-1]
        check_options(ignored, use_cache, self.config)
        given_by_name = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "reset": reset}
        check_tensors(**given_by_name, past_hidden_states=past_hidden_states)
        ids_TB, embeds_TBE, reset_TB = map(_turned, given_by_name.values())
        check_inputs(ids_TB, embeds_TBE, past_hidden_states, reset_TB, recompute_every, self.config)
        given = ids_TB if ids_TB is not None else embeds_TBE
        assert given is not None
        mask_TB = read_mask(attention_mask, given, past_key_values)
        state = state_of(past_key_values, past_hidden_states, given.shape[1], self.config)
        check_device(state, self.initial_embeds)
        cache = self._cache_to_fill(past_key_values, use_cache)
        layers = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        columns = ids_TB, embeds_TBE, state, reset_TB, mask_TB, recompute_every
        unrolled = self._unroll(
            *columns,
            keep_last=keep_last,
            keep_states=1 if cache is None or torch.is_grad_enabled() else cache.wanted,
            with_layers=layers is not None and layers is not False,
        )
        if cache is not None:
            cache.append(unrolled.states, ids_TB, mask_TB, len(given))
        output = GPTBModelOutput(
            last_hidden_state=unrolled.hidden_KBE.transpose(0, 1),
            past_key_values=cache,
            past_hidden_states=unrolled.states[-1],
            hidden_states=_lanes_first(unrolled.layers, layers),
        )
        return output if wants_dict(return_dict, self.config) else output.to_tuple()

    def _cache_to_fill(self, given: GPTBCache | None, use_cache: bool | None) -> GPTBCache | None:
        if use_cache is None:
            use_cache = given is not None or (bool(self.config.use_cache) and not self.training)
        return (given or GPTBCache()) if use_cache else None

    def _unroll(
        self,
        ids_KB: torch.Tensor | None,
        embeds_KBE: torch.Tensor | None,
        state_BSE: torch.Tensor | None,
        reset_KB: torch.Tensor | None,
        mask_KB: torch.Tensor | None,
        recompute_every: int,
        keep_last: int = 0,
        keep_states: int = 1,
        with_layers: bool = False,
        sums: GradientSums | None = None,
    ) -> Unrolled:
        given = ids_KB if ids_KB is not None else embeds_KBE
        assert given is not None
        steps, lanes = given.shape[:2]
        like_E = self.initial_embeds
        # A copy, not the parameter: under ZeRO-3 recomputation may find the parameter itself released.
        initial_SE = like_E.clone()
        context = self.slot_context(like_E)
        if sums is not None:  # each column takes a copy in the weights' type: their gradients meet here, in float32
            initial_SE, context = _widened(initial_SE), tuple(map(_widened, context))
        state_BSE = initial_SE.expand(lanes, -1, -1) if state_BSE is None else state_BSE.to(like_E)
        if self._compiled_step is not None and torch.is_grad_enabled() and not with_layers:
            state_BSE = self._compiled_step.enter(state_BSE, self._carries_view and mask_KB is None)
        recompute = bool(recompute_every) and torch.is_grad_enabled() and recompute_every < steps
        chunk = recompute_every if recompute else (steps if torch.is_grad_enabled() else READ_CHUNK)
        resets, masks = _columns(reset_KB, steps), _columns(mask_KB, steps)
        hidden: list[torch.Tensor] = []
        states = [state_BSE]
        layers: list[torch.Tensor] | None = [] if with_layers else None
        start = 0
        for tokens in self._token_chunks(ids_KB, embeds_KBE, chunk):
            part = slice(start, start + len(tokens))
            columns = tokens, resets[part], masks[part], states[-1], initial_SE, context, sums
            if recompute and not with_layers:
                *outputs, state_BSE = checkpoint(
                    self._steps,
                    *columns,
                    use_reentrant=False,
                    # A GPU's random state is read by waiting for it, which a CUDA graph can't hold.
                    preserve_rng_state=self.has_dropout,
                    context_fn=recomputed_in(sums),
                )
                states = [state_BSE]
            else:
                seen: list[torch.Tensor] = []
                *outputs, state_BSE = self._steps(*columns, seen if keep_states > 1 else None, layers)
                states = [*states, *seen][-keep_states:] if keep_states > 1 else [state_BSE]
            hidden = (hidden + outputs)[-keep_last:]
            start = part.stop
        # Each output is (B, 1, E): -> (K, B, E). Layers: each step has put its own, (B, E), one after another.
        stacked = None
        if layers is not None:
            depth = len(layers) // steps
            stacked = [torch.stack(layers[i::depth]) for i in range(depth)]
        return Unrolled(torch.stack(hidden).squeeze(2), states, stacked)

    def _token_chunks(
        self, ids_KB: torch.Tensor | None, embeds_KBE: torch.Tensor | None, chunk: int
    ) -> Iterator[Sequence[torch.Tensor]]:
        """The embedded columns, (B, 1, E) each, `chunk` at a time."""
        if torch.is_grad_enabled():
            embedded_KBE = embeds_KBE if ids_KB is None else self.embed(ids_KB)
            assert embedded_KBE is not None
            # unbind and not indexing: its backward is one stack instead of K zero-filled copies of the window.
            tokens = embedded_KBE.to(self.initial_embeds.dtype).unsqueeze(2).unbind(0)
            for start in range(0, len(tokens), chunk):
                yield tokens[start : start + chunk]
            return
        given = ids_KB if ids_KB is not None else embeds_KBE
        assert given is not None
        for part in given.split(chunk):
            embedded_KBE = part if ids_KB is None else self.embed(part)
            yield embedded_KBE.to(self.initial_embeds.dtype).unsqueeze(2).unbind(0)

    def compile_step(self, backend: Backend = "inductor") -> None:
        """Compiles one step with this backend of `torch.compile`: compiled once, called for every column."""
        self._compiled_step = CompiledStep(type(self)._step, backend)

    @property
    def recomputes_apart(self) -> bool:
        """Whether columns can be computed again without a record of their first pass, see `recomputed`.

        Not where the blocks are no function of their inputs that can be repeated: weights that ZeRO-3 gathers by hooks,
        random numbers, a compiled step, autocast, which is over when the backward pass comes. On a GPU what is recorded
        lies in the host's memory, and graphs hide its time.
        """
        return (
            self.weights_are_seen
            and self.initial_embeds.device.type == "cpu"
            and not hasattr(self.initial_embeds, "ds_id")
            and self._compiled_step is None
            and not torch.is_autocast_enabled("cpu")
            and not (self.training and self.has_dropout)
        )

    def _steps(
        self,
        tokens: Sequence[torch.Tensor],
        resets: Sequence[torch.Tensor | None],
        masks: Sequence[torch.Tensor | None],
        state_BSE: torch.Tensor,
        initial_SE: torch.Tensor,
        context: Shared,
        sums: GradientSums | None = None,
        states: list[torch.Tensor] | None = None,
        layers: list[torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """The last slot's outputs (B, 1, E) of each column, and the state after them. Adds to `states`, `layers`."""
        compiled = self._compiled_step if layers is None else None
        outputs = []
        for number, (token_B1E, reset_B11, mask_B11) in enumerate(zip(tokens, resets, masks, strict=True)):
            shared = (_narrowed(initial_SE, token_B1E), tuple(_narrowed(x, token_B1E) for x in context))
            columns = token_B1E, reset_B11, mask_B11, state_BSE
            if compiled is not None:
                hidden_B1E, state_BSE = compiled(self, sums, *columns, *shared)
            else:
                with nullcontext() if sums is None else sums.column(number):
                    hidden_B1E, state_BSE = self._step(*columns, *shared, layers)
            outputs.append(hidden_B1E)
            if states is not None:
                states.append(state_BSE)
        return *outputs, state_BSE


def _widened(shared: Item) -> Item:
    """What all columns share, in float32 if it has fewer bits."""
    if isinstance(shared, torch.Tensor) and shared.dtype in (torch.bfloat16, torch.float16):
        return cast("Item", shared.float())
    return shared


def _narrowed(shared: Item, like: torch.Tensor) -> Item:
    if isinstance(shared, torch.Tensor) and shared.is_floating_point():
        return cast("Item", shared.to(like.dtype))
    return shared


def _turned(tensor_BT: torch.Tensor | None) -> torch.Tensor | None:
    """Lanes first -> time first. Too few axes are left to the check of shapes, which knows the words."""
    return tensor_BT.transpose(0, 1) if tensor_BT is not None and tensor_BT.dim() > 1 else tensor_BT


def _lanes_first(
    layers: list[torch.Tensor] | None, chosen: bool | int | Sequence[int] | None
) -> tuple[torch.Tensor | None, ...] | None:
    """Outputs of layers, (T, B, E) -> (B, T, E), with None for those not asked for, as transformers has it."""
    if layers is None:
        return None
    wanted = chosen_layers(chosen, len(layers))
    return tuple(layer.transpose(0, 1) if number in wanted else None for number, layer in enumerate(layers))


def _columns(flags_KB: torch.Tensor | None, steps: int) -> Sequence[torch.Tensor | None]:
    """K flags (B, 1, 1), ready to choose between states."""
    return [None] * steps if flags_KB is None else flags_KB[:, :, None, None].unbind(0)


def wants_dict(return_dict: bool | None, config: PreTrainedConfig) -> bool:
    """Whether a call is answered with a dict: as it says, or as the configuration does."""
    return bool(config.return_dict) if return_dict is None else return_dict
