"""The making of a store's content: raw records -> tokens, in parallel -> the two splits, with what was left out."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gptb_ds.data import tokenization
from gptb_ds.data.documents import Origin, StoreManifest
from gptb_ds.data.encoding import Encoded, Encoder, Fields, held_out_key, read_documents
from gptb_ds.data.long_texts import parts, sample
from gptb_ds.data.readers import Records
from gptb_ds.data.record import Record, Tally
from gptb_ds.data.sources import shown
from gptb_ds.data.tasks import Task
from gptb_ds.data.writer import SplitWriters, write_manifest

_KEYS = 1 << 63
_PARALLEL_FROM = 32 << 20  # bytes of records below which more processes cost more than they save
_BATCH = 128  # the most records of a batch, and
_BATCH_BYTES = 8 << 20  # the bytes of records at which it is full
# Bytes of text that a BPE is trained on. In text of random letters each MiB takes 130 MiB of memory and 6 seconds.
_TRAINED_ON = 32 << 20
_PROCESSES_A_CORE = 4  # more of them only take memory
_SHOWN = 5  # skipped records that are named; the others are only counted
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """How a store is made. `tokenizer`: as `--tokenizer` names it; `holdout`: a share; `processes` None: what pays."""

    tokenizer: str
    fields: Fields
    holdout: float
    stop_on_error: bool
    processes: int | None


def build(work: Path, records: Records, plan: Plan, origin: Origin, say: Say) -> StoreManifest:
    """Makes a whole store in the empty folder `work` and returns its manifest, `origin` included.

    A document is held out when the hash of its content falls below the share `holdout`, so that equal documents fall on
    the same side and no order matters; at least one is where there are two. Raises ValueError, in one line, for what
    the user has to change.
    """
    records.open()
    say(f"reading {records.tally.kinds()}")
    _check_room(records, plan.tokenizer, work, say)
    made = tokenization.load(plan.tokenizer, _training_texts(records, plan))
    encoder = Encoder(made, plan.fields, plan.stop_on_error)
    _save_tokenizer(made, work / "tokenizer")
    cores = os.cpu_count() or 1
    processes = min(plan.processes or (cores if records.size >= _PARALLEL_FROM else 1), _PROCESSES_A_CORE * cores)
    writers = SplitWriters(work, encoder.dtype, encoder.eot, plan.fields.weighted, int(plan.holdout * _KEYS))
    skipped = {"empty documents": 0, "records with errors": 0}
    for row in _encode(encoder, records, processes):
        if row.error is not None:
            skipped["records with errors"] += 1
            if skipped["records with errors"] <= _SHOWN:
                say(f"left out: {row.error}")
        elif not row.tokens:
            skipped["empty documents"] += 1
        else:
            writers.add(row.tokens, row.counted, row.size, row.key)
    splits = writers.close()
    _say_surprises(records.tally, records.reading.separator, say)
    if not splits["train"]["documents"]:
        left_out = ", ".join(f"{count} {kind}" for kind, count in skipped.items())
        raise ValueError(
            f"--source {' '.join(origin['sources'])}: nothing to train on, the corpus is empty ({left_out})"
        )
    if not splits["train"]["counted"]:
        raise ValueError(
            f"--source {' '.join(origin['sources'])}: no target counts in the loss, so there is nothing to learn;"
            " check the labels, the mask or the prompt's field"
        )
    shutil.rmtree(records.cache, ignore_errors=True)
    return write_manifest(
        work,
        {
            **origin,
            "tokenizer": tokenization.tokenizer_name(made),
            "tokenizer_fingerprint": tokenization.fingerprint(made),
            "vocab_size": encoder.vocab_size,
            "eot_id": encoder.eot,
            "dtype": encoder.dtype,
            "weighted": plan.fields.weighted,
            "read_as": records.tally.kinds(),
            "splits": splits,
            "skipped": skipped,
        },
    )


def build_task(work: Path, task: Task, holdout: float, origin: Origin, say: Say) -> StoreManifest:
    """Makes the store of a generated task in the empty folder `work` and returns its manifest, `origin` included."""
    made = task.tokenizer()
    vocab_size, eot, weighted = len(task.symbols), 0, not task.is_automaton
    needed, free = task.count * (task.min_length + task.length), shutil.disk_usage(work).free  # two bytes a token
    if needed > free:
        raise ValueError(
            f"--source task:{task.name}: {task.count:,} documents need at least {needed / 1e9:,.0f} GB and the disk of"
            f" --out has {free / 1e9:,.1f} GB left; lower count"
        )
    say(f"generating {task.count:,} documents of {task.min_length} to {task.length}")
    _save_tokenizer(made, work / "tokenizer")
    writers = SplitWriters(work, "uint16", eot, weighted, int(holdout * _KEYS), own_targets=task.is_automaton)
    for document in task.documents():
        tokens = document.tokens.astype(np.uint16).tobytes()
        targets = None if document.targets is None else document.targets.astype(np.uint16).tobytes()
        counted = None if document.counted is None else document.counted.tobytes()
        writers.add(tokens, counted, 0, held_out_key(tokens), targets)
    return write_manifest(
        work,
        {
            **origin,
            "tokenizer": f"task:{task.name} ({vocab_size} tokens)",
            "tokenizer_fingerprint": tokenization.fingerprint(made),
            "vocab_size": vocab_size,
            "eot_id": eot,
            "dtype": "uint16",
            "weighted": weighted,
            "own_targets": task.is_automaton,
            "read_as": "a generated task",
            "splits": writers.close(),
            "skipped": {},
        },
    )


def _check_room(records: Records, tokenizer: str, work: Path, say: Say) -> None:
    """Raises ValueError when the disk is certainly too small for the store, warns when it may be.

    Nothing but the store is written: two bytes for each byte of text with the byte tokenizer, about one with others.
    Other formats than text hold more than the text, or less where they are compressed.
    """
    free = shutil.disk_usage(work).free
    needed = records.size * (2 if tokenizer == "bytes" else 1)
    if needed > free:
        text = f"the store needs about {needed / 1e9:,.1f} GB and its disk has {free / 1e9:,.1f} GB left"
        if tokenizer == "bytes" and records.plain_text:
            raise ValueError(f"--out {shown(work.parent)}: {text}; make room, or choose another place")
        say(f"warning: {text}")


def _training_texts(records: Records, plan: Plan) -> Iterator[str]:
    """The texts that a tokenizer is trained on: none that is held out, and of a large corpus a sample."""

    def texts() -> Iterator[str]:
        for document in read_documents(records, plan.fields):
            if not document.error and held_out_key(document.content()) >= plan.holdout * _KEYS:
                yield from parts(document.prompt)
                yield from parts(document.text)

    return sample(texts(), _TRAINED_ON, held_out_key)


def _save_tokenizer(tokenizer: tokenization.Tokenizer, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # the library tokenizers raises nothing more special, for a full disk as well
        raise OSError(None, str(error), str(folder)) from None


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Neighbouring records in lists that are bounded by number and by size: memory grows with neither."""
    batch: list[Record] = []
    size = 0
    for record in records:
        if batch and (len(batch) == _BATCH or size + record.size > _BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(record)
        size += record.size
    if batch:
        yield batch


def _encode(encoder: Encoder, records: Records, processes: int) -> Iterator[Encoded]:
    """The records' tokens, in order."""
    with tqdm(unit=" records", desc="tokenising", disable=None, leave=False) as progress:
        for rows in _in_parallel(encoder, _batches(records), processes):
            progress.update(len(rows))
            yield from rows


def _in_parallel(encoder: Encoder, batches: Iterator[list[Record]], processes: int) -> Iterator[list[Encoded]]:
    """What the encoder makes of each batch, in order; a few batches are in work for each process, and no more."""
    if processes == 1:
        yield from map(encoder, batches)
        return
    pool = ProcessPoolExecutor(processes, initializer=_begin_work, initargs=(encoder,))
    waiting: deque[Future[list[Encoded]]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(_work, batch))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise ValueError("a process that tokenises was killed, by lack of memory perhaps; try --num-proc 1") from None
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: Encoder


def _begin_work(encoder: Encoder) -> None:
    """What a process of the pool does first: it leaves Ctrl-C to its parent, and ends when that is gone."""
    global _encoder
    _encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each processor already
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _work(batch: list[Record]) -> list[Encoded]:
    return _encoder(batch)


def _say_surprises(tally: Tally, separator: str | None, say: Say) -> None:
    """What may not be as it was meant."""
    if tally.unparted:
        files = f"{len(tally.unparted):,} of {len(tally.unparted) + tally.parted:,} text files"
        say(f"warning: the separator {separator!r} occurs nowhere in {files}, such as {tally.unparted[0]}")
    if tally.json_as_text:
        many = f"{len(tally.json_as_text):,} text files, such as {tally.json_as_text[0]},"
        say(f"warning: {many} hold JSON lines and were read as text; call them .jsonl to have their records read")
    if tally.described:
        many = f"{len(tally.described):,} files beside the records, such as {tally.described[0]},"
        say(f"warning: {many} were read as text to train on; name the records' files alone if they are not meant")
    if tally.with_nul:
        many = f"{len(tally.with_nul):,} text files, such as {tally.with_nul[0]},"
        say(f"warning: {many} hold bytes of 0; if they are no text, leave them out")
    if tally.doubtful_rows:
        many = f"{len(tally.doubtful_rows):,} rows of tables, such as {tally.doubtful_rows[0]},"
        say(f"warning: {many} span lines that look like rows; if a quotation mark is stray there, double it")
    if tally.headers_again:
        many = f"{len(tally.headers_again):,} rows of tables, such as {tally.headers_again[0]},"
        say(f"warning: {many} repeat the header and are left out")
    if tally.rows_over_lines:
        say(f"{tally.rows_over_lines:,} rows of tables hold values that span lines")
