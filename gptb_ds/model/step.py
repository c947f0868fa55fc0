"""One step of GPTB's recurrence: which slots see which, what is read, and which outputs become the state.

Axes: B lanes, K steps of a window, S slots, E embedding, C recent tokens, N = S-1-C state slots.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import nn

# What all columns of a window share, as a backbone has it: positions, a mask or none, rotations.
Shared: TypeAlias = tuple[torch.Tensor | tuple[torch.Tensor, ...] | None, ...]
# Where `preserve_decoder` starts: exp(-8) of an attention weight, 0.03%.
CLOSED_GATE = 8.0


class SlotStep(nn.Module):
    """Mix-in before a transformers decoder: one token column through its blocks, beside the state.

    A backbone supplies `slot_context` and `run_slots`; its configuration supplies `num_slots`, `rebias`,
    `hidden_size`, and `recent_tokens`, `carry` and `preserve_decoder` if it has them.
    """

    config: Any
    initial_embeds: nn.Parameter
    state_gate: nn.Parameter

    # What a backbone supplies

    # Whether all weights of `run_slots` are used in operations that `Fp32GradientSums` sees.
    weights_are_seen = False

    def slot_context(self, like_E: torch.Tensor) -> Shared:
        """What all steps of a window share (positions, mask), in the type and on the device of `like_E`."""
        raise NotImplementedError

    def run_slots(self, x_BSE: torch.Tensor, context: Shared, layers: list[torch.Tensor] | None = None) -> torch.Tensor:
        """The backbone over one set of slots, embeddings in, normalised outputs out, both (B, S, E).

        `layers`, when given, takes the outputs (B, S, E) of the embedding and of each block, the last one normalised.
        """
        raise NotImplementedError

    # The parameters of the recurrence

    @property
    def recent_tokens(self) -> int:
        """C: carried vectors that are the embeddings of the last tokens, not outputs of the blocks."""
        return getattr(self.config, "recent_tokens", 0)

    @property
    def has_dropout(self) -> bool:
        """Whether a forward pass in training draws random numbers."""
        rates = [getattr(self.config, name, 0.0) for name in ("attn_pdrop", "attention_dropout")]
        rates += [module.p for module in self.modules() if isinstance(module, nn.Dropout)]
        return any(rate > 0 for rate in rates if rate is not None)

    def post_init(self) -> None:
        """Transformers calls this at the end of a backbone's construction, before weights are drawn."""
        self.initial_embeds = nn.Parameter(torch.empty(self.config.num_slots - 1, self.config.hidden_size))
        if getattr(self.config, "preserve_decoder", False):
            self.state_gate = nn.Parameter(torch.empty(self.config.num_slots - 1 - self.recent_tokens))
        super().post_init()  # type: ignore[misc]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if module is self:
            # torch.nn.init is guarded by transformers while weights load, so a loaded state is not drawn again.
            nn.init.normal_(self.initial_embeds, mean=0.0, std=1.0)
            if hasattr(self, "state_gate"):
                nn.init.constant_(self.state_gate, -1.0)

    def empty_state(self, lanes: int) -> torch.Tensor:
        """Zeros (lanes, S-1, E) in the type and on the device of the weights, for lanes that begin with a reset.

        Zeros and not the initial state: at ZeRO-3 no rank holds that parameter between two forward passes.
        """
        shape = (lanes, self.config.num_slots - 1, self.config.hidden_size)
        return torch.zeros(shape, dtype=self.initial_embeds.dtype, device=self.initial_embeds.device)

    # The step

    def _step(
        self,
        token_B1E: torch.Tensor,
        reset_B11: torch.Tensor | None,
        mask_B11: torch.Tensor | None,
        state_BSE: torch.Tensor,
        initial_SE: torch.Tensor,
        context: Shared,
        layers: list[torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        before_BSE = state_BSE
        if reset_B11 is not None:
            state_BSE = torch.where(reset_B11, initial_SE, state_BSE)
        if getattr(self.config, "carry", "outputs") == "nothing":
            kept = state_BSE.shape[1] - self.recent_tokens
            state_BSE = torch.cat((initial_SE[:kept].expand(len(state_BSE), -1, -1), state_BSE[:, kept:]), dim=1)
        seen: list[torch.Tensor] | None = None if layers is None else []
        y_BSE = self.run_slots(torch.cat((state_BSE, token_B1E), dim=1), context, *(() if seen is None else (seen,)))
        if layers is not None and seen is not None:
            layers += [layer_BSE[:, -1] for layer_BSE in seen]
        # split and not slicing: its backward is one cat.
        outputs_BSE, hidden_B1E = y_BSE.split((y_BSE.shape[1] - 1, 1), dim=1)
        new_state_BSE = self.next_state(state_BSE, token_B1E, outputs_BSE, hidden_B1E)
        if mask_B11 is not None:
            new_state_BSE = torch.where(mask_B11, new_state_BSE, before_BSE)
        return hidden_B1E, new_state_BSE

    def next_state(
        self, state_BSE: torch.Tensor, token_B1E: torch.Tensor, outputs_BSE: torch.Tensor, hidden_B1E: torch.Tensor
    ) -> torch.Tensor:
        """What is carried on, (B, S-1, E): of the state's slots' outputs, or shifted by one with the token's slot's.

        GPTB carries the outputs of the state's slots. With `carry` "shift" each vector moves down a slot and the token
        slot's output, which the logits are read from, comes in as the newest. With "nothing" the state's slots start
        every step from the initial state, whatever they were. With `recent_tokens` = C the last C vectors are the last
        C tokens' embeddings instead. The one place for another rule: a gate, a cap or a residual between old and new
        state.
        """
        recent = self.recent_tokens
        kept = state_BSE.shape[1] - recent
        if getattr(self.config, "carry", "outputs") == "shift":
            carried_BNE = torch.cat((outputs_BSE[:, 1:kept], hidden_B1E), dim=1)
        else:
            carried_BNE = outputs_BSE[:, :kept] if recent else outputs_BSE
        if not recent:
            return carried_BNE
        return torch.cat((carried_BNE, state_BSE[:, kept + 1 :], token_B1E), dim=1)

    @property
    def _carries_view(self) -> bool:
        """Whether `next_state` hands on the first S-1 outputs as they lie, without a copy."""
        return not self.recent_tokens and getattr(self.config, "carry", "outputs") == "outputs"

    def slot_mask(self, like_E: torch.Tensor) -> torch.Tensor | None:
        """What is added to the attention scores, (S, S) with a row for each slot that looks; None = nothing.

        `rebias` lets all slots see all; without it each sees those before it. With `preserve_decoder` the state slots
        see all, the tokens see each other as in a decoder, and the state through a learned gate that starts closed.
        """
        slots, recent = self.config.num_slots, self.recent_tokens
        if self.config.rebias and not getattr(self.config, "preserve_decoder", False):
            return None
        hidden = torch.finfo(like_E.dtype).min
        causal_SS = torch.full((slots, slots), hidden, dtype=like_E.dtype, device=like_E.device).triu(1)
        if not getattr(self.config, "preserve_decoder", False):
            return causal_SS
        gate_N = CLOSED_GATE * self.state_gate
        rows_of_state_NS = causal_SS.new_zeros(len(gate_N), slots)
        rows_of_tokens = torch.cat((gate_N.expand(recent + 1, -1), causal_SS[-recent - 1 :, -recent - 1 :]), dim=1)
        return torch.cat((rows_of_state_NS, rows_of_tokens))

    def embed(self, input_ids_KB: torch.Tensor) -> torch.Tensor:
        """Token embeddings (..., E) as they enter the slots. Raises ValueError for a token outside the vocabulary."""
        try:
            return self.get_input_embeddings()(input_ids_KB)  # type: ignore[operator]
        except IndexError:
            low, high = int(input_ids_KB.min()), int(input_ids_KB.max())
            raise ValueError(
                f"input_ids hold tokens from {low} to {high}, but the vocabulary is 0 to {self.config.vocab_size - 1};"
                " use the tokenizer that the model was made for"
            ) from None
