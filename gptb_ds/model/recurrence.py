"""GPTB's recurrence, whatever the backbone: outputs become inputs, one token column a step.

Axes: B lanes, K steps of this call (T where lanes come first), S slots, E embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class SlotRecurrence(nn.Module):
    """Mix-in before a transformers decoder: makes it read `[state, token]` and hand its outputs back as the state.

    A backbone supplies `slot_context` and `run_slots`; its configuration supplies `num_slots`, `rebias` and
    `hidden_size`. Nothing here detaches, is kept on a module between calls, or changes a caller's tensor.
    """

    config: Any
    initial_embeds: nn.Parameter
    _compiled_step: Any = None

    # What a backbone supplies

    def slot_context(self, like_E: torch.Tensor) -> tuple[Any, ...]:
        """What all steps of a window share (positions, mask), in the type and on the device of `like_E`."""
        raise NotImplementedError

    def run_slots(self, x_BSE: torch.Tensor, context: tuple[Any, ...]) -> torch.Tensor:
        """The backbone over one set of slots, embeddings in, normalised outputs out, both (B, S, E)."""
        raise NotImplementedError

    # The parameter of the initial state

    def post_init(self) -> None:
        """Transformers calls this at the end of a backbone's construction, before weights are drawn."""
        self.initial_embeds = nn.Parameter(torch.empty(self.config.num_slots - 1, self.config.hidden_size))
        super().post_init()  # type: ignore[misc]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if module is self:
            # torch.nn.init is guarded by transformers while weights load, so a loaded state is not drawn again.
            nn.init.normal_(self.initial_embeds, mean=0.0, std=1.0)

    # The recurrence

    def empty_state(self, lanes: int) -> torch.Tensor:
        """Zeros (lanes, S-1, E) in the type and on the device of the weights, for lanes that begin with a reset.

        Zeros and not the initial state: at ZeRO-3 no rank holds that parameter between two forward passes.
        """
        shape = (lanes, self.config.num_slots - 1, self.config.hidden_size)
        return torch.zeros(shape, dtype=self.initial_embeds.dtype, device=self.initial_embeds.device)

    def unroll(
        self,
        input_ids_KB: torch.Tensor,
        state_BSE: torch.Tensor | None = None,
        reset_KB: torch.Tensor | None = None,
        recompute_every: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Consumes K token columns, time first as a window holds them: (last slot's outputs (K, B, E), new state).

        `input_ids_KB` (K, B) whole numbers. `state_BSE` (B, S-1, E), None = the learned initial state in every lane.
        `reset_KB` (K, B) bool: where it is set, the lane's state becomes the initial state before that token is read;
        no gradient reaches the state it replaces. `recompute_every` = c > 0 keeps only the state at every c-th step for
        the backward pass and recomputes inside: same gradients, also with dropout.

        It calls the module and not a function of it: DeepSpeed's hooks, which gather `initial_embeds` at ZeRO-3, stand
        on `nn.Module.__call__`.

        Raises ValueError for shapes that do not fit, and on the CPU for a token outside the vocabulary (on a GPU the
        check would stall it: there the embedding itself raises a device-side assertion).
        """
        return self(input_ids_KB, state_BSE, reset_KB, recompute_every, time_major=True)

    def forward(
        self,
        input_ids: torch.Tensor,
        past_hidden_states: torch.Tensor | None = None,
        reset: torch.Tensor | None = None,
        recompute_every: int = 0,
        time_major: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `unroll`, but lanes first: `input_ids` and `reset` (B, T), outputs (B, T, E), unless `time_major`."""
        if time_major:
            return self._unroll(input_ids, past_hidden_states, reset, recompute_every)
        hidden_TBE, state_BSE = self._unroll(
            _turned(input_ids), past_hidden_states, None if reset is None else _turned(reset), recompute_every
        )
        return hidden_TBE.transpose(0, 1), state_BSE

    def _unroll(
        self,
        input_ids_KB: torch.Tensor,
        state_BSE: torch.Tensor | None,
        reset_KB: torch.Tensor | None,
        recompute_every: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._check_inputs(input_ids_KB, state_BSE, reset_KB, recompute_every)
        tokens_KBE = self._embed(input_ids_KB)
        # A copy, not the parameter: under ZeRO-3 recomputation may find the parameter itself released.
        initial_SE = self.initial_embeds.to(tokens_KBE.dtype, copy=True)
        context = self.slot_context(tokens_KBE)
        if state_BSE is None:
            state_BSE = initial_SE.expand(input_ids_KB.shape[1], -1, -1)
        else:
            state_BSE = state_BSE.to(tokens_KBE.dtype)
        # unbind and not indexing: its backward is one stack instead of K zero-filled copies of the window.
        tokens = tokens_KBE.unsqueeze(2).unbind(0)  # K times (B, 1, E)
        resets = [None] * len(tokens) if reset_KB is None else reset_KB[:, :, None, None].unbind(0)  # (B, 1, 1)
        chunk = recompute_every if recompute_every and torch.is_grad_enabled() else len(tokens)
        hidden: list[torch.Tensor] = []
        for start in range(0, len(tokens), chunk):
            columns = tokens[start : start + chunk], resets[start : start + chunk]
            if chunk < len(tokens):
                *outputs, state_BSE = checkpoint(
                    self._steps, *columns, state_BSE, initial_SE, context, use_reentrant=False
                )
            else:
                *outputs, state_BSE = self._steps(*columns, state_BSE, initial_SE, context)
            hidden += outputs
        return torch.stack(hidden).squeeze(2), state_BSE  # (K, B, 1, E) -> (K, B, E)

    def compile_step(self, **kwargs: Any) -> None:
        """Compiles one step with `torch.compile(**kwargs)`: compiled once, called for every column."""
        self._compiled_step = torch.compile(type(self)._step, **kwargs)

    def _steps(
        self,
        tokens: Sequence[torch.Tensor],
        resets: Sequence[torch.Tensor | None],
        state_BSE: torch.Tensor,
        initial_SE: torch.Tensor,
        context: tuple[Any, ...],
    ) -> tuple[torch.Tensor, ...]:
        step = self._compiled_step or type(self)._step
        outputs = []
        for token_B1E, reset_B11 in zip(tokens, resets, strict=True):
            hidden_B1E, state_BSE = step(self, token_B1E, reset_B11, state_BSE, initial_SE, context)
            outputs.append(hidden_B1E)
        return *outputs, state_BSE

    def _step(
        self,
        token_B1E: torch.Tensor,
        reset_B11: torch.Tensor | None,
        state_BSE: torch.Tensor,
        initial_SE: torch.Tensor,
        context: tuple[Any, ...],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if reset_B11 is not None:
            state_BSE = torch.where(reset_B11, initial_SE, state_BSE)
        y_BSE = self.run_slots(torch.cat((state_BSE, token_B1E), dim=1), context)
        # split and not slicing: its backward is one cat.
        state_BSE, hidden_B1E = y_BSE.split((y_BSE.shape[1] - 1, 1), dim=1)
        return hidden_B1E, state_BSE

    def _embed(self, input_ids_KB: torch.Tensor) -> torch.Tensor:
        try:
            return self.get_input_embeddings()(input_ids_KB)  # type: ignore[operator]
        except IndexError:
            low, high = int(input_ids_KB.min()), int(input_ids_KB.max())
            raise ValueError(
                f"input_ids hold tokens from {low} to {high}, but the vocabulary is 0 to {self.config.vocab_size - 1};"
                " use the tokenizer that the model was made for"
            ) from None

    def _check_inputs(
        self,
        input_ids_KB: torch.Tensor,
        state: torch.Tensor | None,
        reset_KB: torch.Tensor | None,
        recompute_every: int,
    ) -> None:
        shape = tuple(input_ids_KB.shape)
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"input_ids has shape {shape[::-1]}; expected (lanes, steps), at least one of each")
        if input_ids_KB.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids has type {input_ids_KB.dtype}; expected whole numbers (torch.int64 or int32)")
        expected = (shape[1], self.config.num_slots - 1, self.config.hidden_size)
        if state is not None and tuple(state.shape) != expected:
            raise ValueError(
                f"past_hidden_states has shape {tuple(state.shape)}; expected {expected}: (lanes, num_slots - 1, width)"
            )
        if reset_KB is not None and (tuple(reset_KB.shape) != shape or reset_KB.dtype != torch.bool):
            raise ValueError(
                f"reset has shape {tuple(reset_KB.shape)[::-1]} and type {reset_KB.dtype}; expected {shape[::-1]} like"
                " input_ids, bool"
            )
        if recompute_every < 0:
            raise ValueError(f"recompute_every is {recompute_every}; expected 0 (off) or a number of steps")


def _turned(tensor_BT: torch.Tensor) -> torch.Tensor:
    """Lanes first -> time first. Another number of axes is left to the check of shapes, which knows the words."""
    return tensor_BT.t() if tensor_BT.dim() == 2 else tensor_BT
