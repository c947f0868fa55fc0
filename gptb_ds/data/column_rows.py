"""The rows of what is kept in columns: Parquet and Arrow files, and the data sets of the library `datasets`."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from gptb_ds.data.formats import reason
from gptb_ds.data.record import Record, lacking
from gptb_ds.data.sources import Reading, Source, shown

if TYPE_CHECKING:
    import datasets
    import pyarrow

    DataSet: TypeAlias = datasets.Dataset | datasets.IterableDataset

_ROWS_BYTES = 4 << 20  # about the most bytes of rows that are taken out of Parquet or Arrow at once
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # what a full disk, a quota or a limit on files is reported as


def open_data_set(source: Source, reading: Reading, fields: list[str], cache: Path) -> DataSet | tuple[Path, ...]:
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
    if has is not None and (error_line := lacking(name, fields, has)):
        raise ValueError(error_line)
    return data


def read_columns(file: Path, name: str, kind: str, fields: list[str]) -> Iterator[Record]:
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
        if error := lacking(name, fields, has):
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


def read_data_set(data: DataSet, name: str, fields: list[str]) -> Iterator[Record]:
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
