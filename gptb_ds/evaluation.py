"""Owns evaluation: held-out loss and bits per byte, each document read once from its start.

Axes: B lanes of this rank, K steps, S slots, E embedding.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from gptb_ds.arguments import below_one
from gptb_ds.data.collator import Window, held_out_windows
from gptb_ds.data.mixture import bytes_per_target, open_corpus
from gptb_ds.data.tokenization import describe, fingerprint
from gptb_ds.training.objective import WindowObjective
from gptb_ds.training.world import World


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
        moved = [None if t is None else t.to(world.device) for t in (window.input_ids, window.targets, window.reset)]
        weights = None if window.weights is None else window.weights.to(world.device)
        loss, state_BSE = objective(*moved, state_BSE, weights)
        total[0] += loss.double()
        total[1] += window.input_ids.numel() if weights is None else weights.double().sum()
        if not goes_on():
            return None
    loss_sum, count = world.sum(total).tolist()
    return loss_sum / max(count, 1.0), count


def metrics_of(loss: float, target_bytes: float) -> dict[str, float]:
    """The line that an evaluation adds to metrics.jsonl."""
    return {"eval_loss": loss, "eval_bits_per_byte": loss / math.log(2) / target_bytes}


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a run, a checkpoint or an exported folder")
    parser.add_argument("--data", required=True, nargs="+", metavar="DIR", help="store(s) made by `gptb-ds prepare`")
    parser.add_argument("--split", default="validation", help="split of the store (default: validation)")
    parser.add_argument("--lanes", type=int, default=64, help="documents read side by side (default: 64)")
    parser.add_argument("--window", type=int, default=64, help="columns of one forward pass (default: 64)")
    parser.add_argument("--max-tokens", type=int, default=None, help="stop after so many tokens (default: all)")
    parser.add_argument("--max-document-tokens", type=int, default=None, help="cut longer documents into such pieces")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run_evaluate(args: argparse.Namespace, load: Callable[[str], tuple[Any, Any]]) -> int:
    """The verb `evaluate`. Raises ValueError for a model or a store that can't be used."""
    if errors := below_one(args, "lanes", "window", "max-tokens", "max-document-tokens"):
        raise ValueError("\n".join(errors))
    model, tokenizer = load(args.model)
    corpus = open_corpus(args.data, None, args.split)
    if fingerprint(tokenizer) != corpus.tokenizer_fingerprint:
        raise ValueError(
            f"--data {' '.join(args.data)}: its tokens are of {corpus.tokenizer}, those of {args.model} of"
            f" {describe(tokenizer)}; prepare the text with the model's tokenizer"
        )
    world = World(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    objective = WindowObjective(model.to(world.device)).eval()
    state_BSE = torch.zeros(
        (args.lanes, model.config.num_slots - 1, model.config.n_embd), dtype=model.dtype, device=world.device
    )
    windows = held_out_windows(
        corpus,
        lanes=args.lanes,
        window=args.window,
        max_tokens=args.max_tokens,
        max_document_tokens=args.max_document_tokens,
    )
    measured = held_out_loss(objective, windows, state_BSE, world)
    assert measured is not None
    loss, count = measured
    if count == 0:
        raise ValueError(f"--data {' '.join(args.data)}: split '{args.split}' has no counted target")
    result = metrics_of(loss, bytes_per_target(corpus.stores, args.max_document_tokens)) | {"targets": int(count)}
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{int(count):,} targets: loss {loss:.4f} nats, {result['eval_bits_per_byte']:.4f} bits per byte")
    return 0
