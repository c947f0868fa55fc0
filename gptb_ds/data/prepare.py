"""Owns the verb `prepare`: sources -> a tokenised, memory-mapped document store; and `--describe` of one."""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from filelock import FileLock

from gptb_ds.arguments import below_one
from gptb_ds.data import tokenization
from gptb_ds.data.build import build
from gptb_ds.data.corpus import Reading, Source, find_sources
from gptb_ds.data.describe import describe
from gptb_ds.data.documents import FORMAT, SPLITS, read_manifest, verify
from gptb_ds.data.encoding import Fields
from gptb_ds.data.writer import replacing

# The options that a store's content depends on.
_CONTENT_OPTIONS = (
    *("tokenizer", "text_field", "prompt_field", "ids_field", "labels_field", "loss_mask_field"),
    *("separator", "holdout", "split", "name", "on_error"),
)


def add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `gptb-ds prepare`."""
    add = parser.add_argument
    add(
        "--source",
        nargs="+",
        metavar="PATH_OR_NAME",
        help="text, .jsonl, .csv, .parquet and .arrow files (.gz, .zst too), folders, globs, a saved or hub data set, "
        "or stdlib: the Python standard library's own sources, without its tests",
    )
    add("--tokenizer", default="bytes", help="bytes, bpe:SIZE (trained on the corpus), a store, a folder or a hub name")
    add("--out", metavar="DIR", help="folder of the new store")
    add("--text-field", default="text", help="field of a record that holds its text")
    add("--prompt-field", help="field of text that is read before it and does not count in the loss")
    add("--ids-field", help="field of token ids, for tokenised records (input_ids when there are labels or a mask)")
    add("--labels-field", help="field of labels: the token ids, -100 where a token does not count in the loss")
    add("--loss-mask-field", help="field of 0 and 1: 1 where a token counts in the loss")
    add("--separator", help="text that parts the documents inside text files (default: a file is a document)")
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


def run_prepare(args: argparse.Namespace) -> int:
    """`gptb-ds prepare`. Returns 0; raises ValueError, a line for each error, for what the user has to change."""
    if args.describe:
        if errors := below_one(args, "lanes", "window", "max-document-tokens"):
            raise ValueError("\n".join(errors))
        if args.verify:
            verify(args.describe)
        print(describe(Path(args.describe), args.lanes, args.window, args.max_document_tokens))
        if args.verify:
            print("verified: every byte is as it was written")
        return 0
    errors = [f"--{name}: required" for name in ("source", "out") if not getattr(args, name)]
    if not 0 <= args.holdout < 1:
        errors.append(f"--holdout {args.holdout}: must be at least 0 and below 1")
    if args.labels_field and args.loss_mask_field:
        errors.append("--labels-field and --loss-mask-field: give one of them")
    if args.prompt_field and (args.ids_field or args.labels_field or args.loss_mask_field):
        errors.append("--prompt-field: is for text; for tokenised records give --loss-mask-field")
    if args.separator == "":
        errors.append("--separator: must not be empty")
    errors += below_one(args, "num-proc")
    try:
        tokenization.check_spec(args.tokenizer)
    except ValueError as error:
        errors.append(str(error))
    if errors:
        raise ValueError("\n".join(errors))
    prepare(args)
    return 0


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Makes the store of `args` unless it is there already; returns its manifest. Safe to run twice at once."""
    reading = Reading(args.split, args.name, args.streaming, args.separator)
    sources = find_sources(args.source, reading)
    recipe = _recipe(args, sources)
    out = Path(args.out)
    _check_place(out, args.source)
    with FileLock(out.parent / f".{out.name}.lock"):
        manifest = _existing(out, recipe, args.overwrite)
        if manifest is not None:
            print(f"{out} is up to date: {_summary(manifest)}")
            return manifest
        import datasets  # noqa: F401  (seconds: before anything is written that an interruption would have to remove)

        with replacing(out) as work:
            manifest = build(
                work,
                sources,
                reading,
                _fields(args),
                tokenizer=args.tokenizer,
                holdout=args.holdout,
                stop_on_error=args.on_error == "stop",
                processes=args.num_proc,
                facts={"recipe": recipe, "sources": args.source},
            )
    print(f"{out}: {_summary(manifest)}")
    for kind, count in manifest["skipped"].items():
        if count:
            print(f"left out: {count} {kind}")
    for warning in _warnings(manifest, args.holdout):
        print(f"warning: {warning}")
    return manifest


def _warnings(manifest: dict[str, Any], holdout: float) -> list[str]:
    train, held_out = (manifest["splits"][split] for split in SPLITS)
    if holdout and not held_out["documents"]:
        return ["nothing is held out: it takes two different documents (--separator parts a text file into several)"]
    share = held_out["tokens"] / (train["tokens"] + held_out["tokens"])
    if share > 2 * holdout and share > 0.2:
        return [f"{share:.0%} of the tokens are held out, in {held_out['documents']} of few documents"]
    return []


def _check_place(out: Path, sources: list[str]) -> None:
    """Makes the folder that `out` comes into. Raises ValueError when it can't be written or `out` lies in a source."""
    for source in map(Path, sources):
        if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
            raise ValueError(f"--out {out}: lies in --source {source}, which would read it; choose a folder outside")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written ({error.strerror}); choose another folder") from None


def _recipe(args: argparse.Namespace, sources: list[Source]) -> str:
    """Equal when the same files (path, size, time of change) are prepared with the same options."""
    files = [[source.kind, source.name, [_stamp(file) for file in source.files]] for source in sources]
    own = tokenization.needs_no_files(args.tokenizer)
    tokenizer = [] if own else [_stamp(file) for file in sorted(Path(args.tokenizer).rglob("*")) if file.is_file()]
    content = [FORMAT, files, tokenizer, [getattr(args, name) for name in _CONTENT_OPTIONS]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _stamp(file: Path) -> list[Any]:
    status = file.stat()
    return [str(file.absolute()), status.st_size, status.st_mtime_ns]


def _existing(out: Path, recipe: str, overwrite: bool) -> dict[str, Any] | None:
    """The manifest of the store that is wanted, when it is there. Raises ValueError when something else is."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        manifest = read_manifest(out)
    except ValueError:
        if overwrite and (out / "store.json").is_file():
            return None
        raise ValueError(
            f"--out {out}: exists and is not a whole document store; choose another folder or remove it"
        ) from None
    whole = all((out / n).is_file() and (out / n).stat().st_size == f["size"] for n, f in manifest["files"].items())
    if manifest["recipe"] == recipe and whole:
        return manifest
    if overwrite:
        named = {out / name for name in (*manifest["files"], "store.json")}
        foreign = sorted(p for p in out.rglob("*") if p.is_file() and p not in named)
        if foreign:
            raise ValueError(
                f"--out {out}: has files that are not the store's, such as {foreign[0]}; move them away first"
            )
        return None
    reason = "was made from other inputs or options" if whole else "is damaged"
    raise ValueError(f"--out {out}: the store there {reason}; choose another folder or add --overwrite")


def _fields(args: argparse.Namespace) -> Fields:
    masked = args.labels_field or args.loss_mask_field
    ids = args.ids_field or ("input_ids" if masked else None)
    return Fields(args.text_field, args.prompt_field, ids, args.labels_field, args.loss_mask_field)


def _summary(manifest: dict[str, Any]) -> str:
    train, held_out = (manifest["splits"][split] for split in SPLITS)
    return (
        f"{train['documents']:,} documents of {train['tokens']:,} tokens to train on,"
        f" {held_out['documents']:,} of {held_out['tokens']:,} held out; tokenizer {manifest['tokenizer']}"
    )
