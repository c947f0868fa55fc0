"""Tables of text (CSV, TSV and their dialects), read row by row so that a mistake costs one row."""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO

_SAMPLE = 1 << 18  # characters that the dialect is found out from
_LONGEST_ROW = 1 << 26  # characters of a row that spans lines, beyond which its quotation mark is taken for a stray one
_DELIMITERS = ",;\t|"
_STRAY = "a quotation mark that is not closed in its row: double it, or put the value in quotes"


@dataclass(frozen=True)
class Dialect:
    """`delimiter` between values; `escape`, what stands before a quotation mark inside quotes (None: it is doubled).

    Not `quoted`: quotation marks are signs as any others.
    """

    delimiter: str
    escape: str | None = None
    quoted: bool = True


@dataclass(frozen=True)
class Row:
    """`values` of the row that begins in `line` and has `lines` of them, or `error`, why it can't be read.

    `doubtful`: its lines may be rows of their own, which nothing proves.
    """

    line: int
    lines: int
    values: list[str]
    error: str | None = None
    doubtful: bool = False


def find_dialect(sample: str, fields: Sequence[str], delimiter: str | None) -> Dialect:
    """The dialect in which the sample reads best; `delimiter` None: the one that is found.

    Best: the header names the wanted `fields`, the header has several columns, the fewest rows fail or have another
    number of values; then the order `,` `;` tab `|`, and doubled quotation marks. Between tabs quotation marks may also
    mean nothing, as in the dumps of many databases.
    """
    escapes = (None, "\\") if '\\"' in sample else (None,)

    def badness(dialect: Dialect) -> tuple[int, bool, int]:
        rows = list(read_rows(io.StringIO(sample, newline=""), dialect))
        names = rows[0].values if rows else []
        missing = sum(name not in names for name in fields)
        wrong = sum(row.error is not None or len(row.values) != len(names) for row in rows)
        return missing, len(names) < 2, wrong

    choices = [Dialect(d, e) for d in ([delimiter] if delimiter else _DELIMITERS) for e in escapes]
    if delimiter in (None, "\t") and "\t" in sample.lstrip().partition("\n")[0]:
        quoted = read_rows(io.StringIO(sample, newline=""), Dialect("\t"))
        if not any(row.lines > 1 for row in quoted):  # values over lines are what quotation marks are for
            choices.append(Dialect("\t", quoted=False))
    return min(choices, key=badness)


def read_rows(lines: Iterator[str], dialect: Dialect, first_line: int = 1) -> Iterator[Row]:
    """The rows, the header first; blank lines are left out. `first_line` is the number of the first of `lines`.

    A quotation mark that is never closed, or is closed in the midst of a value, would take the rows after it along.
    Then only the line where it opens is an error, and reading goes on with the next line. So it does where a row over
    several lines has another number of values than the header.

    A stray mark may also be closed by another one, at the end of a later row's value. That reads like a value that
    spans lines, and often is one. It is an error when one of its lines is a row by itself: as many values as the
    header has, with numbers in all columns that have held only numbers so far (an identifier, a date, a score). In a
    table of texts alone nothing tells one from the other: where every line would be a row, the row is `doubtful`.
    """
    source = _Lines(lines, first_line - 1)
    columns: _Columns | None = None
    while True:
        taken: list[str] = []
        line = source.number + 1
        try:
            values = next(_reader(_taking(source, taken), dialect))
        except StopIteration:
            return
        except csv.Error as error:
            if not taken:
                return
            source.put_back(taken[1:])
            yield Row(line, 1, [], f"{_STRAY} ({error})")
            continue
        if not values:
            continue
        doubtful = False
        if columns is None:
            columns = _Columns(values)
        elif len(taken) > 1 and len(values) != columns.count:
            source.put_back(taken[1:])
            yield Row(line, 1, [], _STRAY)
            continue
        else:
            if len(taken) > 1:
                hidden = [columns.like_a_row(inner, values) for inner in _rows_inside(taken, dialect)]
                if any(hidden) and columns.tell_rows(values):
                    source.put_back(taken[1:])
                    yield Row(line, 1, [], _STRAY)
                    continue
                doubtful = all(hidden)
            columns.saw(values)
        yield Row(line, len(taken), values, doubtful=doubtful)


class _Lines:
    """Lines with their number, some of which can be put back."""

    def __init__(self, lines: Iterator[str], number: int) -> None:
        self._lines, self._again, self.number = lines, deque[str](), number

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._lines)
        self.number += 1
        return line

    def put_back(self, lines: list[str]) -> None:
        self._again.extendleft(reversed(lines))
        self.number -= len(lines)


def _taking(source: _Lines, taken: list[str]) -> Iterator[str]:
    size = 0
    for line in source:
        taken.append(line)
        size += len(line)
        if len(taken) > 1 and size > _LONGEST_ROW:
            raise csv.Error("never closed")
        yield line


class _Columns:
    """How many columns the header has, and which of them have held only numbers."""

    def __init__(self, header: list[str]) -> None:
        self.count, self._header, self._rows = len(header), header, 0
        self._numeric = set(range(self.count))

    def saw(self, values: list[str]) -> None:
        if len(values) == self.count and values != self._header:  # which comes again where tables were put together
            self._rows += 1
            self._numeric = self._numbers_in(values)

    def tell_rows(self, values: list[str]) -> bool:
        """Whether a row is known by its numbers: by those of all before, or of `values`, the first."""
        return self.count > 1 and bool(self._telling(values))

    def like_a_row(self, inner: list[str], values: list[str]) -> bool:
        """Whether the values `inner` of one line could be a row beside the row of `values`."""
        if len(inner) != self.count or self.count < 2:
            return False
        return all(_is_number(inner[column]) for column in self._telling(values))

    def _telling(self, values: list[str]) -> set[int]:
        return self._numeric if self._rows else self._numbers_in(values)

    def _numbers_in(self, values: list[str]) -> set[int]:
        return {column for column in self._numeric if _is_number(values[column])}


def _is_number(value: str) -> bool:
    return value.strip().replace(".", "", 1).replace("-", "").replace(":", "").isdecimal()


def _rows_inside(taken: list[str], dialect: Dialect) -> Iterator[list[str]]:
    """What each line after the first would be as a row; nothing where it can be none."""
    for line in taken[1:]:
        try:
            yield next(_reader([line], dialect), [])
        except csv.Error:
            yield []


def lines_of(stream: IO[bytes]) -> tuple[str, Iterator[str]]:
    """A sample of the text, and all its lines with their ends.

    Bytes that are not UTF-8 pass as lone surrogates, which are an error of their own row.
    """
    csv.field_size_limit(1 << 30)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    sample = text.read(_SAMPLE)
    sample += text.readline()  # it was cut off inside a line, or between \r and \n
    return sample, itertools.chain(io.StringIO(sample, newline=""), text)


def _reader(lines: Iterable[str], dialect: Dialect) -> Iterator[list[str]]:
    if dialect.escape:
        # Python's csv drops every backslash, that of "C:\new" too. Only those before a quotation mark or another
        # backslash are escapes; the others are doubled here.
        lines = (re.sub(r"\\([\"\\])|\\", lambda m: m[0] if m[1] else "\\\\", line) for line in lines)
    if not dialect.quoted:
        return csv.reader(lines, delimiter=dialect.delimiter, quoting=csv.QUOTE_NONE)
    return csv.reader(lines, delimiter=dialect.delimiter, escapechar=dialect.escape, strict=True)
