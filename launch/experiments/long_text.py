"""Bits per byte by position in one long text: is there a cliff far beyond what a model was trained on?

    python launch/experiments/long_text.py MODEL... --store runs/text/store --out runs/text/long.jsonl

reads held-out files one after another as one text (end-of-text tokens stand between them, the state is carried on), in
stretches of 102,400 tokens, each from a fresh state. A line of OUT for each model, with nats by powers of two.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from gptb_ds.data.corpus import open_corpus
from gptb_ds.data.segments import Segments
from gptb_ds.distributed.world import World
from gptb_ds.loading import load_any
from gptb_ds.model.objective import WindowObjective
from gptb_ds.state_use import Reader

LENGTH = 102_400


def stretches(tokens: int, most: int) -> Segments:
    """The first `most` stretches of LENGTH tokens of a store's `tokens`, whatever documents they cross."""
    count = min(most, (tokens - 1) // LENGTH)
    if not count:
        raise SystemExit(f"{tokens:,} held-out tokens are less than one stretch of {LENGTH:,}")
    start, length = np.arange(count) * LENGTH, np.full(count, LENGTH)
    # A piece one input longer than what is read: its closing end-of-text token is no target here.
    return Segments(np.zeros(count, dtype=np.int64), start, length + 1, np.zeros(count, dtype=np.int64), length)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="runs or exported folders")
    parser.add_argument("--store", required=True, help="whose held-out split is read; tokens are bytes")
    parser.add_argument("--out", type=Path, default=Path("long.jsonl"))
    parser.add_argument("--stretches", type=int, default=5, help="at most so many")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    corpus = open_corpus([args.store], None, "validation")
    segments = stretches(len(corpus.stores[0].tokens), args.stretches)
    for path in args.models:
        model, _ = load_any(path)
        device = torch.device(args.device)
        model.to(device).eval()
        reader = Reader(WindowObjective(model).eval(), corpus, World(device=device), len(segments.count), 256)
        read = reader.score(segments, f"stretches of {LENGTH:,} tokens", None)
        assert read is not None
        rows = [asdict(row) | {"bits": row.loss / math.log(2)} for row in read.by_position]
        name = {"long": Path(path).name, "stretches": len(segments.count)}
        with args.out.open("a") as file:
            file.write(json.dumps({"name": name, "bits": read.loss / math.log(2), "by_position": rows}) + "\n")
        print(f"{path}: {read.loss / math.log(2):.3f} bits a token; by position:")
        for row in rows:
            print(f"{row['first']:>7,} to {min(row['last'], LENGTH):>7,}: {row['bits']:.3f}", flush=True)


if __name__ == "__main__":
    main()
