"""What `gptb-ds prepare --describe` tells of a store."""

from __future__ import annotations

from pathlib import Path

from gptb_ds.data.document_order import Pieces
from gptb_ds.data.documents import SPLITS, open_store, read_store_manifest

_LANES = (64, 256, 1024, 4096, 16384)
_BAR = 40


def describe_store(path: Path, lanes: int | None, window: int, max_document_tokens: int | None) -> str:
    """Documents, tokens, lengths, tokenizer, fingerprint, and the windows of an epoch for some numbers of lanes.

    Raises ValueError as `open_store` does.
    """
    manifest = read_store_manifest(path)
    lines = [
        f"store        {path}",
        f"fingerprint  {manifest['fingerprint']}",
        f"sources      {' '.join(manifest['sources'])}",
        f"read as      {manifest.get('read_as', 'unknown')}",
        f"tokenizer    {manifest['tokenizer']}",
        f"vocabulary   {manifest['vocab_size']:,}, end of text {manifest['eot_id']}",
        f"loss weights {'per token' if manifest['weighted'] else 'none: every target counts'}",
    ]
    for split in SPLITS:
        facts = manifest["splits"][split]
        targets = facts["tokens"] + facts["documents"]
        lines.append(
            f"{split:12} {facts['documents']:,} documents, {facts['tokens']:,} tokens, {facts['bytes']:,} bytes of text"
            + (f" ({facts['bytes'] / targets:.3f} a target), longest {facts['longest']:,} tokens" if targets else "")
        )
    lines += [f"left out     {count:,} {kind}" for kind, count in manifest["skipped"].items() if count]
    lines += ["", "train documents by length in tokens", *_histogram(manifest["splits"]["train"]["histogram"])]
    lines += ["", *_epochs(path, lanes, window, max_document_tokens)]
    return "\n".join(lines)


def _histogram(counts: list[int]) -> list[str]:
    top = max(counts, default=0)
    first = next((bits for bits, count in enumerate(counts) if count), 0)
    return [
        f"{(1 << bits) >> 1:>12,} to {max(0, (1 << bits) - 1):<12,} {count:>12,} {'#' * -(-count * _BAR // top)}"
        for bits, count in list(enumerate(counts))[first:]
    ]


def _epochs(path: Path, lanes: int | None, window: int, max_document_tokens: int | None) -> list[str]:
    store = open_store(path)
    pieces = Pieces(store.offsets, max_document_tokens)
    longest = store.manifest["splits"]["train"]["longest"]
    if max_document_tokens is not None:
        longest = min(longest, max_document_tokens)
    cut = "" if max_document_tokens is None else f" cut into {pieces.count:,} pieces"
    lines = [f"an epoch is {pieces.inputs:,} targets (each document's tokens and its end){cut}"]
    for count in [lanes] if lanes else _LANES:
        windows = pieces.inputs / (count * window)
        note = "" if count <= pieces.count else f"; only {pieces.count:,} documents: lanes repeat some at once"
        if not note and longest * count > pieces.inputs:
            note = f"; the longest document outlasts {longest * count / pieces.inputs:.1f} epochs of the other lanes"
        lines.append(f"{count:>8,} lanes, window {window}: {windows:,.1f} windows an epoch{note}")
    return lines
