"""The verb `plot`: its arguments and what it prints."""

from __future__ import annotations

import argparse

from gptb_ds.plot import plot_runs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument(
        "--out", default="loss.png", metavar="FILE", help="the picture, by its ending (default: loss.png)"
    )


def run(args: argparse.Namespace) -> int:
    """Draws the picture. Raises ValueError as `plot_runs` does."""
    plot_runs(args.runs, args.out)
    print(f"wrote {args.out}")
    return 0
