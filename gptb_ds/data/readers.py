"""Raw records out of files and data sets, one at a time and in order; what can't be read is a record with an error."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from gptb_ds.data.column_rows import open_data_set, read_columns, read_data_set
from gptb_ds.data.formats import (
    KIND_NAMES,
    TABLE_DELIMITERS,
    Format,
    identify,
    reading_errors,
    reason,
    unpacked,
)
from gptb_ds.data.json_records import read_json
from gptb_ds.data.record import Record, Tally, twice
from gptb_ds.data.sources import Reading, Source, shown
from gptb_ds.data.tables import find_dialect, lines_of, read_rows

if TYPE_CHECKING:
    from gptb_ds.data.column_rows import DataSet

_CHUNK = 1 << 20  # bytes of a text file that are looked through at once
_EXCEL = re.compile(r"sep=(.)\r?\n")
_REST = "what follows, to the end of the file, "


class Records:
    """All records of some sources, as often as they are asked for: `fields` are the names that are wanted."""

    def __init__(self, sources: list[Source], reading: Reading, fields: list[str], cache: Path) -> None:
        self.sources, self.reading, self.fields, self.cache = sources, reading, fields, cache
        self.tally = Tally()
        self._opened: list[list[tuple[Path, Format]] | DataSet] = []

    def open(self) -> None:
        """Looks at every file, and opens the data sets. Raises ValueError, in one line, for what can't be opened."""
        for source in self.sources:
            files = source.files
            if source.kind != "files":
                data = open_data_set(source, self.reading, self.fields, self.cache)
                if not isinstance(data, tuple):
                    self._opened.append(data)
                    self.tally.files["data set"] += 1
                    continue
                files = data
            formats = [(file, identify(file)) for file in files]
            self._opened.append(formats)
            for _, format in formats:
                self.tally.files["unreadable" if format.problem else KIND_NAMES[format.kind]] += 1
            self._notice(formats)

    def _notice(self, formats: list[tuple[Path, Format]]) -> None:
        with_fields = any(format.kind != "text" for _, format in formats)
        about = re.compile(r"(?i)(readme|licen[cs]e|citation|notice)")
        for file, format in formats:
            if format.kind == "text" and format.looks_like_json:
                self.tally.json_as_text.append(shown(file))
            if with_fields and format.kind == "text" and about.match(file.name):
                self.tally.described.append(shown(file))

    @property
    def size(self) -> int:
        """Bytes of all files on disk, and of data sets in memory."""
        total = 0
        for opened in self._opened:
            if isinstance(opened, list):
                total += sum(file.stat().st_size for file, _ in opened)
            else:
                total += getattr(getattr(opened, "data", None), "nbytes", 0)
        return total

    @property
    def plain_text(self) -> bool:
        """Whether every file is text as it lies on the disk."""
        return all(
            isinstance(opened, list) and all(f.kind == "text" and not f.packing and not f.problem for _, f in opened)
            for opened in self._opened
        )

    def __iter__(self) -> Iterator[Record]:
        self.tally.begin_pass()
        for source, opened in zip(self.sources, self._opened, strict=True):
            if isinstance(opened, list):
                for file, format in opened:
                    yield from self._read_file(file, format)
            else:
                yield from read_data_set(opened, source.name, self.fields)

    def _read_file(self, file: Path, format: Format) -> Iterator[Record]:
        name = shown(file)
        if format.problem:
            yield Record(name, "fields", None, error=f"{name}: {format.problem}")
            return
        any_read = False
        try:
            for record in self._parse(file, name, format):
                any_read = True
                yield record
        except reading_errors() as error:
            rest = _REST if any_read else ""
            where = record.where if any_read else name
            yield Record(where, "fields", None, error=f"{where}: {rest}cannot be read ({reason(error)})")

    def _parse(self, file: Path, name: str, format: Format) -> Iterator[Record]:
        if format.kind in ("parquet", "arrow"):
            yield from read_columns(file, name, format.kind, self.fields)
            return
        with unpacked(file, format.packing) as stream:
            if format.kind == "json":
                yield from read_json(stream, name, self.fields)
            elif format.kind == "table":
                suffix = next(s for s in map(str.lower, reversed(file.suffixes)) if s in TABLE_DELIMITERS)
                yield from self._read_table(stream, name, TABLE_DELIMITERS[suffix])
            elif self.reading.separator is None:
                content = stream.read()
                if b"\0" in content:
                    self.tally.with_nul.append(name)
                yield Record(name, "text", content, len(content))
            else:
                yield from self._read_parts(stream, name, self.reading.separator)

    def _read_parts(self, stream: IO[bytes], name: str, separator: str) -> Iterator[Record]:
        count = 0
        for count, part in enumerate(read_parts(stream, separator), 1):
            if b"\0" in part and name not in self.tally.with_nul[-1:]:
                self.tally.with_nul.append(name)
            yield Record(f"{name} (document {count})", "text", part, len(part))
        if count == 1:
            self.tally.unparted.append(name)
        else:
            self.tally.parted += 1

    def _read_table(self, stream: IO[bytes], name: str, delimiter: str | None) -> Iterator[Record]:
        sample, lines = lines_of(stream)
        if excel := _EXCEL.match(sample):  # its first line names the delimiter and is no row
            delimiter, sample = excel[1], sample[excel.end() :]
            next(lines)
        rows = read_rows(lines, find_dialect(sample, self.fields, delimiter), first_line=2 if excel else 1)
        names: list[str] | None = None
        for row in rows:
            where = f"{name}:{row.line}"
            if row.error:
                yield Record(where, "fields", None, error=f"{where}: {row.error}")
            elif names is None:
                names = row.values
                if error := twice(where, self.fields, names):
                    yield Record(where, "fields", None, error=error)
                    return
            elif row.values == names and len(names) > 1:
                self.tally.headers_again.append(where)
            elif len(row.values) > len(names):
                error = f"{where}: more values than the {len(names)} columns; quote what has a delimiter"
                yield Record(where, "fields", None, error=error)
            else:
                fields = dict(zip(names, row.values, strict=False))
                error = None
                if len(row.values) < len(names) and all(name in fields for name in self.fields):
                    error = f"{where}: {len(row.values)} values for {len(names)} columns; quote what spans lines"
                self.tally.rows_over_lines += row.lines > 1
                if row.doubtful:
                    self.tally.doubtful_rows.append(where)
                yield Record(where, "fields", fields, sum(map(len, row.values)), error)


def read_parts(stream: IO[bytes], separator: str) -> Iterator[bytes]:
    """What lies between the separators of a text. A line feed in the separator also stands for `\\r\\n`."""
    pattern = re.compile(re.escape(separator.encode()).replace(b"\\\n", b"\n").replace(b"\n", b"\r?\n"))
    longest = len(separator.encode()) + separator.count("\n")
    text = bytearray()
    while chunk := stream.read(_CHUNK):
        looked = max(0, len(text) - longest + 1)  # a separator may lie across the chunks' edge
        text += chunk
        start = 0
        while found := pattern.search(text, max(start, looked)):
            yield bytes(text[start : found.start()])
            start = found.end()
        del text[:start]
    yield bytes(text)
