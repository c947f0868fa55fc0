"""JSON values one after another out of a stream, of which no more than a value is in memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from typing import IO

_CHUNK = 1 << 20  # bytes
_SPACE = re.compile(r"[ \t\r\n]*")


class Repeated:
    """Stands for the values of a key that an object has more than once: which of them is meant nobody can tell."""


def decode(text: str, at: int, keys: Iterable[str]) -> tuple[object, int]:
    """The JSON value that begins at `at`, and where it ends. One of `keys` twice in an object is `Repeated` there."""
    value, end = json.JSONDecoder().raw_decode(text, at)
    # The second of two is nearly always a value, or in another object; json itself takes the last of several.
    if any(text.count(f'"{key}"', at, end) > 1 for key in keys):

        def marked(pairs: list[tuple[str, object]]) -> dict[str, object]:
            names = [name for name, _ in pairs]
            return dict(pairs) | {key: Repeated() for key in keys if names.count(key) > 1}

        value, end = json.JSONDecoder(object_pairs_hook=marked).raw_decode(text, at)
    return value, end


class JsonValues:
    """Reads the values of a text in UTF-8 and the signs between them. Raises ValueError for what is no JSON."""

    def __init__(self, begun: bytes, stream: IO[bytes], keys: Sequence[str]) -> None:
        """`begun` was read from the stream already. `keys`: those of which an object may have only one."""
        self._begun, self._stream, self._keys = begun, stream, keys
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at, self._ended = "", 0, False
        self._lines, self._before = 0, 0  # lines before the text, and characters of its first line

    def value(self) -> tuple[object, int]:
        """The next value and how many characters it has."""
        while True:
            try:
                value, end = decode(self._text, self._at, self._keys)
            except json.JSONDecodeError as error:
                if self._ended or not unfinished(error):
                    raise self._error(error.msg, error.pos) from None
            else:
                if end < len(self._text) or self._ended:  # else the digits of a number may go on
                    size, self._at = end - self._at, end
                    return value, size
            self._more()

    def next_sign(self) -> str:
        """The first character after the white space here, which stays to be read; "" at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            self._more()

    def skip(self, sign: str) -> bool:
        """Whether this sign is next; then it is read."""
        if self.next_sign() != sign:
            return False
        self._at += 1
        return True

    def fail(self, what: str) -> ValueError:
        """The error that something is wrong here."""
        return self._error(what, self._at)

    def _more(self) -> None:
        """Twice as much of the value that begins here: its beginning is read again each time."""
        read = self._text[: self._at]
        if newlines := read.count("\n"):
            self._lines, self._before = self._lines + newlines, len(read) - read.rindex("\n") - 1
        else:
            self._before += len(read)
        self._text, self._at = self._text[self._at :], 0
        content, self._begun = self._begun or self._stream.read(max(_CHUNK, len(self._text))), b""
        self._ended = not content
        self._text += self._decoder.decode(content, final=self._ended)

    def _error(self, what: str, at: int) -> ValueError:
        read = self._text[:at]
        lines = read.count("\n")
        column = len(read) - read.rindex("\n") if lines else self._before + len(read) + 1
        return ValueError(f"{what}: line {self._lines + lines + 1} column {column}")


def unfinished(error: json.JSONDecodeError) -> bool:
    """Whether a text may only have ended too early: a string is open, or it ends where the error is."""
    return error.msg.startswith("Unterminated string") or error.pos >= len(error.doc) - len("-Infinity")
