"""Long texts in pieces: a tokenizer's library needs a hundred times the memory of the text that it is given at once."""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

LONGEST = 1 << 17  # characters of a piece
_CONTEXT = 256  # characters on both sides of a place that are looked at to see whether a cut there changes tokens
_TRIES = 4  # blanks that are tried
_BLANK = re.compile(r"\s")

# A token: its id, the number of its word, and where it begins and ends in the text.
_Token = tuple[int, int | None, int, int]


class Encode(Protocol):
    """A tokenizer's ids of a text."""

    def __call__(self, text: str, /) -> list[int]: ...


def pieces(text: str, ids_of: Encode, tokens_of: Callable[[str], list[_Token]] | None) -> Iterator[str]:
    """Pieces of a text whose tokens, one after another, are those of the whole.

    Every cut is tried out on the text around it: some tokenizers begin a text with a blank, some look back over one. A
    blank is the place for it; it may be left out where the next piece begins with one of its own. In text without
    blanks (DNA) the cut is between two of the tokenizer's words, which `tokens_of` tells (None: the tokenizer can't).
    Where no cut is found, the rest is one piece.
    """
    start = 0
    while len(text) - start > LONGEST:
        place = _at_a_blank(text, start, ids_of) or (tokens_of and _between_words(text, start, ids_of, tokens_of))
        if not place:
            break
        yield text[start : place[0]]
        start = place[1]
    yield text[start:]


def _at_a_blank(text: str, start: int, ids_of: Encode) -> tuple[int, int] | None:
    """Where the piece that begins at `start` may end, and where the next one then begins."""
    end = start + LONGEST
    blanks = [end - _CONTEXT + found.start() for found in _BLANK.finditer(text[end - _CONTEXT : end])]
    for blank in blanks[: -_TRIES - 1 : -1]:
        left, right = blank - _CONTEXT, blank + _CONTEXT
        whole = ids_of(text[left:right])
        for stop, go in ((blank, blank), (blank + 1, blank + 1), (blank, blank + 1)):
            if ids_of(text[left:stop]) + ids_of(text[go:right]) == whole:
                return stop, go
    return None


def _between_words(
    text: str, start: int, ids_of: Encode, tokens_of: Callable[[str], list[_Token]]
) -> tuple[int, int] | None:
    """As `_at_a_blank`. Words are tokenised one by one, so those before the cut stay as they are."""
    piece = text[start : start + LONGEST]
    tokens = tokens_of(piece)
    # The last words may go on behind the piece.
    for number in range(len(tokens) - 1, max(0, len(tokens) - 2 * _CONTEXT), -1):
        (_, word, _, end), (_, following, begin, _) = tokens[number - 1], tokens[number]
        if word != following and end == begin and len(piece) - end >= _CONTEXT // 2:
            if ids_of(piece[end:]) == [token[0] for token in tokens[number:]]:
                return start + end, start + end
            return None
    return None


def parts(text: str) -> Iterator[str]:
    """A text in pieces whose tokens need not be those of the whole: cut after a blank where there is one."""
    start = 0
    while len(text) - start > LONGEST:
        blank = max(text.rfind(sign, start + LONGEST // 2, start + LONGEST) for sign in (" ", "\n"))
        end = blank + 1 if blank >= 0 else start + LONGEST
        yield text[start:end]
        start = end
    yield text[start:]


def sample(texts: Iterable[str], most: int, key: Callable[[bytes], int]) -> Iterator[str]:
    """Texts of at most `most` bytes in all, in their order: all of them, or those with the lowest keys.

    What is taken depends on the texts alone, not on their order.
    """
    kept: list[tuple[int, int, str, int]] = []
    size = 0
    for number, text in enumerate(texts):
        content = text.encode()
        size += len(content)
        heapq.heappush(kept, (-key(content), -number, text, len(content)))
        while size > most and len(kept) > 1:
            size -= heapq.heappop(kept)[3]
    for _, _, text, _ in sorted(kept, key=lambda entry: -entry[1]):
        yield text
