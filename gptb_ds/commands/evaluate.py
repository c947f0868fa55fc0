"""The verb `evaluate`: its arguments and what it prints."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from gptb_ds.commands.arguments import options_of
from gptb_ds.evaluation import PRECISIONS, EvaluateOptions, evaluate, evaluate_task


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a run, a checkpoint or an exported folder")
    parser.add_argument("--data", default=(), nargs="+", metavar="DIR", help="store(s) made by `gptb-ds prepare`")
    parser.add_argument("--split", default="validation", help="split of the store (default: validation)")
    parser.add_argument("--lanes", type=int, default=64, help="documents read side by side (default: 64)")
    parser.add_argument("--window", type=int, default=64, help="columns of one forward pass (default: 64)")
    parser.add_argument("--max-tokens", type=int, help="stop after so many tokens (default: all)")
    parser.add_argument("--max-document-tokens", type=int, help="cut longer documents into pieces")
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
    if args.json:
        print(json.dumps(result))
    else:
        bits = result["eval_bits_per_byte"]
        per_byte = "" if bits is None else f", {bits:.4f} bits per byte"
        print(f"{result['targets']:,} targets: loss {result['eval_loss']:.4f} nats{per_byte}")
    return 0
