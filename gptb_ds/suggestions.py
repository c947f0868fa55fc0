"""What somebody probably meant who wrote a name that does not exist."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The name of `known` that ends as `word` does (`--lr` for `--optim.lr`), or is spelt most alike, if any is."""
    names = list(known)
    ending = _last(word)
    same = [name for name in names if _last(name) == ending]
    near = same or get_close_matches(word, names, n=1)
    return near[0] if near else None


def _last(name: str) -> str:
    return name.lstrip("-").split(".")[-1]
