"""Evaluation: held-out loss and bits per byte, what the state is worth, and how far a task is solved.

Axes: B lanes of this rank, K steps, S slots, E embedding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from gptb_ds.config import below_one
from gptb_ds.data.corpus import Corpus, open_corpus
from gptb_ds.data.held_out import held_out_windows
from gptb_ds.data.segments import whole_pieces
from gptb_ds.data.tasks import Ints, Task, TaskDocument, columns_of, longest_length, parse_task
from gptb_ds.data.tokenization import fingerprint, tokenizer_name
from gptb_ds.data.window import Window
from gptb_ds.distributed.world import World
from gptb_ds.loading import PRECISIONS, load_any, trained_pieces, usable_device
from gptb_ds.model.objective import WindowObjective
from gptb_ds.model.window_model import WindowModel
from gptb_ds.state_use import INTERVALS, Reader, Score

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
    """What `evaluate` reads, and how: `lanes` documents side by side, in windows of `window` columns.

    `reset_every`: the numbers of tokens after which the state is reset for comparison; () = no comparison.
    """

    model: str
    data: Sequence[str] = ()
    split: str = "validation"
    lanes: int = 64
    window: int = 64
    max_tokens: int | None = None
    max_document_tokens: int | None = None
    reset_every: Sequence[int] = INTERVALS
    task: str | None = None
    max_length: int = 1000
    device: str = "auto"
    precision: str = "fp32"

    def __post_init__(self) -> None:
        errors = below_one(self, "lanes", "window", "max_tokens", "max_document_tokens", "max_length")
        errors += [f"--reset-every {n}: must be at least 1" for n in self.reset_every if n < 1]
        if not self.data and not self.task:
            errors.append("--data: required, a store made by gptb-ds prepare (or --task NAME)")
        if errors:
            raise ValueError("\n".join(errors))


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of held-out text: documents read as wholes, and in pieces where it is trained on pieces.

    `main` is the reading that `max_document_tokens` asked for, whole documents by default. `state_use`: whole documents
    with the state reset every n tokens, rising, and carried last.
    """

    main: Score
    state_use: list[Score]
    pieces: Score | None

    def summary(self) -> dict[str, float | int | str | None]:
        """The figures of `main`, by the names that metrics.jsonl has for them."""
        return {
            "eval_loss": self.main.loss,
            "eval_bits_per_byte": self.main.bits_per_byte,
            "eval_perplexity": self.main.perplexity,
            "targets": int(self.main.targets),
            "read_as": self.main.read_as,
        }


def evaluate(options: EvaluateOptions) -> Evaluation:
    """Held-out loss, perplexity and bits per byte of a model on stores, and what its state is worth there.

    Raises ValueError for a model or a store that can't be used, or that don't belong together.
    """
    model, tokenizer = load_any(options.model)
    corpus = open_corpus(options.data, None, options.split)
    if fingerprint(tokenizer) != corpus.tokenizer_fingerprint:
        raise ValueError(
            f"--data {' '.join(options.data)}: its tokens are of {corpus.tokenizer}, those of {options.model} of"
            f" {tokenizer_name(tokenizer)}; prepare the text with the model's tokenizer"
        )
    limit = options.max_document_tokens or trained_pieces(options.model)
    cut = None if limit is None else whole_pieces(corpus, options.max_tokens, limit)
    world = World(device=usable_device(options.device))
    model.to(device=world.device, dtype=PRECISIONS[options.precision])
    reader = Reader(WindowObjective(model).eval(), corpus, world, options.lanes, options.window)
    whole = whole_pieces(corpus, options.max_tokens)
    use = reader.state_use(whole, "whole documents", corpus.bytes_per_target(), options.reset_every)
    if not use:
        raise ValueError(f"--data {' '.join(options.data)}: split '{options.split}' has no counted target")
    pieces = None
    if cut is not None:
        pieces = reader.score(cut, f"pieces of {limit:,} tokens", corpus.bytes_per_target(limit))
    main = pieces if options.max_document_tokens and pieces else use[-1]
    return Evaluation(main, use, pieces)


