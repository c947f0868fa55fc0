"""What training and evaluation ask of a model, whatever it is: to read a window from a state, and logits.

Axes: B lanes, K steps of a window, E embedding, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedConfig

from .gradient_sums import GradientSums


class WindowModel(nn.Module):
    """A language model that reads windows of columns; what it carries from one to the next is its own affair."""

    config: PreTrainedConfig
    lm_head: nn.Module

    def empty_state(self, lanes: int) -> torch.Tensor:
        """A state (lanes, ...) for lanes that begin with a reset."""
        raise NotImplementedError

    def unroll(
        self,
        input_ids_KB: torch.Tensor,
        state: torch.Tensor,
        reset_KB: torch.Tensor,
        recompute_every: int = 0,
        sums: GradientSums | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs (K, B, E), which `logits_of` turns into logits, and the state after the window.

        `reset_KB` (K, B) bool: a lane begins a document there, and forgets what it read before. `recompute_every` and
        `sums` as in `SlotRecurrence.unroll`; a model for which they have no meaning ignores them.
        """
        raise NotImplementedError

    @property
    def recomputes_apart(self) -> bool:
        """Whether parts of a window can be computed again as pure functions of weights, state and tokens."""
        return False

    def logits_of(self, hidden: torch.Tensor) -> torch.Tensor:
        """Next-token logits (..., V) of outputs (..., E)."""
        logits: torch.Tensor = self.lm_head(hidden)
        return logits
