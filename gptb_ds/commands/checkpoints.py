"""The verb `checkpoints`: what a run has saved, and whether it can be used."""

from __future__ import annotations

import argparse
from pathlib import Path

from gptb_ds.checkpoint.format import CheckpointError, list_checkpoints


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="a run's folder")


def run(args: argparse.Namespace) -> int:
    """Prints a line for each checkpoint, newest first. Raises ValueError when the folder is no run."""
    folder = Path(args.run)
    if not (folder / "checkpoints").is_dir():
        raise ValueError(f"{folder}: has no checkpoints; is it the folder of a run (--run.dir)?")
    print(f"{'step':>10} {'tokens':>16} {'loss':>8} {'ranks':>5} {'stage':>5}  verified")
    for checkpoint, found in list_checkpoints(folder):
        if isinstance(found, CheckpointError):
            print(f"{int(checkpoint.name.split('-')[1]):>10} {'':>16} {'':>8} {'':>5} {'':>5}  no: {found}")
        else:
            loss = "-" if found.loss is None else f"{found.loss:.4f}"
            print(f"{found.step:>10} {found.tokens:>16,} {loss:>8} {found.world_size:>5} {found.zero_stage:>5}  yes")
    return 0
