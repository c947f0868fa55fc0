"""Measures the collator against four other ways to make windows of the same store, on one core.

    python tests/benchmarks/bench_collator.py --store STORE      a store made by gptb-ds prepare (default: stdlib)
    python tests/benchmarks/bench_collator.py --synthetic DIR    10 million documents, 5 billion tokens (sparse files)

Axes: B lanes, K steps of a window. Every contender gives `(K, B)` int64 inputs and targets.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from gptb_ds.data.collator import LaneCollator
from gptb_ds.data.corpus import Corpus
from gptb_ds.data.documents import DocumentStore, open_store
from gptb_ds.data.prepare import PrepareOptions, prepare
from gptb_ds.data.writer import write_manifest

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]
DOCUMENTS, MEAN = 10_000_000, 499


def ours(store: DocumentStore, lanes: int, window: int) -> Batches:
    """This project's collator."""
    collator = LaneCollator(Corpus([store]), lanes=lanes, window=window, seed=0)
    while True:
        made = collator.next_window()
        yield made.input_ids, made.targets


def documents(store: DocumentStore, lane: int, lanes: int, order: np.ndarray) -> Iterator[np.ndarray]:
    """EOT and tokens of a lane's documents."""
    for j in itertools.count(lane, lanes):
        number = order[j % len(order)]
        yield store.tokens[store.offsets[number] : store.offsets[number + 1]]


def lane_rows(store: DocumentStore, lane: int, lanes: int, window: int, order: np.ndarray) -> Iterator[np.ndarray]:
    """A lane's inputs and the next one (K+1,), window by window."""
    stream = documents(store, lane, lanes, order)
    rest = next(stream)
    while True:
        row, filled = np.empty(window + 1, dtype=np.int64), 0
        while filled <= window:
            taken = rest[: window + 1 - filled]
            row[filled : filled + len(taken)] = taken
            filled += len(taken)
            # The last one is read again: it is the first of the next window.
            rest = rest[len(taken) :] if filled <= window else rest[len(taken) - 1 :]
            if not len(rest):
                rest = next(stream)
        yield row


def per_lane_loop(store: DocumentStore, lanes: int, window: int) -> Batches:
    """(a) A Python generator for each lane, stacked."""
    order = np.random.default_rng(0).permutation(store.num_documents)
    streams = [lane_rows(store, lane, lanes, window, order) for lane in range(lanes)]
    while True:
        rows = torch.from_numpy(np.stack([next(stream) for stream in streams])).t().contiguous()
        yield rows[:-1], rows[1:]


class Rows(IterableDataset):
    """The windows of all lanes, one lane after another, for a data loader."""

    def __init__(self, store: DocumentStore, lanes: int, window: int) -> None:
        self.store, self.lanes, self.window, self.count = store, lanes, window, 0

    def __iter__(self) -> Iterator[np.ndarray]:
        order = np.random.default_rng(0).permutation(self.store.num_documents)
        streams = [lane_rows(self.store, lane, self.lanes, self.window, order) for lane in range(self.lanes)]
        for stream in itertools.cycle(streams):
            self.count += 1
            yield next(stream)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def stateful_loader(store: DocumentStore, lanes: int, window: int) -> Batches:
    """(b) torchdata's StatefulDataLoader over those rows, a batch of all lanes."""
    for rows in StatefulDataLoader(Rows(store, lanes, window), batch_size=lanes):
        columns = rows.t().contiguous()
        yield columns[:-1], columns[1:]


def transformer_xl_shuffled(store: DocumentStore, lanes: int, window: int) -> Batches:
    """(c1) As Transformer-XL's shuffled iterator does it: one shared document stream that fills lane after lane."""
    order = np.random.default_rng(0).permutation(store.num_documents)
    shared = (torch.from_numpy(d.astype(np.int64)) for d in documents(store, 0, 1, order))
    streams: list[torch.Tensor] = [torch.empty(0, dtype=torch.int64)] * lanes
    while True:
        data = torch.full((window, lanes), -1)
        target = torch.full((window, lanes), -1)
        for lane in range(lanes):
            filled = 0
            while filled < window:
                while len(streams[lane]) <= 1:
                    streams[lane] = next(shared)
                new = min(len(streams[lane]) - 1, window - filled)
                data[filled : filled + new, lane] = streams[lane][:new]
                target[filled : filled + new, lane] = streams[lane][1 : new + 1]
                streams[lane] = streams[lane][new:]
                filled += new
        yield data, target


