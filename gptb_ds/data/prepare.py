"""From sources to a tokenised, memory-mapped document store: what is checked, and when a store is up to date."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock

from gptb_ds.config import below_one
from gptb_ds.data import tokenization
from gptb_ds.data.build import Plan, Say, build, build_task
from gptb_ds.data.documents import FORMAT, SPLITS, Origin, StoreManifest, read_store_manifest
from gptb_ds.data.encoding import Fields
from gptb_ds.data.formats import reason
from gptb_ds.data.readers import Records
from gptb_ds.data.sources import Reading, Source, find_sources, shown
from gptb_ds.data.tasks import parse_task
from gptb_ds.data.writer import replacing

# The options that a store's content depends on.
_CONTENT_OPTIONS = (
    *("tokenizer", "text_field", "prompt_field", "ids_field", "labels_field", "loss_mask_field"),
    *("separator", "holdout", "split", "name", "on_error"),
)


@dataclass(frozen=True)
class PrepareOptions:
    """What goes into a store: the options of `gptb-ds prepare`, whose help explains them.

    Raises ValueError, a line for each error, when they contradict each other.
    """

    source: Sequence[str]
    out: str
    tokenizer: str = "bytes"
    text_field: str = "text"
    prompt_field: str | None = None
    ids_field: str | None = None
    labels_field: str | None = None
    loss_mask_field: str | None = None
    separator: str | None = None
    holdout: float = 0.05
    split: str | None = None
    name: str | None = None
    streaming: bool = False
    on_error: Literal["stop", "skip"] = "stop"
    num_proc: int | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        errors = [f"--{name}: required" for name in ("source", "out") if not getattr(self, name)]
        if not 0 <= self.holdout < 1:
            errors.append(f"--holdout {self.holdout}: must be at least 0 and below 1")
        if self.labels_field and self.loss_mask_field:
            errors.append("--labels-field and --loss-mask-field: give one of them")
        if self.prompt_field and (self.ids_field or self.labels_field or self.loss_mask_field):
            errors.append("--prompt-field: is for text; for tokenised records give --loss-mask-field")
        fields = ("text_field", "prompt_field", "ids_field", "labels_field", "loss_mask_field")
        errors += [
            f"--{name.replace('_', '-')} '': is empty (a variable that is not set?); name a field"
            for name in fields
            if getattr(self, name) == ""
        ]
        if self.prompt_field == self.text_field:
            errors.append(f"--prompt-field {self.prompt_field}: is the text's field as well; name two fields")
        if self.separator == "":
            errors.append("--separator: must not be empty")
        errors += below_one(self, "num_proc")
        try:
            tokenization.check_spec(self.tokenizer)
        except ValueError as error:
            errors.append(str(error))
        if errors:
            raise ValueError("\n".join(errors))


def prepare(options: PrepareOptions, say: Say = lambda _: None) -> StoreManifest:
    """Makes the store of `options` unless it is there already; returns its manifest. Safe to run twice at once.

    `say` is given what a person should know. Raises ValueError, in one line, for what the user has to change, and
    OSError, with the place of the store, when it can't be written.
    """
    reading = Reading(options.split, options.name, options.streaming, _unescaped(options.separator))
    found = find_sources(list(options.source), reading)
    recipe = _recipe(options, found.sources)
    out = Path(options.out)
    _check_place(out, options.source, found.sources)
    if out.is_symlink():
        out = out.resolve()  # the store takes the place of the folder, not of the link to it
    try:
        with FileLock(out.parent / f".{out.name}.lock"):
            manifest = _existing(out, recipe, options.overwrite)
            if manifest is not None:
                say(f"{shown(out)} is up to date: {_summary(manifest)}")
                return manifest
            for note in found.notes:
                say(f"warning: {note}")
            with replacing(out) as work:
                manifest = _make(options, found.sources, reading, recipe, work, say)
    except OSError as error:
        if error.filename is not None and not Path(os.fsdecode(error.filename)).is_relative_to(out.parent):
            raise
        raise OSError(
            error.errno, f"{reason(error)} while the store was written; nothing of it was kept", shown(out)
        ) from None
    say(f"{shown(out)}: {_summary(manifest)}")
    for kind, count in manifest["skipped"].items():
        if count:
            say(f"left out: {count} {kind}")
    for warning in _warnings(manifest, options.holdout):
        say(f"warning: {warning}")
    return manifest


def _make(
    options: PrepareOptions,
    sources: list[Source],
    reading: Reading,
    recipe: str,
    work: Path,
    say: Say,
) -> StoreManifest:
    origin: Origin = {"recipe": recipe, "sources": [shown(name) for name in options.source]}
    if sources[0].kind == "task":
        if options.tokenizer != "bytes":
            raise ValueError(f"--tokenizer {options.tokenizer}: a generated task has its own; leave the option out")
        return build_task(work, parse_task(sources[0].name), options.holdout, origin, say)
    plan = Plan(
        tokenizer=options.tokenizer,
        fields=_fields(options),
        holdout=options.holdout,
        stop_on_error=options.on_error == "stop",
        processes=options.num_proc,
    )
    records = Records(sources, reading, plan.fields.names(), work / "cache")
    return build(work, records, plan, origin, say)


def _unescaped(separator: str | None) -> str | None:
    """The separator with its escapes replaced: a shell passes on the two characters of `\\n` as they are."""
    if separator is None:
        return None
    return re.sub(r"\\([nrt\\])", lambda m: {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}[m[1]], separator)


def _warnings(manifest: StoreManifest, holdout: float) -> list[str]:
    train, held_out = (manifest["splits"][split] for split in SPLITS)
    if holdout and not held_out["documents"]:
        return ["nothing is held out: it takes two different documents (--separator parts a text file into several)"]
    share = held_out["tokens"] / (train["tokens"] + held_out["tokens"])
    if share > 2 * holdout and share > 0.2:
        return [f"{share:.0%} of the tokens are held out, in {held_out['documents']} of few documents"]
    return []


def _check_place(out: Path, names: Sequence[str], sources: list[Source]) -> None:
    """Makes the folder that `out` comes into. Raises ValueError when it can't be written or `out` lies in a source."""
    place = out.resolve()
    for folder in map(Path, names):
        if folder.is_dir() and place.is_relative_to(folder.resolve()):
            raise ValueError(
                f"--out {shown(out)}: lies in --source {shown(folder)}, which would read it; choose a folder outside"
            )
    inside = f"{place}{os.sep}"
    for file in (file for source in sources for file in source.files):
        if os.path.abspath(file).startswith(inside):
            raise ValueError(
                f"--out {shown(out)}: has files that --source names, such as {shown(file)}; choose another"
            )
    if out.is_symlink() and not out.exists():
        raise ValueError(f"--out {shown(out)}: a link that leads nowhere; remove it, or make the folder that it names")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written ({error.strerror}); choose another folder") from None


