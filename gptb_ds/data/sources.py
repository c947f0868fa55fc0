"""The sources: what `--source` names, found and opened as raw records of Hugging Face `datasets`."""

from __future__ import annotations

import codecs
import csv
import glob
import gzip
import io
import json
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_JSON = {".jsonl", ".ndjson", ".json"}
_TABLES = {".csv": ",", ".tsv": "\t"}
_KINDS = {".parquet": "parquet", ".arrow": "arrow"} | dict.fromkeys(_JSON, "json") | dict.fromkeys(_TABLES, "csv")
_RAW = {"text": "text_bytes", "json": "json_bytes", "csv": "json_bytes"}
_PACKED = {".gz", ".zst"}
_FILE_LIKE = {*_KINDS, *_PACKED, ".txt", ".md", ".py"}  # names that end so mean a file, not a data set
_CHUNK = 1 << 24  # bytes of a text file that are looked through at once
_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class Source:
    """A part of the corpus that is read in one go. `files` are its files in order; none for a hub name.

    kind: text, json, csv (records read by us, with file and line), parquet, arrow, saved, loaded (by `datasets`).
    """

    kind: str
    name: str
    files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Reading:
    """How records are read: `split` and `config` of a data set, `separator` between documents of a text file."""

    split: str | None = None
    config: str | None = None
    streaming: bool = False
    separator: str | None = None


def find_sources(names: list[str], reading: Reading) -> list[Source]:
    """What `names` stand for: files, globs, folders, saved data sets, hub names, `stdlib`. The order is fixed.

    Raises ValueError with one line for each name that stands for nothing.
    """
    sources: list[Source] = []
    errors: list[str] = []
    for name in names:
        try:
            sources += _find(name, reading)
        except ValueError as error:
            errors.append(str(error))
    of_data_sets = reading.split or reading.config or reading.streaming
    if of_data_sets and sources and not any(source.kind in ("saved", "loaded") for source in sources):
        errors.append("--split, --name and --streaming are for data sets; files are read whole")
    if errors:
        raise ValueError("\n".join(errors))
    return sources


def _find(name: str, reading: Reading) -> list[Source]:
    path = Path(name).expanduser()
    if name == "stdlib":
        return [_standard_library()]
    if path.is_file():
        return _by_kind([path])
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return [Source("saved", name, _files_below(path))]
        if reading.split or reading.config or reading.streaming:
            return [Source("loaded", name, _files_below(path))]
        files = _files_below(path)
        if not files:
            raise ValueError(f"--source {name}: the folder has no files")
        return _by_kind(list(files))
    if any(sign in name for sign in "*?["):
        files = tuple(sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file()))
        if not files:
            raise ValueError(f"--source {name}: no file matches")
        return _by_kind(list(files))
    if name.startswith("task:"):
        raise ValueError(f"--source {name}: no such generated task")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith(".") and Path(name).suffix not in _FILE_LIKE:
        return [Source("loaded", name)]
    raise ValueError(f"--source {name}: no such file or folder (data sets of the hub are named OWNER/NAME)")


def _standard_library() -> Source:
    root = Path(sysconfig.get_path("stdlib"))
    files = (p for p in root.rglob("*.py") if not _NOT_LIBRARY & set(p.relative_to(root).parts))
    return Source("text", "stdlib", tuple(sorted(files)))


def _files_below(folder: Path) -> tuple[Path, ...]:
    """All files in it and below, sorted; hidden ones and those in hidden folders left out."""
    found = (p for p in folder.rglob("*") if p.is_file())
    return tuple(sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts)))


def _by_kind(files: list[Path]) -> list[Source]:
    """Consecutive files of one kind as one source."""
    sources: list[Source] = []
    for file in files:
        suffixes = [s.lower() for s in file.suffixes]
        packed = bool(suffixes) and suffixes[-1] in _PACKED
        inner = suffixes[-1 - packed] if len(suffixes) > packed else ""
        kind = _KINDS.get(inner, "text")
        if packed and kind in ("parquet", "arrow"):
            raise ValueError(f"{file}: unpack it first, {kind} files are compressed inside")
        if sources and sources[-1].kind == kind and kind != "arrow":
            sources[-1] = Source(kind, sources[-1].name, (*sources[-1].files, file))
        else:
            sources.append(Source(kind, str(file), (file,)))
    return sources


def open_source(source: Source, reading: Reading, columns: list[str], cache: Path) -> Any:
    """The source's records as a `datasets.Dataset`, built in the folder `cache` where it has to be converted.

    Records of text files have the columns `text_bytes`, `where` (file, or file:line) and `error` (what kept it from
    being read, or None); those of json and csv files `json_bytes` in its place. Others have their own `columns`.
    Raises ValueError, in one line, when the source cannot be read or lacks one of `columns`.
    """
    import datasets

    if source.kind in ("text", "json", "csv"):
        string = datasets.Value("string")
        features = datasets.Features(
            {_RAW[source.kind]: datasets.Value("large_binary"), "where": string, "error": string}
        )
        arguments = {"kind": source.kind, "files": list(map(str, source.files)), "separator": reading.separator}
        return _generate(source, read_records, arguments, features, cache)
    try:
        data = _load(source, reading, cache)
    except Exception as error:  # the readers raise what their many formats raise
        cause = error.__cause__ or error
        hint = "" if source.files else "no such file or folder, and as a data set of the hub it "
        raise ValueError(f"{source.name}: {hint}cannot be read ({' '.join(str(cause).split())[:300]})") from None
    if isinstance(data, dict):
        wanted = reading.split or "train"
        if wanted not in data:
            raise ValueError(f"{source.name}: no split '{wanted}'; choose --split out of {', '.join(data)}")
        data = data[wanted]
    has = data.column_names
    if has is not None:
        for column in columns:
            if column not in has:
                raise ValueError(f"{source.name}: no field '{column}'; its fields are {', '.join(has)}")
    if isinstance(data, datasets.IterableDataset):
        return _generate(source, _selected, {"data": data, "columns": columns}, None, cache)
    return data.select_columns(columns)


