"""The verb `evaluate`: its arguments and what it prints."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from gptb_ds.commands.arguments import options_of
from gptb_ds.evaluation import PRECISIONS, EvaluateOptions, Evaluation, evaluate, evaluate_task
from gptb_ds.state_use import INTERVALS, Score


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a run, a checkpoint or an exported folder")
    parser.add_argument("--data", default=(), nargs="+", metavar="DIR", help="store(s) made by `gptb-ds prepare`")
    parser.add_argument("--split", default="validation", help="split of the store (default: validation)")
    parser.add_argument("--lanes", type=int, default=64, help="documents read side by side (default: 64)")
    parser.add_argument("--window", type=int, default=64, help="columns of one forward pass (default: 64)")
    parser.add_argument("--max-tokens", type=int, help="stop after so many tokens (default: all)")
    parser.add_argument(
        "--max-document-tokens",
        type=int,
        metavar="N",
        help="read pieces of at most so many tokens (default: whole documents, and the pieces that the run trained on)",
    )
    parser.add_argument(
        "--reset-every",
        type=int,
        nargs="*",
        default=INTERVALS,
        metavar="N",
        help=f"compare with a state reset every N tokens (default: {' '.join(map(str, INTERVALS))}; nothing: don't)",
    )
    parser.add_argument("--out", metavar="DIR", help="also write evaluation.json and evaluation.png there")
    parser.add_argument("--task", help="instead of --data: how far it solves a generated task (parity, s5, ..)")
    parser.add_argument("--max-length", type=int, default=1000, help="with --task: of its documents (default: 1000)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument("--precision", default="fp32", choices=list(PRECISIONS), help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Prints the figures. Raises ValueError as `evaluate` does."""
    options = options_of(EvaluateOptions, args)
    if options.task:
        score = evaluate_task(options)
        if args.json:
            print(json.dumps(asdict(score)))
            return 0
        for length, share in score.accuracy.items():
            print(f"length {length:>7,}: {share:.1%} right")
        print(f"{score.task}: at least 90% right up to {score.longest_90:,}, 99% up to {score.longest_99:,}")
        return 0
    result = evaluate(options)
    if args.out:
        _write(result, Path(args.out))
    if args.json:
        print(json.dumps(_as_json(result)))
        return 0
    for reading in [result.state_use[-1], *([result.pieces] if result.pieces else [])]:
        print(f"{reading.read_as}: {reading.targets:,.0f} targets, {_figures(reading)}")
    if len(result.state_use) > 1:
        print("\n".join(["", *state_use_table(result.state_use), "", *position_table(result.state_use)]))
    return 0


def _figures(score: Score) -> str:
    bits = "" if score.bits_per_byte is None else f", {score.bits_per_byte:.4f} bits per byte"
    return f"loss {score.loss:.4f} nats, perplexity {score.perplexity:.4g}{bits}"


def _named(score: Score) -> str:
    return "carried" if score.reset_every is None else f"{score.reset_every:,}"


def state_use_table(scores: Sequence[Score]) -> list[str]:
    """A line for each score: what the same targets cost when the state is reset that often."""
    carried = scores[-1].loss
    lines = [f"{'state reset every':>17} {'loss':>9} {'perplexity':>11} {'bits/byte':>10} {'beside carried':>15}"]
    for score in scores:
        bits = "" if score.bits_per_byte is None else f"{score.bits_per_byte:.4f}"
        beside = "" if score.reset_every is None else f"{score.loss - carried:+.4f}"
        lines.append(f"{_named(score):>17} {score.loss:>9.4f} {score.perplexity:>11.4g} {bits:>10} {beside:>15}")
    return lines


def position_table(scores: Sequence[Score]) -> list[str]:
    """A line for each power of two of a position in the document: the loss there, with each of the resets."""
    lines = [f"{'position':>17} {'targets':>9} " + " ".join(f"{_named(score):>9}" for score in scores)]
    for rows in zip(*(score.by_position for score in scores), strict=True):
        first, last = rows[0].first, rows[0].last
        place = f"{first:,}" if first == last else f"{first:,}-{last:,}"
        lines.append(f"{place:>17} {rows[0].targets:>9,.0f} " + " ".join(f"{row.loss:>9.4f}" for row in rows))
    return lines


def _as_json(result: Evaluation) -> dict[str, object]:
    return {**result.summary(), "state_use": [asdict(s) for s in result.state_use]} | {
        "pieces": None if result.pieces is None else asdict(result.pieces)
    }


def _write(result: Evaluation, folder: Path) -> None:
    """Raises ValueError when the folder can't be written to."""
    from gptb_ds.plot import plot_state_use  # matplotlib, only when asked for

    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "evaluation.json").write_text(json.dumps(_as_json(result), indent=1))
        plot_state_use(result.state_use, str(folder / "evaluation.png"))
    except OSError as error:
        raise ValueError(f"--out {folder}: cannot be written: {error}") from None