@dataclass(frozen=True)
class TaskScore:
    """How far a model's answers are right on documents longer than those it was trained on.

    `longest_90`, `longest_99`: see `longest_length`. `accuracy` by length, at 10, 20, 40, ..: of the answers at
    the last tenth of the positions up to there.
    """

    task: str
    max_length: int
    documents: int
    longest_90: int
    longest_99: int
    accuracy: dict[int, float]


@torch.no_grad()
def score_task(
    model: WindowModel, task: Task, max_length: int, *, documents: int = 64, window: int = 64, seed: int = 1 << 32
) -> TaskScore:
    """Scores a model (in eval mode) on fresh documents of `max_length`, read step by step with the state carried on.

    A length is a position of an answer: for state tracking the inputs read so far, else the tokens. Copy and recall are
    asked once a document: theirs is the distance, in documents of 10, 20, 40, .. up to `max_length` blanks. `seed` is
    one that `prepare` does not use by itself, so that the documents are new.
    """
    rng = np.random.default_rng([seed, task.seed])
    shares: dict[int, float] = {}
    device = next(model.parameters()).device
    if task.name in ("copy", "recall"):
        for distance in _doublings(max_length):
            asked = replace(task, distance=distance)
            read = [asked.document(rng, task.length) for _ in range(documents)]
            right, counted = _answers(model, read, window, device)
            shares[distance] = float(right.sum() / counted.sum())
        good, best = (_last_with(shares, share) for share in (0.9, 0.99))
        return TaskScore(task.name, max_length, documents, good, best, shares)
    right, counted = _answers(model, [task.document(rng, max_length) for _ in range(documents)], window, device)
    right, counted = right[: max_length + 1], counted[: max_length + 1]
    for length in _doublings(max_length):
        last = slice(length - length // 10 + 1, length + 1)
        if counted[last].sum():
            shares[length] = float(right[last].sum() / counted[last].sum())
    good, best = (longest_length(right, counted, share) for share in (0.9, 0.99))
    return TaskScore(task.name, max_length, documents, good, best, shares)


def _last_with(shares: dict[int, float], least: float) -> int:
    """The last length up to which all have at least this share; 0: none has."""
    return max(itertools.takewhile(lambda length: shares[length] >= least, shares), default=0)


def _doublings(most: int) -> list[int]:
    return [*itertools.takewhile(lambda n: n < most, (10 << k for k in itertools.count())), most]


def _answers(model: WindowModel, documents: list[TaskDocument], window: int, device: torch.device) -> tuple[Ints, Ints]:
    """Right and asked answers at each position (T)."""
    inputs_TB, targets_TB, counted_TB = columns_of(documents)
    state_BSE = model.empty_state(len(documents))
    right = np.zeros(len(inputs_TB), dtype=np.int64)
    for first in range(0, len(inputs_TB), window):
        tokens_KB = torch.from_numpy(inputs_TB[first : first + window]).to(device)
        reset_KB = torch.zeros_like(tokens_KB, dtype=torch.bool)
        reset_KB[0] = first == 0
        hidden_KBE, state_BSE = model.unroll(tokens_KB, state_BSE, reset_KB)
        answers_KB = model.logits_of(hidden_KBE).argmax(-1).cpu().numpy()
        fits = (answers_KB == targets_TB[first : first + window]) & counted_TB[first : first + window]
        right[first : first + window] = fits.sum(1)
    return right, counted_TB.sum(1)


def evaluate_task(options: EvaluateOptions) -> TaskScore:
    """`score_task` of a run, a checkpoint or an exported folder. Raises ValueError when it is not of that task."""
    assert options.task is not None
    task = parse_task(options.task)
    model, tokenizer = load_any(options.model)
    if fingerprint(tokenizer) != fingerprint(task.tokenizer()):
        raise ValueError(f"--task {options.task}: {options.model} was trained on something else: another tokenizer")
    model.to(device=usable_device(options.device), dtype=PRECISIONS[options.precision])
    return score_task(model, task, options.max_length, documents=options.lanes, window=options.window)