def _load(source: Source, reading: Reading, cache: Path) -> Any:
    import datasets

    if source.kind == "parquet":
        files = list(map(str, source.files))
        return datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(cache))
    if source.kind == "arrow":
        return datasets.Dataset.from_file(str(source.files[0]))
    if source.kind == "saved":
        return datasets.load_from_disk(source.name)
    where = None if reading.streaming else str(cache)
    return datasets.load_dataset(
        source.name, reading.config, split=reading.split or "train", streaming=reading.streaming, cache_dir=where
    )


def _generate(source: Source, function: Any, arguments: dict[str, Any], features: Any, cache: Path) -> Any:
    import datasets

    if next(function(**arguments), None) is None:  # datasets refuses a generator without records
        names = arguments.get("columns") or list(features)
        return datasets.Dataset.from_dict({name: [] for name in names}, features=features)
    try:
        return datasets.Dataset.from_generator(
            function, features=features, gen_kwargs=arguments, cache_dir=str(cache), writer_batch_size=128
        )
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise ValueError(f"{source.name}: cannot be read ({' '.join(str(cause).split())[:300]})") from None


def _selected(data: Any, columns: list[str]) -> Iterator[dict[str, Any]]:
    for record in data:
        yield {column: record.get(column) for column in columns}


def read_records(kind: str, files: list[str], separator: str | None) -> Iterator[dict[str, Any]]:
    """The raw records of text, json or csv files, in order. A file that breaks off gives an error record."""
    readers = {"text": _read_text, "json": _read_json, "csv": _read_csv}
    for file in files:
        where = file
        try:
            for where, raw in readers[kind](Path(file), separator):
                error = str(raw) if isinstance(raw, ValueError) else None
                yield {_RAW[kind]: None if error else raw, "where": where, "error": error}
        except _READ_ERRORS as error:
            rest = "" if where == file else "what follows, to the end of the file, "
            yield {_RAW[kind]: None, "where": where, "error": f"{where}: {rest}cannot be read ({error})"}


# A raw record, or what is wrong with it.
_Records = Iterator[tuple[str, bytes | ValueError]]


def _read_text(file: Path, separator: str | None) -> _Records:
    with _open(file) as stream:
        if separator is None:
            yield str(file), stream.read()
            return
        for number, part in enumerate(_parts(stream, separator.encode()), 1):
            yield f"{file} (document {number})", part


def _parts(stream: IO[bytes], separator: bytes) -> Iterator[bytes]:
    rest = b""
    while chunk := stream.read(_CHUNK):
        *whole, rest = (rest + chunk).split(separator)
        yield from whole
    yield rest


def _read_json(file: Path, _: str | None) -> _Records:
    with _open(file) as stream:
        first = stream.readline()
        if first.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            for number, record in enumerate(_json_array((first + stream.read()).decode("utf-8-sig")), 1):
                yield f"{file} (record {number})", json.dumps(record).encode()
            return
        number, line = 1, first
        while line:
            if line.strip():
                yield f"{file}:{number}", line
            number, line = number + 1, stream.readline()


def _json_array(text: str) -> Iterator[Any]:
    """The elements of a JSON array, one at a time: a mistake in the text costs only the elements after it.

    Raises ValueError at the mistake.
    """
    decoder, space = json.JSONDecoder(), re.compile(r"[ \t\r\n]*")

    def skip(at: int) -> int:
        return space.match(text, at).end()  # type: ignore[union-attr]

    at = skip(text.index("[") + 1)
    if text[at : at + 1] != "]":
        while True:
            element, at = decoder.raw_decode(text, at)
            yield element
            at = skip(at)
            if text[at : at + 1] != ",":
                break
            at = skip(at + 1)
    if text[at : at + 1] != "]" or skip(at + 1) != len(text):
        raise json.JSONDecodeError("expected ',' or the array's end", text, at)


def _read_csv(file: Path, _: str | None) -> _Records:
    # Not through pandas: it would turn texts like "NA" or "1.0" into numbers and missing values.
    delimiter = _TABLES[next(s for s in map(str.lower, reversed(file.suffixes)) if s in _TABLES)]
    csv.field_size_limit(1 << 30)
    # Bytes that are not UTF-8 pass as lone surrogates, which are an error of their own row.
    with (
        _open(file) as stream,
        io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines,
    ):
        rows = csv.DictReader(lines, delimiter=delimiter, strict=True)
        names = rows.fieldnames or ()
        for row in rows:
            where = f"{file}:{rows.line_num}"
            if None in row:
                yield (
                    where,
                    ValueError(f"{where}: more values than the {len(names)} columns; quote what has a delimiter"),
                )
            else:
                yield where, json.dumps({name: row[name] for name in names}).encode()


def _open(file: Path) -> IO[bytes]:
    if file.suffix.lower() == ".gz":
        return gzip.open(file, "rb")  # type: ignore[return-value]
    if file.suffix.lower() == ".zst":
        import zstandard

        reader = zstandard.ZstdDecompressor().stream_reader(file.open("rb"), read_across_frames=True, closefd=True)
        return io.BufferedReader(reader)
    return file.open("rb")


def _read_errors() -> tuple[type[Exception], ...]:
    import zlib

    import zstandard

    return (OSError, EOFError, ValueError, RecursionError, csv.Error, zlib.error, zstandard.ZstdError)


_READ_ERRORS = _read_errors()
