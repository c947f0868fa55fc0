"""Raw records out of files and data sets, one at a time and in order; what can't be read is a record with an error."""

from __future__ import annotations

import codecs
import errno
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal, TypeAlias, cast

from gptb_ds.data.formats import (
    KIND_NAMES,
    TABLE_DELIMITERS,
    Format,
    identify,
    listed,
    reading_errors,
    reason,
    unpacked,
)
from gptb_ds.data.json_values import JsonValues, decode, unfinished
from gptb_ds.data.sources import Reading, Source, shown
from gptb_ds.data.tables import find_dialect, lines_of, read_rows

if TYPE_CHECKING:
    import datasets
    import pyarrow

    DataSet: TypeAlias = datasets.Dataset | datasets.IterableDataset

_CHUNK = 1 << 20  # bytes of a text file that are looked through at once
_ROWS_BYTES = 4 << 20  # about the most bytes of rows that are taken out of Parquet or Arrow at once
_EXCEL = re.compile(r"sep=(.)\r?\n")
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # what a full disk, a quota or a limit on files is reported as
_REST = "what follows, to the end of the file, "


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
                data = _open_data_set(source, self.reading, self.fields, self.cache)
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
                yield from _read_data_set(opened, source.name, self.fields)

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
            yield from _read_columns(file, name, format.kind, self.fields)
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
                if error := _twice(where, self.fields, names):
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