def fastai_chunks(store: DocumentStore, lanes: int, window: int) -> Batches:
    """(c2) As fastai's language model loader does it: all documents end to end, cut in B stretches, an item a lane."""
    order = np.random.default_rng(0).permutation(store.num_documents)
    ends = np.cumsum((store.offsets[1:] - store.offsets[:-1])[order])
    stretch = int(ends[-1]) // lanes

    def span(start: int, stop: int) -> torch.Tensor:
        parts, number = [], int(np.searchsorted(ends, start, side="right"))
        while start < stop:
            begin = int(store.offsets[order[number]])
            base = int(ends[number - 1]) if number else 0
            until = min(stop, int(ends[number]))
            parts.append(torch.from_numpy(store.tokens[begin + start - base : begin + until - base].astype(np.int64)))
            start, number = until, number + 1
        return torch.cat(parts)

    for step in itertools.cycle(range((stretch - 1) // window)):
        items = [
            span(lane * stretch + step * window, lane * stretch + (step + 1) * window + 1) for lane in range(lanes)
        ]
        yield (
            torch.stack([item[:-1] for item in items]).t().contiguous(),
            torch.stack([item[1:] for item in items]).t().contiguous(),
        )


def transformer_xl_ordered(store: DocumentStore, lanes: int, window: int) -> Batches:
    """(c3) Transformer-XL's ordered iterator: the corpus in memory as (T, B), slices. No order, resets, position."""
    length = len(store.tokens) // lanes
    columns = torch.from_numpy(store.tokens[: length * lanes].reshape(lanes, length).T.astype(np.int64))
    for start in itertools.cycle(range(0, length - window, window)):
        yield columns[start : start + window].clone(), columns[start + 1 : start + window + 1].clone()


def speed(make: Callable[..., Batches], store: DocumentStore, lanes: int, window: int, seconds: float) -> float:
    """Inputs for each second of processor time: the best of five rounds of `seconds`, whatever else runs."""
    batches = make(store, lanes, window)
    for _ in range(3):
        next(batches)
    best = 0.0
    for _ in range(5):
        count, began = 0, time.process_time()
        while time.process_time() - began < seconds:
            inputs, targets = next(batches)
            assert inputs.shape == targets.shape == (window, lanes)
            count += 1
        best = max(best, count * lanes * window / (time.process_time() - began))
    return best


def make_synthetic(folder: Path) -> None:
    """10 million documents with log-normal lengths; tokens.bin is a hole, so that only lengths cost disk space."""
    if (folder / "store.json").is_file():
        return
    (folder / "train").mkdir(parents=True, exist_ok=True)
    (folder / "validation").mkdir(exist_ok=True)
    lengths = np.random.default_rng(0).lognormal(sigma=1.2, size=DOCUMENTS)
    lengths = np.maximum(1, lengths * MEAN / lengths.mean()).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths + 1)])
    offsets.tofile(folder / "train/offsets.bin")
    with (folder / "train/tokens.bin").open("wb") as file:
        file.truncate(2 * int(offsets[-1] + 1))
    for name in ("tokens.bin", "offsets.bin"):
        (folder / "validation" / name).write_bytes(b"\0" * 8)
    split = {"documents": DOCUMENTS, "tokens": int(lengths.sum()), "bytes": int(lengths.sum()), "histogram": []}
    facts: dict[str, Any] = {"recipe": "", "sources": ["synthetic"], "tokenizer": "none", "tokenizer_fingerprint": ""}
    facts |= {"vocab_size": 259, "eot_id": 1, "dtype": "uint16", "weighted": False, "skipped": {}}
    empty = {"documents": 0, "tokens": 0, "bytes": 0, "histogram": []}
    write_manifest(folder, {**facts, "splits": {"train": split, "validation": empty}})


def own_memory() -> float:
    """MiB of this process that are not pages of a file (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def first_window(path: str, lanes: int, window: int) -> None:
    """In a process of its own: time to the first window, and memory before and after 200 of them."""
    for file in Path(path).rglob("*.bin"):  # as after a reboot: nothing of the store is in memory
        with file.open("rb") as opened_file:
            os.posix_fadvise(opened_file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before, began = own_memory(), time.perf_counter()
    store = open_store(path)
    opened = time.perf_counter() - began
    collator = LaneCollator(Corpus([store]), lanes=lanes, window=window, seed=0)
    collator.next_window()
    first = time.perf_counter() - began
    for _ in range(200):
        collator.next_window()
    print(
        f"not cached: opened in {opened:.3f} s, first window after {first:.3f} s; memory beside the mapped file:"
        f" {before:.0f} MiB of imports, {own_memory() - before:.1f} MiB more after 200 windows"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--store")
    parser.add_argument("--synthetic", metavar="DIR")
    parser.add_argument("--lanes", type=int, default=4096)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--first-window", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.first_window:
        first_window(args.store, args.lanes, args.window)
        return
    path = args.synthetic or args.store
    if args.synthetic:
        make_synthetic(Path(args.synthetic))
    elif path is None:
        path = str(Path(tempfile.mkdtemp()) / "stdlib")
        prepare(PrepareOptions(source=["stdlib"], out=path))
    store = open_store(path)
    print(f"{store.num_documents:,} documents, {store.num_tokens:,} tokens; {args.lanes} lanes, window {args.window}")
    command = [sys.executable, __file__, "--store", path, "--lanes", str(args.lanes), "--window", str(args.window)]
    subprocess.run([*command, "--first-window"], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    contenders = [ours, per_lane_loop, stateful_loader, transformer_xl_shuffled, fastai_chunks]
    if store.num_tokens < 1 << 28:
        contenders.append(transformer_xl_ordered)
    own = 0.0
    for make in contenders:
        rate = speed(make, store, args.lanes, args.window, args.seconds)
        own = own or rate
        note = "  (a copy of memory: no shuffling, no resets, no position)" if make is transformer_xl_ordered else ""
        print(f"{make.__name__:24} {rate / 1e6:10.2f} M tokens/s   ours is {own / rate:8.1f} times as fast{note}")


if __name__ == "__main__":
    main()
