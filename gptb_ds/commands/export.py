"""The verb `export`: its arguments and what it prints."""

from __future__ import annotations

import argparse

from gptb_ds.commands.arguments import options_of
from gptb_ds.export import ExportOptions, export


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a run or a checkpoint")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder that `transformers` can load")


def run(args: argparse.Namespace) -> int:
    """Exports. Raises ValueError as `export` does."""
    out = export(options_of(ExportOptions, args))
    print(f"exported {args.model} to {out}")
    return 0
