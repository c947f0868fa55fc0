"""Evaluation: held-out loss and bits per byte, each document read once from its start.

Axes: B lanes of this rank, K steps, S slots, E embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from gptb_ds.config import below_one
from gptb_ds.data.corpus import Corpus, open_corpus
from gptb_ds.data.held_out import held_out_windows
from gptb_ds.data.tokenization import fingerprint, tokenizer_name
from gptb_ds.data.window import Window
from gptb_ds.distributed.world import World
from gptb_ds.loading import load_any
from gptb_ds.model.objective import WindowObjective

Objective = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class LossSum:
    """Adds up an objective over windows, on the way to one mean over all ranks."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._total = torch.zeros(2, dtype=torch.float64, device=world.device)  # nats, counted targets

    def add(self, objective: Objective, window: Window, state_BSE: torch.Tensor) -> torch.Tensor:
        """Reads a window from the state that the one before left; returns the state after it.

        `objective` must be in eval mode (no random stream is then touched), and gradients be off.
        """
        self._total[1] += window.counted
        window = window.to(self._world.device)
        state_BSE = state_BSE[: window.lanes]  # the lanes that have run out are the last
        loss, state_BSE = objective(window.input_ids, window.targets, window.reset, state_BSE, window.loss_weights)
        self._total[0] += loss.double()
        return state_BSE

    def mean(self) -> tuple[float | None, float]:
        """Nats per counted target over all ranks (None: nothing was counted), and how many were. All ranks call it."""
        loss, counted = self._world.sum(self._total.clone()).tolist()
        return (loss / counted if counted else None), counted


@dataclass(frozen=True)
class HeldOut:
    """What is held out, and how this rank reads it. `lanes` is the number of lanes over all ranks."""

    corpus: Corpus
    world: World
    lanes: int
    window: int
    max_tokens: int | None = None
    max_document_tokens: int | None = None

    @property
    def bytes_per_target(self) -> float | None:
        """See `Corpus.bytes_per_target`."""
        return self.corpus.bytes_per_target(self.max_document_tokens)

    def windows(self) -> Iterator[Window]:
        """See `held_out_windows`."""
        return held_out_windows(
            self.corpus,
            lanes=self.lanes,
            window=self.window,
            rank=self.world.rank,
            world_size=self.world.size,
            max_tokens=self.max_tokens,
            max_document_tokens=self.max_document_tokens,
        )


def metrics_of(loss: float | None, bytes_per_target: float | None) -> dict[str, float | None]:
    """The line that an evaluation adds to metrics.jsonl: nats per target, and bits per byte where bytes are known."""
    known = loss is not None and bytes_per_target is not None
    return {
        "eval_loss": loss,
        "eval_bits_per_byte": loss / math.log(2) / bytes_per_target if known else None,  # type: ignore[operator]
    }


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


def evaluate(options: EvaluateOptions) -> dict[str, float | int | None]:
    """`eval_loss`, `eval_bits_per_byte` (None: bytes unknown) and the number of counted `targets` of a model on stores.

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
    held_out = HeldOut(corpus, world, options.lanes, options.window, options.max_tokens, options.max_document_tokens)
    losses, state_BSE = LossSum(world), model.empty_state(options.lanes)
    with torch.no_grad():
        for window in held_out.windows():
            state_BSE = losses.add(objective, window, state_BSE)
    loss, count = losses.mean()
    if loss is None:
        raise ValueError(f"--data {' '.join(options.data)}: split '{options.split}' has no counted target")
    return metrics_of(loss, held_out.bytes_per_target) | {"targets": int(count)}