def _recipe(options: PrepareOptions, sources: list[Source]) -> str:
    """Equal when the same files (path, size, time of change) are prepared with the same options."""
    files = [[source.kind, source.name, [_stamp(file) for file in source.files]] for source in sources]
    own = tokenization.needs_no_files(options.tokenizer)
    tokenizer = [] if own else [_stamp(file) for file in sorted(Path(options.tokenizer).rglob("*")) if file.is_file()]
    content = [FORMAT, files, tokenizer, [getattr(options, name) for name in _CONTENT_OPTIONS]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _stamp(file: Path) -> list[str | int]:
    status = file.stat()
    return [str(file.absolute()), status.st_size, status.st_mtime_ns]


def _existing(out: Path, recipe: str, overwrite: bool) -> StoreManifest | None:
    """The manifest of the store that is wanted, when it is there. Raises ValueError when something else is."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        manifest = read_store_manifest(out)
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


def _fields(options: PrepareOptions) -> Fields:
    masked = options.labels_field or options.loss_mask_field
    ids = options.ids_field or ("input_ids" if masked else None)
    return Fields(options.text_field, options.prompt_field, ids, options.labels_field, options.loss_mask_field)


def _summary(manifest: StoreManifest) -> str:
    train, held_out = (manifest["splits"][split] for split in SPLITS)
    return (
        f"{train['documents']:,} documents of {train['tokens']:,} tokens to train on,"
        f" {held_out['documents']:,} of {held_out['tokens']:,} held out; tokenizer {manifest['tokenizer']}"
    )
