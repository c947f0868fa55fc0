"""The verb `prepare`: its arguments and what it prints."""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path

from gptb_ds.commands.arguments import options_of
from gptb_ds.config import below_one
from gptb_ds.data.describe import describe_store
from gptb_ds.data.documents import verify_store
from gptb_ds.data.prepare import PrepareOptions, prepare


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `gptb-ds prepare`."""
    add = parser.add_argument
    add(
        "--source",
        nargs="+",
        metavar="PATH_OR_NAME",
        help="text, .jsonl, .csv, .parquet and .arrow files (gzip, zstd, bzip2, xz too), folders, globs, a saved or "
        "hub data set, "
        "stdlib: the Python standard library's own sources, without its tests, or task:NAME: a generated task",
    )
    add("--tokenizer", default="bytes", help="bytes, bpe:SIZE (trained on the corpus), a store, a folder or a hub name")
    add("--out", metavar="DIR", help="folder of the new store")
    add("--text-field", default="text", help="field of a record that holds its text")
    add("--prompt-field", help="field of text that is read before it and does not count in the loss")
    add("--ids-field", help="field of token ids, for tokenised records (input_ids when there are labels or a mask)")
    add("--labels-field", help="field of labels: the token ids, -100 where a token does not count in the loss")
    add("--loss-mask-field", help="field of 0 and 1: 1 where a token counts in the loss")
    add(
        "--separator",
        help="text that parts the documents inside text files, with the escapes \\n, \\r, \\t (default: a file is one)",
    )
    add("--holdout", type=float, default=0.05, help="share of the documents held out for evaluation (default 0.05)")
    add("--split", help="split of a data set that is read (default train)")
    add("--name", help="configuration of a data set")
    add("--streaming", action="store_true", help="read a data set as a stream instead of downloading it whole")
    add("--on-error", choices=("stop", "skip"), default="stop", help="at a record that cannot be used (default stop)")
    add("--num-proc", type=int, help="processes that tokenise (default: all processors from 32 MiB on)")
    add("--overwrite", action="store_true", help="replace a store at --out that was made from other inputs")
    add("--describe", metavar="DIR", help="print what a store holds instead of making one")
    add("--verify", action="store_true", help="with --describe: read the whole store and check every byte")
    add("--lanes", type=int, help="with --describe: windows an epoch gives with so many lanes")
    add("--window", type=int, default=16, help="with --describe: columns of a window (default 16)")
    add("--max-document-tokens", type=int, help="with --describe: longer documents are cut into pieces")


def run(args: argparse.Namespace) -> int:
    """Makes a store, or describes one. Raises ValueError, a line for each error, for what the user has to change."""
    if not args.describe:
        prepare(options_of(PrepareOptions, args), _say)
        return 0
    if errors := below_one(args, "lanes", "window", "max_document_tokens"):
        raise ValueError("\n".join(errors))
    if args.verify:
        verify_store(args.describe)
    print(describe_store(Path(args.describe), args.lanes, args.window, args.max_document_tokens))
    if args.verify:
        print("verified: every byte is as it was written")
    return 0


def _say(text: str) -> None:
    """Prints a line, or does not (`| head`, a full disk): the store is made all the same."""
    with suppress(OSError):
        print(text, flush=True)
