"""The training objective: the loss of one window of columns, and where back-propagation through time stops.

Axes: B lanes of this rank or lane group, K steps, S slots, E embedding, V vocabulary, R = K*B rows.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .cheap import cheap_recomputed
from .gradient_sums import Fp32GradientSums, GradientSums, recomputed_in
from .recomputed import InPlaceSums, recomputed
from .window_model import WindowModel

# Logits kept for the backward pass at once: above so many, the head is recomputed piece by piece.
HEAD_ELEMENTS = 1 << 26


class WindowObjective(nn.Module):
    """Truncated back-propagation through time over one window (Williams and Peng 1990, doi 10.1162/neco.1990.2.4.490).

    The model steps through the K columns; the head and the cross-entropy run once over all K*B last-slot vectors; the
    state that leaves the window is detached, so no gradient ever crosses its edge.
    """

    right: torch.Tensor | None

    def __init__(
        self,
        model: WindowModel,
        recompute_every: int = 0,
        fp32_sums: bool | None = None,
        count_right: bool = False,
        recompute_cheap: bool = False,
    ) -> None:
        """`recompute_every` = c > 0 keeps only the states of every c-th step and recomputes inside.

        `fp32_sums`: gradients through time are summed by `Fp32GradientSums`; off, by autograd, in the weights' type.
        None: where weights have fewer than 32 bits. A compiled step leaves its matrices to autograd.

        `count_right`: the buffer `right` has how many counted targets of the last window were the likeliest token. A
        buffer, which whoever calls reads next, because a window that is replayed as a CUDA graph writes its numbers to
        fixed places.

        `recompute_cheap`: norms and activation functions are computed again in the backward pass (`cheap_recomputed`);
        with `recompute_every` it has no say, nor with a compiled step.
        """
        super().__init__()
        self.model = model
        self.recompute_every = recompute_every
        self.recompute_cheap = recompute_cheap and not recompute_every
        self.fp32_sums = fp32_sums
        self.register_buffer("right", torch.zeros((), dtype=torch.int64) if count_right else None, persistent=False)
        # What computes a window with gradients in another way, or returns None to leave it to `forward`.
        self.replacement: Callable[..., tuple[torch.Tensor, torch.Tensor] | None] | None = None

    def forward(
        self,
        input_ids_KB: torch.Tensor,
        targets_KB: torch.Tensor,
        reset_KB: torch.Tensor,
        state_BSE: torch.Tensor,
        weights_KB: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The SUM of the (weighted) cross-entropy in nats over the window, float32, and the detached new state.

        Shapes: ids, targets, reset and weights (K, B); state (B, S-1, E). A mean of per-rank means would be wrong when
        ranks count different numbers of targets; the caller divides by the global count.
        """
        if self.replacement is not None and torch.is_grad_enabled():
            replaced = self.replacement(input_ids_KB, targets_KB, reset_KB, state_BSE, weights_KB)
            if replaced is not None:
                return replaced
        every = self.recompute_every if torch.is_grad_enabled() else 0
        sums = self._gradient_sums(state_BSE)
        if 0 < every < len(input_ids_KB) and self.model.recomputes_apart:
            return self._in_pieces(every, sums, input_ids_KB, targets_KB, reset_KB, state_BSE, weights_KB)
        cheap = cheap_recomputed() if self.recompute_cheap and torch.is_grad_enabled() else nullcontext()
        with cheap, sums or nullcontext():
            hidden_KBE, new_state_BSE = self.model.unroll(input_ids_KB, state_BSE, reset_KB, every, sums)
            hidden_RE = hidden_KBE.flatten(0, 1)  # (K, B, E) -> (K*B, E)
            weights_R = None if weights_KB is None else weights_KB.reshape(-1)
            loss, right = self._head_loss(hidden_RE, targets_KB.reshape(-1), weights_R, sums)
        if self.right is not None:
            self.right.copy_(right)
        return loss, new_state_BSE.detach()

    def _in_pieces(
        self,
        every: int,
        fp32_sums: Fp32GradientSums | None,
        input_ids_KB: torch.Tensor,
        targets_KB: torch.Tensor,
        reset_KB: torch.Tensor,
        state_BSE: torch.Tensor,
        weights_KB: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `forward`; of every c columns nothing is kept for the backward pass but the state before them.

        Head and loss are parts of the pieces, so that embedded tokens, outputs and their gradients never exist for the
        whole window at once.
        """
        sums: GradientSums = InPlaceSums(self.model) if fp32_sums is None else fp32_sums
        tickets = sums.tickets([parameter for parameter in self.model.parameters() if parameter.requires_grad])
        losses, rights = [], []
        steps = len(input_ids_KB)
        for start in range(0, steps, every):
            part = slice(start, start + every)
            ids_cB, reset_cB, targets_R = input_ids_KB[part], reset_KB[part], targets_KB[part].reshape(-1)
            weights_R = None if weights_KB is None else weights_KB[part].reshape(-1)

            def run(
                state_BSE: torch.Tensor,
                ids_cB: torch.Tensor = ids_cB,
                reset_cB: torch.Tensor = reset_cB,
                targets_R: torch.Tensor = targets_R,
                weights_R: torch.Tensor | None = weights_R,
            ) -> tuple[torch.Tensor, ...]:
                own_sums = sums if torch.is_grad_enabled() else None
                hidden_cBE, state_BSE = self.model.unroll(ids_cB, state_BSE, reset_cB, 0, own_sums)
                hidden_RE = hidden_cBE.flatten(0, 1)  # (c, B, E) -> (c*B, E)
                # A copy: the state is a view of the outputs of all slots.
                return *self._head_loss(hidden_RE, targets_R, weights_R, fp32_sums), state_BSE.contiguous()

            loss, right, state_BSE = recomputed(run, sums, tickets, state_BSE, keep=part.stop >= steps)
            losses.append(loss)
            rights.append(right)
        if self.right is not None:
            self.right.copy_(torch.stack(rights).sum())
        return torch.stack(losses).sum(), state_BSE.detach()

    @torch.no_grad()
    def token_losses(
        self, input_ids_KB: torch.Tensor, targets_KB: torch.Tensor, reset_KB: torch.Tensor, state_BSE: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The cross-entropy of each target in nats, (K, B) float32, and the new state. Without gradients."""
        hidden_KBE, new_state_BSE = self.model.unroll(input_ids_KB, state_BSE, reset_KB)
        rows = max(1, HEAD_ELEMENTS // self.model.config.vocab_size)
        pieces = zip(hidden_KBE.flatten(0, 1).split(rows), targets_KB.reshape(-1).split(rows), strict=True)
        losses_R = torch.cat([self._row_losses(*piece) for piece in pieces])
        return losses_R.view(targets_KB.shape), new_state_BSE

    def _gradient_sums(self, like: torch.Tensor) -> Fp32GradientSums | None:
        wanted = like.dtype in (torch.bfloat16, torch.float16) if self.fp32_sums is None else self.fp32_sums
        return Fp32GradientSums() if wanted and torch.is_grad_enabled() else None

    def _head_loss(
        self,
        hidden_RE: torch.Tensor,
        targets_R: torch.Tensor,
        weights_R: torch.Tensor | None,
        sums: Fp32GradientSums | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of the losses, and how many of the counted targets were the likeliest token (0: not asked for)."""
        rows = max(1, HEAD_ELEMENTS // self.model.config.vocab_size)
        if hidden_RE.shape[0] <= rows:
            return self._rows_loss(hidden_RE, targets_R, weights_R)
        loss = hidden_RE.new_zeros((), dtype=torch.float32)
        right = targets_R.new_zeros(())
        # split and not slicing: the backward of each slice fills a gradient for all rows with zeros, so that the pieces
        # together would move bytes with the square of their number.
        weights = [None] * -(-len(targets_R) // rows) if weights_R is None else weights_R.split(rows)
        for piece in zip(hidden_RE.split(rows), targets_R.split(rows), weights, strict=True):
            of_piece, right_of_piece = checkpoint(
                self._rows_loss,
                *piece,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=recomputed_in(sums),
            )
            loss, right = loss + of_piece, right + right_of_piece
        return loss, right

    def _rows_loss(
        self, hidden_RE: torch.Tensor, targets_R: torch.Tensor, weights_R: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits_RV = self._logits(hidden_RE)
        right = targets_R.new_zeros(())
        if self.right is not None:
            is_right_R = logits_RV.detach().argmax(-1) == targets_R
            right = (is_right_R if weights_R is None else is_right_R & (weights_R > 0)).sum()
        if weights_R is None:
            return F.cross_entropy(logits_RV, targets_R, reduction="sum"), right
        return (F.cross_entropy(logits_RV, targets_R, reduction="none") * weights_R).sum(), right

    def _row_losses(self, hidden_RE: torch.Tensor, targets_R: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self._logits(hidden_RE), targets_R, reduction="none")

    def _logits(self, hidden_RE: torch.Tensor) -> torch.Tensor:
        logits_RV = self.model.logits_of(hidden_RE)
        return logits_RV if logits_RV.dtype == torch.float64 else logits_RV.float()
