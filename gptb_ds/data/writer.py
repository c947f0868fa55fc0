"""The writing of a store: token files, then the manifest, in a folder that becomes the store in one rename."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from gptb_ds.data.documents import (
    FORMAT,
    SPLITS,
    SplitFacts,
    StoreContent,
    StoreManifest,
    file_facts,
    manifest_checksum,
)


class SplitWriter:
    """Appends the documents of one split to its files."""

    def __init__(self, folder: Path, dtype: str, eot: int, weighted: bool, own_targets: bool = False) -> None:
        folder.mkdir(parents=True)
        self.dtype = np.dtype(dtype)
        self._eot = np.array([eot], dtype=dtype).tobytes()
        self._tokens = (folder / "tokens.bin").open("wb")
        self._offsets = (folder / "offsets.bin").open("wb")
        self._counted = (folder / "counted.bin").open("wb") if weighted else None
        self._targets = (folder / "targets.bin").open("wb") if own_targets else None
        self._closing = b"\0"  # whether the EOT that closes the document before counts
        self._length = 0
        self.documents = self.tokens = self.bytes = self.longest = self.counted = 0
        self.histogram: dict[int, int] = {}

    def add(self, tokens: bytes, counted: bytes | None, size: int, targets: bytes | None = None) -> None:
        """One document: its n ids in the store's dtype, which targets count (n+1; None = all), bytes of text.

        `targets`: n+1 ids, where they are not the tokens that follow.
        """
        count = len(tokens) // self.dtype.itemsize
        self._offsets.write(self._length.to_bytes(8, "little"))
        self._tokens.write(self._eot)
        self._tokens.write(tokens)
        if self._targets is not None:
            assert targets is not None and len(targets) == len(tokens) + len(self._eot)
            self._targets.write(targets)
        if self._counted is not None:
            counted = b"\1" * (count + 1) if counted is None else counted
            assert len(counted) == count + 1
            self._counted.write(self._closing + counted[:-1])
            self._closing = counted[-1:]
        self.counted += count + 1 if counted is None else counted.count(1)
        self._length += count + 1
        self.documents, self.tokens, self.bytes = self.documents + 1, self.tokens + count, self.bytes + size
        self.longest = max(self.longest, count)
        self.histogram[count.bit_length()] = self.histogram.get(count.bit_length(), 0) + 1

    def close(self) -> SplitFacts:
        """Ends the files, on disk, and returns what the manifest says of the split."""
        self._offsets.write(self._length.to_bytes(8, "little"))
        self._tokens.write(self._eot)
        if self._counted is not None:
            self._counted.write(self._closing)
        if self._targets is not None:
            self._targets.write(self._eot)
        for file in (self._tokens, self._offsets, self._counted, self._targets):
            if file is not None:
                _sync(file)
                file.close()
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "counted": self.counted,
            "longest": self.longest,
            # Documents by length: below 1, 2, 4, 8, .. tokens.
            "histogram": [self.histogram.get(bits, 0) for bits in range(max(self.histogram, default=-1) + 1)],
        }


class SplitWriters:
    """Both splits: documents with a key below `limit` are held out.

    At least one document is held out, and one is not, where there are two different ones: those with the lowest key, or
    with the highest. Which these are is known at the end alone, so then the split that has everything is written again.
    That happens to corpora of few documents only, and spares all others a second copy of the corpus on the disk.
    """

    def __init__(
        self, folder: Path, dtype: str, eot: int, weighted: bool, limit: int, own_targets: bool = False
    ) -> None:
        self._new = lambda path: SplitWriter(path, dtype, eot, weighted, own_targets)
        self._folder, self._limit = folder, limit
        self._train, self._held_out = (self._new(folder / split) for split in SPLITS)
        self._lowest, self._highest = _Extreme(), _Extreme()

    def add(self, tokens: bytes, counted: bytes | None, size: int, key: int, targets: bytes | None = None) -> None:
        """One document (see `SplitWriter.add`)."""
        if key < self._limit:
            self._highest.saw(-key, self._held_out.documents, size)
            self._held_out.add(tokens, counted, size, targets)
        else:
            self._lowest.saw(key, self._train.documents, size)
            self._train.add(tokens, counted, size, targets)

    def close(self) -> dict[str, SplitFacts]:
        """Ends the files, on disk, and returns what the manifest says of each split."""
        facts = dict(zip(SPLITS, (self._train.close(), self._held_out.close()), strict=True))
        train, held_out = SPLITS
        if not facts[held_out]["documents"] and self._limit and self._lowest.several:
            return self._move(train, held_out, self._lowest)
        if not facts[train]["documents"] and facts[held_out]["documents"]:
            return self._move(held_out, train, self._highest)
        return facts

    def _move(self, full: str, empty: str, moved: _Extreme) -> dict[str, SplitFacts]:
        """Writes the split that has everything again, without the documents that belong in the other."""
        old = self._folder / f"{full}.old"
        (self._folder / full).rename(old)
        shutil.rmtree(self._folder / empty)
        writers = {split: self._new(self._folder / split) for split in SPLITS}
        sizes = dict(zip(moved.documents, moved.sizes, strict=True))
        total = self._train.bytes + self._held_out.bytes
        for number, (tokens, counted, targets) in enumerate(_documents_of(old, writers[full])):
            writers[empty if number in sizes else full].add(tokens, counted, sizes.get(number, 0), targets)
        writers[full].bytes = total - writers[empty].bytes
        shutil.rmtree(old)
        return {split: writer.close() for split, writer in writers.items()}


class _Extreme:
    """The documents with the lowest key so far."""

    def __init__(self) -> None:
        self.key: int | None = None
        self.documents: list[int] = []
        self.sizes: list[int] = []
        self.several = False  # whether there is another key

    def saw(self, key: int, document: int, size: int) -> None:
        self.several |= self.key is not None and key != self.key
        if self.key is None or key < self.key:
            self.key, self.documents, self.sizes = key, [], []
        if key == self.key:
            self.documents.append(document)
            self.sizes.append(size)


def _documents_of(folder: Path, writer: SplitWriter) -> Iterator[tuple[bytes, bytes | None, bytes | None]]:
    """Tokens, counted targets and targets of its own of each document that a `SplitWriter` has written."""
    offsets = np.memmap(folder / "offsets.bin", np.int64, "r")
    tokens = np.memmap(folder / "tokens.bin", writer.dtype, "r")
    file, other = folder / "counted.bin", folder / "targets.bin"
    counted = np.memmap(file, np.uint8, "r") if file.exists() else None
    targets = np.memmap(other, writer.dtype, "r") if other.exists() else None
    for start, end in itertools.pairwise(offsets.tolist()):
        yield (
            tokens[start + 1 : end].tobytes(),
            None if counted is None else counted[start + 1 : end + 1].tobytes(),
            None if targets is None else targets[start:end].tobytes(),
        )


def write_manifest(folder: Path, content: StoreContent) -> StoreManifest:
    """Completes the store in `folder`: sizes and checksums of all its files, fingerprint, manifest; returns it.

    The fingerprint names the content (tokens, documents, tokenizer), not where or when it was prepared.
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    facts = {path.relative_to(folder).as_posix(): file_facts(path) for path in files}
    print_of: list[int | str] = [content["eot_id"], content["vocab_size"], content["tokenizer_fingerprint"]]
    print_of += [facts[name]["sha256"] for name in facts if name.split("/")[0] in SPLITS]
    manifest: StoreManifest = {
        "format": FORMAT,
        **content,
        "files": facts,
        "fingerprint": hashlib.sha256(json.dumps(print_of).encode()).hexdigest()[:32],
        "manifest_checksum": "",
    }
    manifest["manifest_checksum"] = manifest_checksum(manifest)
    with (folder / "store.json").open("w") as file:
        json.dump(manifest, file, indent=1)
        _sync(file)
    return manifest


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A fresh folder beside `out` that takes its place when the block ends well, and vanishes when it does not.

    What a killed process has left there goes first. The caller holds the lock of `out`.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.parent / f".{out.name}.partial"
    old = out.parent / f".{out.name}.old"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        yield work
        shutil.rmtree(old, ignore_errors=True)
        if out.is_dir() and any(out.iterdir()):
            out.rename(old)
        work.replace(out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sync(file: IO[bytes] | IO[str]) -> None:
    file.flush()
    os.fsync(file.fileno())
