"""Counts resets in each update, with lanes in step and out of step (`data.stagger`), on a store or on stdlib.

python tests/benchmarks/bench_resets.py --lanes 512 --window 8 --max-document-tokens 1024
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from gptb_ds.data.collator import LaneCollator
from gptb_ds.data.corpus import open_corpus
from gptb_ds.data.prepare import PrepareOptions, prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", help="made by gptb-ds prepare (default: the standard library, prepared now)")
    parser.add_argument("--lanes", type=int, default=512)
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--max-document-tokens", type=int, default=1024)
    args = parser.parse_args()
    store = args.store
    if store is None:
        store = str(Path(tempfile.mkdtemp()) / "stdlib")
        prepare(PrepareOptions(source=["stdlib"], out=store))
    corpus = open_corpus([store])
    print(f"{args.lanes} lanes, window {args.window}, {args.updates} updates: resets an update")
    for limit in (None, args.max_document_tokens):
        spread = []
        for stagger in (False, True):
            collator = LaneCollator(
                corpus, lanes=args.lanes, window=args.window, seed=0, max_document_tokens=limit, stagger=stagger
            )
            counts = [int(collator.next_window().reset.sum()) for _ in range(args.updates)]
            later = np.array(counts[1:])  # at the first column of the run every lane begins anew
            spread.append(later.std())
            print(
                f"  {'whole documents' if limit is None else f'pieces of {limit}':16}"
                f" {'out of step' if stagger else 'in step':12} first {counts[0]}, then min {later.min()},"
                f" max {later.max()}, mean {later.mean():.2f}, std {later.std():.2f}"
            )
        print(f"  spread in step against out of step: {spread[0] / max(spread[1], 1e-9):.1f}x")


if __name__ == "__main__":
    main()
