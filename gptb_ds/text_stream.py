"""Text as it is generated: tokens in, characters out as soon as they can no longer change."""

from __future__ import annotations

import itertools
import json
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class TextStream:
    """Tokens in, text out as soon as it can no longer change: all pieces together are the decode of all tokens.

    Holds a few tokens, however long the text grows, for every transformers tokenizer. They show an unfinished
    character in three ways: as U+FFFD at the end (byte-level BPE), not at all (ByT5), or, with byte fallback (Llama 2,
    Mistral, Gemma), they turn a whole run of byte tokens into U+FFFD when its last character is unfinished, so there
    nothing is certain before the run ends. And some change a token's text when the next one comes ("hel@@" and "lo" are
    "hello"): of these, what the last token has added is held back until it has a successor.
    """

    _HELD = 3  # an unfinished UTF-8 character has at most three bytes
    _MOST = 32  # tokens kept when nothing but broken characters comes

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._skipped = set(tokenizer.all_special_ids)
        if tokenizer.is_fast:  # the library tokenizers also leaves out those that are special and have no role
            self._skipped |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._ids: list[int] = []
        self._printed = 0
        self._in_bytes = False
        self._revises = _revises(tokenizer)

    def push(self, token: int) -> str:
        """The text that `token` completes, often empty."""
        if token in self._skipped:  # gives no text, and does not end a run of bytes
            return ""
        self._ids.append(token)
        self._in_bytes = bool(_BYTE.fullmatch(str(self._tokenizer.convert_ids_to_tokens(token) or "")))
        if self._in_bytes:
            return ""
        text = self._decode(self._ids)
        unsure = min(len(text) - len(text.rstrip("\ufffd")), self._HELD)
        if self._revises:
            before = self._decode(self._ids[:-1])
            same = (a == b for a, b in zip(before, text, strict=False))
            unsure = max(unsure, len(text) - sum(itertools.takewhile(bool, same)))
        new = text[self._printed : len(text) - unsure]
        self._printed += len(new)
        if new and self._revises:
            # As many tokens as unsure characters may have come from, and one to their left.
            self._keep(max(2, unsure + 1), unsure)
        elif new and not unsure:
            # The last token stays as left context: some tokenizers write a space only between tokens.
            self._keep(1, 0)
        elif len(self._ids) > self._MOST:
            self._keep(self._HELD, unsure)
        return new

    def end(self) -> str:
        """What is left when no more tokens come."""
        text = self._decode(self._ids)[self._printed :]
        self._ids, self._printed = [], 0
        return text

    def _keep(self, tokens: int, unsure: int) -> None:
        self._ids = self._ids[-tokens:]
        self._printed = max(0, len(self._decode(self._ids)) - unsure)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _revises(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a token's text may change when the next one comes: after all tokens are joined, something is replaced."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return type(tokenizer).__name__ != "ByT5Tokenizer"
    decoder = json.loads(backend.to_str())["decoder"] or {}
    kinds = [part["type"] for part in decoder.get("decoders", [decoder]) if part]
    joined = next((place for place, kind in enumerate(kinds) if kind in ("Fuse", "ByteLevel")), len(kinds))
    return "Replace" in kinds[joined:]
