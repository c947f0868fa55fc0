"""The verb `generate`: its arguments and what it prints."""

from __future__ import annotations

import argparse
import sys

from gptb_ds.commands.arguments import options_of
from gptb_ds.generation import GenerateOptions, generate_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a run, a checkpoint or an exported folder")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="how the document starts (default: nothing)")
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="0 = the likeliest token (default: 1)"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest (default: among all)")
    parser.add_argument("--seed", type=int, metavar="N", help="repeat the same draws (default: unpredictable)")


def run(args: argparse.Namespace) -> int:
    """Prints the prompt and what follows it, as it is generated. Raises ValueError for what the user gave."""
    pieces = generate_text(options_of(GenerateOptions, args))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows a question mark
    print(args.prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0
