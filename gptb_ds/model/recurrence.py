"""GPTB's recurrence, whatever the backbone: outputs become inputs, one token column a step.

Axes: B lanes, T steps of this call, S slots, E embedding.
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

    def forward(
        self,
        input_ids: torch.Tensor,
        past_hidden_states: torch.Tensor | None = None,
        reset: torch.Tensor | None = None,
        recompute_every: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Consumes T token columns and returns (last slot's outputs (B, T, E), new state (B, S-1, E)).

        `input_ids` (B, T) whole numbers. `past_hidden_states` (B, S-1, E), None = the learned initial state in every
        lane. `reset` (B, T) bool: where it is set, the lane's state becomes the initial state before that token is
        read; no gradient reaches the state it replaces. `recompute_every` = c > 0 keeps only the state at every c-th
        step for the backward pass and recomputes inside: same gradients, also with dropout.

        Raises ValueError for shapes that do not fit, and on the CPU for a token outside the vocabulary (on a GPU the
        check would stall it: there the embedding itself raises a device-side assertion).
        """
        self._check_inputs(input_ids, past_hidden_states, reset, recompute_every)
        tokens_TBE = self._embed(input_ids.t())
        # A copy, not the parameter: under ZeRO-3 recomputation may find the parameter itself released.
        initial_SE = self.initial_embeds.to(tokens_TBE.dtype, copy=True)
        context = self.slot_context(tokens_TBE)
        if past_hidden_states is None:
            state_BSE = initial_SE.expand(input_ids.shape[0], -1, -1)
        else:
            state_BSE = past_hidden_states.to(tokens_TBE.dtype)
        # unbind and not indexing: its backward is one stack instead of T zero-filled copies of the window.
        tokens = tokens_TBE.unsqueeze(2).unbind(0)
        resets = [None] * len(tokens) if reset is None else reset.t()[:, :, None, None].unbind(0)
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
        return torch.stack(hidden).squeeze(2).transpose(0, 1), state_BSE

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

    def _embed(self, input_ids_TB: torch.Tensor) -> torch.Tensor:
        try:
            return self.get_input_embeddings()(input_ids_TB)  # type: ignore[operator]
        except IndexError:
            low, high = int(input_ids_TB.min()), int(input_ids_TB.max())
            raise ValueError(
                f"input_ids hold tokens from {low} to {high}, but the vocabulary is 0 to {self.config.vocab_size - 1};"
                " use the tokenizer that the model was made for"
            ) from None

    def _check_inputs(
        self,
        input_ids: torch.Tensor,
        state: torch.Tensor | None,
        reset: torch.Tensor | None,
        recompute_every: int,
    ) -> None:
        shape = tuple(input_ids.shape)
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"input_ids has shape {shape}; expected (lanes, steps), at least one of each")
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids has type {input_ids.dtype}; expected whole numbers (torch.int64 or int32)")
        expected = (shape[0], self.config.num_slots - 1, self.config.hidden_size)
        if state is not None and tuple(state.shape) != expected:
            raise ValueError(
                f"past_hidden_states has shape {tuple(state.shape)}; expected {expected}: (lanes, num_slots - 1, width)"
            )
        if reset is not None and (tuple(reset.shape) != shape or reset.dtype != torch.bool):
            raise ValueError(
                f"reset has shape {tuple(reset.shape)} and type {reset.dtype}; expected {shape} like input_ids, bool"
            )
        if recompute_every < 0:
            raise ValueError(f"recompute_every is {recompute_every}; expected 0 (off) or a number of steps")
