"""The records of a JSON file in each of its forms: lines, an array, objects one after another, lists inside one."""

from __future__ import annotations

import codecs
import io
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import IO, cast

from gptb_ds.data.json_values import JsonValues, decode, unfinished
from gptb_ds.data.record import Record

_CHUNK = 1 << 20  # bytes that are looked through at once


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
