"""The loss of a causal language model as transformers has it.

Axes: B lanes, T tokens, V vocabulary, R rows: the tokens of all lanes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def causal_loss(
    logits_BTV: torch.Tensor, labels_BT: torch.Tensor | None, shift: bool, num_items: torch.Tensor | int | None
) -> torch.Tensor | None:
    """The mean cross-entropy in nats over labels other than -100 (0 when there is none), or their sum over `num_items`.

    None without labels. `shift`: the labels are the tokens that were read, so that the logits at t are scored on the
    label at t + 1.

    Raises ValueError on the CPU for a label outside the vocabulary.
    """
    if labels_BT is None:
        return None
    if shift:
        logits_BTV, labels_BT = logits_BTV[:, :-1], labels_BT[:, 1:]
    logits_RV = logits_BTV.flatten(0, 1)
    logits_RV = logits_RV if logits_RV.dtype == torch.float64 else logits_RV.float()
    labels_R = labels_BT.flatten().to(logits_RV.device)
    try:
        total = F.cross_entropy(logits_RV, labels_R, ignore_index=-100, reduction="sum")
    except IndexError:
        raise ValueError(
            f"labels hold tokens from {int(labels_R.min())} to {int(labels_R.max())}, but the vocabulary is 0 to"
            f" {logits_RV.shape[-1] - 1} (-100 = not counted)"
        ) from None
    if num_items is None:
        num_items = (labels_R != -100).sum().clamp(min=1)
    return total / num_items
