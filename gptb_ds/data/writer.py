"""The writing of a store: token files, then the manifest, in a folder that becomes the store in one rename."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from gptb_ds.data.documents import FORMAT, SPLITS, file_facts, manifest_checksum


class SplitWriter:
    """Appends the documents of one split to its files."""

    def __init__(self, folder: Path, dtype: str, eot: int, weighted: bool) -> None:
        folder.mkdir(parents=True)
        self._item = np.dtype(dtype).itemsize
        self._eot = np.array([eot], dtype=dtype).tobytes()
        self._tokens = (folder / "tokens.bin").open("wb")
        self._offsets = (folder / "offsets.bin").open("wb")
        self._counted = (folder / "counted.bin").open("wb") if weighted else None
        self._closing = b"\0"  # whether the EOT that closes the document before counts
        self._length = 0
        self.documents = self.tokens = self.bytes = self.longest = 0
        self.histogram: dict[int, int] = {}

    def add(self, tokens: bytes, counted: bytes | None, size: int) -> None:
        """One document: its n ids in the store's dtype, which targets count (n+1; None = all), bytes of text."""
        count = len(tokens) // self._item
        self._offsets.write(self._length.to_bytes(8, "little"))
        self._tokens.write(self._eot)
        self._tokens.write(tokens)
        if self._counted is not None:
            counted = b"\1" * (count + 1) if counted is None else counted
            assert len(counted) == count + 1
            self._counted.write(self._closing + counted[:-1])
            self._closing = counted[-1:]
        self._length += count + 1
        self.documents, self.tokens, self.bytes = self.documents + 1, self.tokens + count, self.bytes + size
        self.longest = max(self.longest, count)
        self.histogram[count.bit_length()] = self.histogram.get(count.bit_length(), 0) + 1

    def close(self) -> dict[str, Any]:
        """Ends the files, on disk, and returns what the manifest says of the split."""
        self._offsets.write(self._length.to_bytes(8, "little"))
        self._tokens.write(self._eot)
        if self._counted is not None:
            self._counted.write(self._closing)
        for file in (self._tokens, self._offsets, self._counted):
            if file is not None:
                _sync(file)
                file.close()
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "longest": self.longest,
            # Documents by length: below 1, 2, 4, 8, .. tokens.
            "histogram": [self.histogram.get(bits, 0) for bits in range(max(self.histogram, default=-1) + 1)],
        }


def write_manifest(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Completes the store in `folder`: sizes and checksums of all its files, fingerprint, manifest; returns it.

    The fingerprint names the content (tokens, documents, tokenizer), not where or when it was prepared.
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    manifest = {"format": FORMAT, **facts, "files": {p.relative_to(folder).as_posix(): file_facts(p) for p in files}}
    content = [manifest["eot_id"], manifest["vocab_size"], manifest["tokenizer_fingerprint"]]
    content += [manifest["files"][name]["sha256"] for name in manifest["files"] if name.split("/")[0] in SPLITS]
    manifest["fingerprint"] = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
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


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())
