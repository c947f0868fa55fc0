"""The making of a store's content: raw records -> tokens in parallel -> the two splits, with what was left out."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptb_ds.data import tokenization
from gptb_ds.data.documents import SPLITS
from gptb_ds.data.encoding import Encoder, Fields, held_out_key, read_documents
from gptb_ds.data.sources import Reading, Source, open_source
from gptb_ds.data.writer import SplitWriter, write_manifest

_KEYS = 1 << 63
_PARALLEL_FROM = 32 << 20  # bytes of records below which more processes cost more than they save
_BATCH = 128  # the most records of a batch, and
_BATCH_BYTES = 32 << 20  # about the most bytes of one with several records
_SHOWN = 5  # skipped records that are named; the others are only counted


def build(
    work: Path,
    sources: list[Source],
    reading: Reading,
    fields: Fields,
    *,
    tokenizer: str,
    holdout: float,
    stop_on_error: bool,
    processes: int | None,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Makes a whole store in the empty folder `work` and returns its manifest, `facts` included.

    A document is held out when the hash of its content falls below the share `holdout`, so that equal documents fall on
    the same side and no order matters; at least one is where there are two. Raises ValueError, in one line, for what
    the user has to change.
    """
    import datasets

    datasets.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    cache = work / "cache"
    raw = [open_source(source, reading, fields.names(), cache) for source in sources]
    texts = _training_texts(sources, raw, fields, holdout)
    made = tokenization.load(tokenizer, texts)
    encoded, encoder = [], Encoder(made, fields, "", stop_on_error)
    for number, (source, data) in enumerate(zip(sources, raw, strict=True)):
        if not len(data):
            continue
        encoder = Encoder(made, fields, source.name, stop_on_error)
        encoded.append(_encode(data, encoder, processes or _processes(data), cache / f"encoded-{number}.arrow"))
    splits, skipped = _write(encoded, work, encoder, fields.weighted, holdout)
    if not splits["train"]["documents"]:
        left_out = ", ".join(f"{count} {kind}" for kind, count in skipped.items())
        raise ValueError(
            f"--source {' '.join(facts['sources'])}: nothing to train on, the corpus is empty ({left_out})"
        )
    made.save_pretrained(work / "tokenizer")
    shutil.rmtree(cache)
    return write_manifest(
        work,
        {
            **facts,
            "tokenizer": tokenization.tokenizer_name(made),
            "tokenizer_fingerprint": tokenization.fingerprint(made),
            "vocab_size": encoder.vocab_size,
            "eot_id": encoder.eot,
            "dtype": encoder.dtype,
            "weighted": fields.weighted,
            "splits": splits,
            "skipped": skipped,
        },
    )


def _processes(data: Any) -> int:
    return (os.cpu_count() or 1) if data.data.nbytes >= _PARALLEL_FROM else 1


def _batch_size(data: Any) -> int:
    """Records of a batch: few when they are large, so that memory holds a batch whatever they are."""
    return max(1, min(_BATCH, _BATCH_BYTES * len(data) // max(1, data.data.nbytes)))


def _encode(data: Any, encoder: Encoder, processes: int, cache: Path) -> Any:
    import datasets

    cache.parent.mkdir(exist_ok=True)
    batch = _batch_size(data)
    value = datasets.Value
    columns = {
        "tokens": value("large_binary"),
        "counted": value("large_binary"),
        "bytes": value("int64"),
        "key": value("int64"),
        "error": value("string"),
    }
    return data.map(
        encoder,
        batched=True,
        batch_size=batch,
        writer_batch_size=batch,
        with_indices=True,
        remove_columns=data.column_names,
        features=datasets.Features(columns),
        num_proc=min(processes, len(data)) if processes > 1 else None,
        load_from_cache_file=False,
        cache_file_name=str(cache),
        new_fingerprint=cache.stem,
        desc=f"tokenising {encoder.name}",
    )


def _training_texts(sources: list[Source], raw: list[Any], fields: Fields, holdout: float) -> Iterator[str]:
    """The texts that a tokenizer may be trained on: not those held out."""
    for source, data in zip(sources, raw, strict=True):
        size = _batch_size(data)
        for first in range(0, len(data), size):
            batch = data[first : first + size]
            indices = list(range(first, min(first + size, len(data))))
            for document in read_documents(batch, indices, fields, source.name):
                if not document.error and held_out_key(document.content()) >= holdout * _KEYS:
                    yield document.prompt
                    yield document.text


def _write(
    encoded: list[Any], work: Path, encoder: Encoder, weighted: bool, holdout: float
) -> tuple[dict[str, Any], dict[str, int]]:
    """Writes both splits; what the manifest says of them, and of the records that were left out."""
    limit = _limit(encoded, holdout)
    writers = {split: SplitWriter(work / split, encoder.dtype, encoder.eot, weighted) for split in SPLITS}
    skipped = {"empty documents": 0, "records with errors": 0}
    for row in _rows(encoded, ["tokens", "counted", "bytes", "key", "error"]):
        tokens, counted, size, key, error = row
        if error is not None:
            skipped["records with errors"] += 1
            if skipped["records with errors"] <= _SHOWN:
                print(f"left out: {error}")
        elif not tokens:
            skipped["empty documents"] += 1
        else:
            writers["validation" if key < limit else "train"].add(tokens, counted, size)
    return {split: writers[split].close() for split in SPLITS}, skipped


def _limit(encoded: list[Any], holdout: float) -> float:
    """Documents with a key below it are held out: at least one, and not all, where there are two."""
    if not holdout:
        return 0
    lowest, highest = _KEYS, -1
    for tokens, key, error in _rows(encoded, ["tokens", "key", "error"]):
        if tokens and error is None:
            lowest, highest = min(lowest, key), max(highest, key)
    return max(min(holdout * _KEYS, highest), lowest + 1) if lowest < highest else 0


def _rows(encoded: list[Any], columns: list[str]) -> Iterator[tuple[Any, ...]]:
    for data in encoded:
        for table in data.select_columns(columns).with_format("arrow").iter(1000):
            yield from zip(*(table[column].to_pylist() for column in columns), strict=True)