def _read_columns(file: Path, name: str, kind: str, fields: list[str]) -> Iterator[Record]:
    """The rows of a Parquet or Arrow file. Only wanted columns are read, so that others may differ between files."""
    import pyarrow
    import pyarrow.parquet

    try:
        if kind == "parquet":
            parquet = pyarrow.parquet.ParquetFile(file, memory_map=True)
            has = parquet.schema_arrow.names
        else:
            source = pyarrow.memory_map(str(file))
            try:
                arrow = pyarrow.ipc.open_file(source)
            except pyarrow.ArrowInvalid:  # the other of Arrow's two formats, which `datasets` writes
                source.seek(0)
                arrow = pyarrow.ipc.open_stream(source)
            has = arrow.schema.names
        if error := _lacking(name, fields, has):
            yield Record(name, "fields", None, error=error)
            return
        if kind == "parquet":
            total = sum(parquet.metadata.row_group(g).total_byte_size for g in range(parquet.num_row_groups))
            rows = max(1, min(1024, _ROWS_BYTES * parquet.metadata.num_rows // max(1, total)))
            batches = parquet.iter_batches(rows, columns=fields)
        elif isinstance(arrow, pyarrow.RecordBatchFileReader):
            batches = (arrow.get_batch(number).select(fields) for number in range(arrow.num_record_batches))
        else:
            batches = (batch.select(fields) for batch in arrow)
        yield from _rows_of(batches, name)
    except pyarrow.ArrowException as error:
        raise ValueError(reason(error)) from None


def _read_data_set(data: DataSet, name: str, fields: list[str]) -> Iterator[Record]:
    import datasets

    if isinstance(data, datasets.IterableDataset):
        for number, record in enumerate(data):
            fields_of = {column: record.get(column) for column in fields}
            yield Record(f"{shown(name)} row {number}", "fields", fields_of, len(str(fields_of)))
        return
    size = max(1, min(1024, _ROWS_BYTES * len(data) // max(1, data.data.nbytes)))
    if len(data):
        yield from _rows_of(data.select_columns(fields).with_format("arrow").iter(size), shown(name))


def _rows_of(batches: Iterable[pyarrow.RecordBatch | pyarrow.Table], name: str) -> Iterator[Record]:
    number = 0
    for batch in batches:
        size = max(1, min(1024, _ROWS_BYTES * batch.num_rows // max(1, batch.nbytes)))
        for first in range(0, batch.num_rows, size):
            part = batch.slice(first, size)
            for record in _values_of(part):
                yield Record(f"{name} row {number}", "fields", record, part.nbytes // part.num_rows)
                number += 1


def _values_of(batch: pyarrow.RecordBatch | pyarrow.Table) -> list[dict[str, object]]:
    """The rows of a batch. Bytes that are not UTF-8 pass as lone surrogates, which are an error of their own row."""
    import pyarrow

    try:
        rows: list[dict[str, object]] = batch.to_pylist()
    except UnicodeDecodeError:
        # Writers of other languages store any bytes in a column of text, and pyarrow converts all of them or none.
        is_text = [pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) for kind in batch.schema.types]
        columns = [
            column.cast(pyarrow.large_binary()) if text else column
            for column, text in zip(batch.columns, is_text, strict=True)
        ]
        rows = [
            {
                name: value.decode(errors="surrogateescape") if isinstance(value, bytes) and text else value
                for name, value, text in zip(batch.schema.names, row, is_text, strict=True)
            }
            for row in zip(*(column.to_pylist() for column in columns), strict=True)
        ]
    return rows


def _lacking(name: str, fields: list[str], has: list[str]) -> str | None:
    missing = next((wanted for wanted in fields if wanted not in has), None)
    if missing is not None:
        return f"{name}: no field '{missing}'; its fields are {listed(has) or 'none'}"
    return _twice(name, fields, has)


def _twice(name: str, fields: list[str], has: Sequence[str]) -> str | None:
    twice = next((wanted for wanted in fields if has.count(wanted) > 1), None)
    return twice and f"{name}: {has.count(twice)} fields are called '{twice}'; give them names of their own"


def _open_data_set(source: Source, reading: Reading, fields: list[str], cache: Path) -> DataSet | tuple[Path, ...]:
    """The data set, opened; or the files that hold its split, where it is a folder of them.

    `datasets` makes one table of a split's files and refuses those that differ, in columns nobody needs as well, so it
    is only asked which files they are. Raises ValueError, in one line, when it can't be opened or lacks a field.
    """
    import datasets

    datasets.logging.set_verbosity_error()
    name = shown(source.name)
    try:
        if source.kind == "saved":
            data = datasets.load_from_disk(source.name)
        elif source.files:
            builder = datasets.load_dataset_builder(source.name, reading.config, cache_dir=str(cache))
            data = {str(split): tuple(map(Path, files)) for split, files in (builder.config.data_files or {}).items()}
        else:
            data = datasets.load_dataset(
                source.name,
                reading.config,
                split=reading.split or "train",
                streaming=reading.streaming,
                cache_dir=None if reading.streaming else str(cache),
            )
    except Exception as error:  # the readers raise what their many formats raise
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno in NO_ROOM:
            raise cause from None
        hint = "" if source.files else "no such file or folder, and as a data set of the hub it "
        file = getattr(cause, "filename", None)
        which = f"{shown(file)}: " if isinstance(file, str) and file else ""
        raise ValueError(f"{name}: {hint}cannot be read ({which}{reason(cause)})") from None
    if isinstance(data, dict):
        wanted = reading.split or "train"
        if wanted not in data:
            raise ValueError(f"{name}: no split '{wanted}'; choose --split out of {', '.join(data)}")
        data = data[wanted]
    elif source.kind == "saved" and reading.split not in (None, str(data.split or "train")):
        raise ValueError(f"{name}: has no split '{reading.split}', it is a single data set; leave --split out")
    has = getattr(data, "column_names", None)
    if has is not None and (error_line := _lacking(name, fields, has)):
        raise ValueError(error_line)
    return data


def read_json(stream: IO[bytes], name: str, fields: list[str]) -> Iterator[Record]:
    """The records of JSON lines; of an array; of objects over several lines; of an object with a list of them inside.

    JSON lines are told from the rest by the first line that is not blank: a whole object there, or one that is broken.
    No more than a record is in memory, and of the last of these forms the whole object.
    """
    number, first = 1, stream.readline(_CHUNK)  # an array may be one line, of any length
    while first and not first.removeprefix(codecs.BOM_UTF8).strip():
        number, first = number + 1, stream.readline(_CHUNK)
    begun = first.removeprefix(codecs.BOM_UTF8).lstrip()
    if begun.startswith(b"["):
        yield from _read_elements(JsonValues(begun, stream, fields), name)
        return
    if len(first) == _CHUNK:
        begun += stream.readline()
    if begun.startswith(b"{"):
        whole = _whole_object(begun, fields)
        if whole is None:  # broken, or over several lines
            begun, is_object = _begin_of_object(begun, stream)
            if is_object:
                yield from _read_values(JsonValues(begun, stream, fields), name, fields)
                return
            begun += stream.readline()
        elif not all(field in whole for field in fields) or isinstance(whole[fields[0]], list):
            following = stream.read(_CHUNK)
            if not following.strip():
                yield from _records_inside(whole, name, fields)
                return
            begun += following + stream.readline()
    for at, line in enumerate(itertools.chain(io.BytesIO(begun), stream), number):
        if line.strip():
            yield Record(f"{name}:{at}", "json", line, len(line))


def _whole_object(text: bytes, fields: list[str]) -> dict[str, object] | None:
    """The JSON object that the text begins with, if it is whole."""
    try:
        value, _ = decode(text.decode(errors="ignore"), 0, fields)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _begin_of_object(begun: bytes, stream: IO[bytes]) -> tuple[bytes, bool]:
    """`begun` and as much more as it takes to see whether it begins with an object over lines; and whether it does."""
    while True:
        try:
            json.JSONDecoder().raw_decode(begun.decode(errors="ignore"))
            return begun, True
        except json.JSONDecodeError as error:
            more = stream.read(max(1 << 16, len(begun))) if unfinished(error) else b""
        except (ValueError, RecursionError):
            more = b""
        if not more:
            return begun, False
        begun += more


def _read_elements(values: JsonValues, name: str) -> Iterator[Record]:
    """The elements of a JSON array, one at a time: a mistake in the text costs only the elements after it."""
    values.skip("[")
    number, more = 0, values.next_sign() != "]"
    while more:
        element, size = values.value()
        number += 1
        yield Record(f"{name} (record {number})", "fields", _as_fields(element), size)
        more = values.skip(",")
        values.next_sign()
    if not values.skip("]") or values.next_sign():
        raise values.fail("expected ',' or the array's end")


def _read_values(values: JsonValues, name: str, fields: list[str]) -> Iterator[Record]:
    """JSON values one after another, with any white space between them."""
    number = 0
    while values.next_sign():
        value, size = values.value()
        number += 1
        if number == 1 and not values.next_sign() and isinstance(value, dict):
            yield from _records_inside(value, name, fields)
        else:
            yield Record(f"{name} (record {number})", "fields", _as_fields(value), size)


def _as_fields(value: object) -> Mapping[str, object]:
    """A JSON value as a record's content; one that is no object is refused where its fields are looked for."""
    return cast("Mapping[str, object]", value)


def _records_inside(value: dict[str, object], name: str, fields: list[str]) -> Iterator[Record]:
    """The records of a file that is one object: its list of objects, its columns, or itself."""
    lists = {key: v for key, v in value.items() if isinstance(v, list) and v and all(isinstance(e, dict) for e in v)}
    columns = [column for field in fields if isinstance(column := value.get(field), list)]
    if len(lists) == 1 and not all(field in value for field in fields):
        ((key, elements),) = lists.items()
        for number, element in enumerate(elements, 1):
            yield Record(f"{name} ({key} {number})", "fields", element, len(str(element)))
    elif len(columns) == len(fields) and all(isinstance((column or [None])[0], (str, list)) for column in columns):
        for number, row in enumerate(itertools.zip_longest(*columns), 1):
            yield Record(f"{name} (row {number})", "fields", dict(zip(fields, row, strict=True)), len(str(row)))
    else:
        yield Record(f"{name} (record 1)", "fields", value, len(str(value)))
