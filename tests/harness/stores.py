"""Small document stores for tests: token ids given by hand, or made by `prepare`, always by the real code."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from gptb_ds.cli import parse
from gptb_ds.commands.prepare import run
from gptb_ds.data.corpus import Corpus, open_corpus
from gptb_ds.data.documents import load_tokenizer, open_store
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


def make_corpus(folder: Path, documents: Sequence[Sequence[int]], **options: object) -> Corpus:
    """`write_store`, opened for training."""
    return open_corpus([write_store(folder, documents, **options)])  # type: ignore[arg-type]


def together(corpora: Sequence[Corpus], shares: Sequence[float] | None) -> Corpus:
    """The stores of all these as one corpus."""
    return Corpus([store for corpus in corpora for store in corpus.stores], shares)


def prepare(*arguments: object) -> int:
    """`gptb-ds prepare` with these arguments."""
    return run(parse("prepare", [str(a) for a in arguments]))


def texts_of(path: Path) -> list[str]:
    """The texts of both splits, decoded with the store's own tokenizer, sorted."""
    tokenizer = load_tokenizer(path)
    found = []
    for split in ("train", "validation"):
        try:
            store = open_store(path, split)
        except ValueError:
            continue
        found += [tokenizer.decode(store.document(i).tolist()) for i in range(store.num_documents)]
    return sorted(found)


def fail(*arguments: object) -> str:
    """The one line that these arguments end in."""
    with pytest.raises(ValueError) as caught:
        prepare(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)
