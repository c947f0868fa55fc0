"""What a document is made of, as it was read; what was read as what; and whether the wanted fields are there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from gptb_ds.data.formats import listed


@dataclass(frozen=True)
class Record:
    """What a document is made of. `content`: text as bytes, a line of JSON as bytes, or fields by name.

    `where` names it for people: file, file:line or file row. `error` is what kept it from being read. `size`: about the
    bytes that it takes in memory.
    """

    where: str
    kind: Literal["text", "json", "fields"]
    content: bytes | Mapping[str, object] | None
    size: int = 0
    error: str | None = None


@dataclass
class _Pass:
    """What one pass through all records met."""

    unparted: list[str] = field(default_factory=list)  # text files in which the separator occurs nowhere
    parted: int = 0
    with_nul: list[str] = field(default_factory=list)  # text files that hold bytes of 0
    rows_over_lines: int = 0
    headers_again: list[str] = field(default_factory=list)  # rows that repeat their table's header
    doubtful_rows: list[str] = field(default_factory=list)  # rows over lines that may be several rows


@dataclass
class Tally(_Pass):
    """What was taken as what: found when files are opened, and counted while they are read."""

    files: Counter[str] = field(default_factory=Counter)
    json_as_text: list[str] = field(default_factory=list)
    described: list[str] = field(default_factory=list)  # files about a data set, such as its README

    def begin_pass(self) -> None:
        """Counts anew what reading meets; what opening found stays."""
        vars(self).update(vars(_Pass()))

    def kinds(self) -> str:
        """For people: "12 files as text, 3 as JSON records"."""
        named = [f"{count:,} {'file' if count == 1 else 'files'} as {kind}" for kind, count in self.files.items()]
        return ", ".join(named)


def lacking(name: str, fields: list[str], has: list[str]) -> str | None:
    missing = next((wanted for wanted in fields if wanted not in has), None)
    if missing is not None:
        return f"{name}: no field '{missing}'; its fields are {listed(has) or 'none'}"
    return twice(name, fields, has)


def twice(name: str, fields: list[str], has: Sequence[str]) -> str | None:
    twice = next((wanted for wanted in fields if has.count(wanted) > 1), None)
    return twice and f"{name}: {has.count(twice)} fields are called '{twice}'; give them names of their own"
