"""Evaluation: held-out loss and bits per byte, each document read once from its start.

Axes: B lanes of this rank, K steps, S slots, E embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from gptb_ds.config import below_one
from gptb_ds.data.corpus import open_corpus
from gptb_ds.data.held_out import held_out_windows
from gptb_ds.data.tokenization import fingerprint, tokenizer_name
from gptb_ds.data.window import Window
from gptb_ds.distributed.world import World
from gptb_ds.loading import load_any
from gptb_ds.model.objective import WindowObjective


@torch.no_grad()
def held_out_loss(
    objective: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    windows: Iterable[Window],
    state_BSE: torch.Tensor,
    world: World,
    goes_on: Callable[[], bool] = lambda: True,
) -> tuple[float, float] | None:
    """Mean nats per counted target over all ranks, and how many targets were counted.

    The state is carried from window to window; `objective` must be in eval mode (no random stream is then touched).
    `goes_on` is asked after each window, on all ranks with the same answer: at the first no the result is None.
    """
    total = torch.zeros(2, dtype=torch.float64, device=world.device)
    for window in windows:
        total[1] += window.counted
        window = window.to(world.device)
        state_BSE = state_BSE[: window.lanes]  # the lanes that have run out are the last
        loss, state_BSE = objective(window.input_ids, window.targets, window.reset, state_BSE, window.loss_weights)
        total[0] += loss.double()
        if not goes_on():
            return None
    loss_sum, count = world.sum(total).tolist()
    return loss_sum / max(count, 1.0), count


def metrics_of(loss: float, target_bytes: float) -> dict[str, float]:
    """The line that an evaluation adds to metrics.jsonl."""
    return {"eval_loss": loss, "eval_bits_per_byte": loss / math.log(2) / target_bytes}


@dataclass(frozen=True)
class EvaluateOptions:
    """What `evaluate` reads, and how: `lanes` documents side by side, in windows of `window` columns."""

    model: str
    data: Sequence[str]
    split: str = "validation"
    lanes: int = 64
    window: int = 64
    max_tokens: int | None = None
    max_document_tokens: int | None = None

    def __post_init__(self) -> None:
        if errors := below_one(self, "lanes", "window", "max_tokens", "max_document_tokens"):
            raise ValueError("\n".join(errors))


def evaluate(options: EvaluateOptions) -> dict[str, float | int]:
    """`eval_loss`, `eval_bits_per_byte` and the number of counted `targets` of a model on stores.

    Raises ValueError for a model or a store that can't be used, or that don't belong together.
    """
    model, tokenizer = load_any(options.model)
    corpus = open_corpus(options.data, None, options.split)
    if fingerprint(tokenizer) != corpus.tokenizer_fingerprint:
        raise ValueError(
            f"--data {' '.join(options.data)}: its tokens are of {corpus.tokenizer}, those of {options.model} of"
            f" {tokenizer_name(tokenizer)}; prepare the text with the model's tokenizer"
        )
    world = World(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    objective = WindowObjective(model.to(world.device)).eval()  # type: ignore[arg-type]
    state_BSE = model.empty_state(options.lanes)
    windows = held_out_windows(
        corpus,
        lanes=options.lanes,
        window=options.window,
        max_tokens=options.max_tokens,
        max_document_tokens=options.max_document_tokens,
    )
    measured = held_out_loss(objective, windows, state_BSE, world)
    assert measured is not None
    loss, count = measured
    if count == 0:
        raise ValueError(f"--data {' '.join(options.data)}: split '{options.split}' has no counted target")
    return metrics_of(loss, corpus.bytes_per_target(options.max_document_tokens)) | {"targets": int(count)}
