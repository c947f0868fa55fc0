"""Owns small document stores for tests: token ids given by hand, written and opened by the real code."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gptb_ds.data.documents import DocumentStore, open_store
from gptb_ds.data.writer import SplitWriter, write_manifest

EOT = 1
VOCAB = 300
_numbers = itertools.count()


def numbered_documents(lengths: Sequence[int], vocab: int = VOCAB) -> list[list[int]]:
    """Documents of these lengths; neighbouring tokens differ, and documents differ where they can."""
    numbers = (2 + n % (vocab - 2) for n in itertools.count())
    return [list(itertools.islice(numbers, length)) for length in lengths]


def write_store(
    folder: Path,
    documents: Sequence[Sequence[int]],
    *,
    held_out: Sequence[Sequence[int]] = (),
    counted: Sequence[Sequence[int]] | None = None,
    vocab: int = VOCAB,
    tokenizer: str = "numbers",
) -> Path:
    """A store of these training documents in a new folder below `folder`. `counted`: n+1 flags for each of them."""
    path = folder / f"store-{next(_numbers)}"
    dtype = "uint16" if vocab <= 1 << 16 else "uint32"
    splits = {}
    for split, texts in (("train", documents), ("validation", held_out)):
        writer = SplitWriter(path / split, dtype, EOT, counted is not None)
        for number, tokens in enumerate(texts):
            flags = bytes(counted[number]) if counted is not None and split == "train" else None
            writer.add(np.asarray(tokens, dtype=dtype).tobytes(), flags, len(tokens))
        splits[split] = writer.close()
    facts = {"recipe": "", "sources": ["test"], "tokenizer": tokenizer, "tokenizer_fingerprint": tokenizer}
    facts |= {"vocab_size": vocab, "eot_id": EOT, "dtype": dtype, "weighted": counted is not None}
    write_manifest(path, {**facts, "splits": splits, "skipped": {}})
    return path


def make_store(folder: Path, documents: Sequence[Sequence[int]], **options: object) -> DocumentStore:
    """`write_store`, opened for training."""
    return open_store(write_store(folder, documents, **options))  # type: ignore[arg-type]
