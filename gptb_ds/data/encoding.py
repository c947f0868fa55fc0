"""The way from a raw record to a document: its fields, its tokens, which targets count, what is wrong with it.

Axes: n tokens of a document.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from gptb_ds.data import tokenization
from gptb_ds.data.formats import listed
from gptb_ds.data.json_values import Repeated, decode
from gptb_ds.data.record import Record

Fielded = Mapping[str, object]  # a record's fields by name

IGNORED = -100  # the label of a target that does not count, as in transformers


@dataclass(frozen=True)
class Fields:
    """Names of a record's fields. Text with an optional prompt that is read but not counted, or tokens with a mask."""

    text: str = "text"
    prompt: str | None = None
    ids: str | None = None
    labels: str | None = None
    loss_mask: str | None = None

    def names(self) -> list[str]:
        """The fields that a record must have."""
        wanted = (self.ids, self.labels, self.loss_mask) if self.ids else (self.prompt, self.text)
        return [name for name in wanted if name is not None]

    @property
    def weighted(self) -> bool:
        """Whether records say which targets count."""
        return any((self.prompt, self.labels, self.loss_mask))


@dataclass(frozen=True)
class Encoded:
    """A document as the store's writer takes it, or `error`, why the record could not be used.

    `tokens`: the n ids as bytes of the store's type; `counted`: n+1 bytes, for the tokens and the closing EOT, None
    without loss weights; `size`: bytes of text; `key`: 63 bits that the held-out split is drawn by.
    """

    tokens: bytes = b""
    counted: bytes | None = None
    size: int = 0
    key: int = 0
    error: str | None = None


class Encoder:
    """Raw records -> tokens."""

    def __init__(self, tokenizer: tokenization.Tokenizer, fields: Fields, stop_on_error: bool) -> None:
        self.tokenizer, self.fields, self.stop_on_error = tokenizer, fields, stop_on_error
        self.eot = tokenization.eot_id(tokenizer)
        self.vocab_size = tokenization.vocab_size(tokenizer)
        self.dtype: Literal["uint16", "uint32"] = "uint16" if self.vocab_size <= 1 << 16 else "uint32"

    def __call__(self, records: list[Record]) -> list[Encoded]:
        """Raises ValueError for the first bad record when it is to stop there."""
        documents = list(read_documents(records, self.fields))
        if self.fields.ids is None:
            rows = self._encode_texts(documents)
        else:
            rows = [self._encode_ids(document) for document in documents]
        for row in rows:
            if self.stop_on_error and row.error:
                raise ValueError(row.error)
        return rows

    def _encode_texts(self, documents: list[Document]) -> list[Encoded]:
        good = [number for number, document in enumerate(documents) if not document.error]
        ids = tokenization.encode(self.tokenizer, [documents[number].text for number in good])
        prompts: Sequence[npt.NDArray[np.integer] | None] = [None] * len(good)
        if self.fields.prompt:
            prompts = tokenization.encode(self.tokenizer, [documents[number].prompt for number in good])
        rows = [Encoded(error=document.error) for document in documents]
        for number, answer, prompt in zip(good, ids, prompts, strict=True):
            content = documents[number].content()
            counted = None
            if prompt is not None:
                counted = np.ones(len(prompt) + len(answer) + 1, dtype=np.uint8)
                counted[: len(prompt)] = 0
                answer = np.concatenate([prompt, answer])
            rows[number] = self._filled(answer, counted, len(content), content)
        return rows

    def _encode_ids(self, document: Document) -> Encoded:
        if document.error:
            return Encoded(error=document.error)
        ids, counted = document.ids, document.counted
        assert ids is not None
        if len(ids) and (ids.min() < 0 or ids.max() >= self.vocab_size):
            worst = int(ids.min() if ids.min() < 0 else ids.max())
            return Encoded(
                error=f"{document.where}: token id {worst} is outside the vocabulary of {self.vocab_size};"
                " give the tokenizer that made the tokens"
            )
        if counted is not None and len(counted) == len(ids):
            # The closing EOT counts as the last token does.
            counted = np.append(counted, counted[-1:] if len(counted) else np.uint8(0))
        if len(ids) and ids[-1] == self.eot:  # ours is added when it is read
            ids, counted = ids[:-1], None if counted is None else counted[:-1]
        if len(ids) and ids[0] == self.eot:
            ids, counted = ids[1:], None if counted is None else counted[1:]
        return self._filled(ids, counted, tokenization.size_of_text(self.tokenizer, ids), ids.tobytes())

    def _filled(
        self, ids: npt.NDArray[np.integer], counted: npt.NDArray[np.uint8] | None, size: int, content: bytes
    ) -> Encoded:
        tokens = ids.astype(self.dtype, copy=False).tobytes()
        return Encoded(tokens, None if counted is None else counted.tobytes(), size, held_out_key(content))


@dataclass
class Document:
    """A record that was understood, or what is wrong with it."""

    where: str
    error: str | None = None
    text: str = ""
    prompt: str = ""
    ids: npt.NDArray[np.int64] | None = None
    counted: npt.NDArray[np.uint8] | None = None

    def content(self) -> bytes:
        """The UTF-8 text, prompt included."""
        return (self.prompt + self.text).encode()


def held_out_key(content: bytes) -> int:
    """63 bits drawn by a document's content; the held-out split takes the lowest."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8, key=b"gptb-ds held-out").digest(), "little") >> 1


def read_documents(records: Iterable[Record], fields: Fields) -> Iterator[Document]:
    """The document of each record, or what is wrong with it, as text that can be printed."""
    for record in records:
        try:
            if record.error:
                raise ValueError(record.error)
            content: Fielded
            if not isinstance(record.content, bytes):
                content = _checked(record.content, record.where)
            elif record.kind == "json":
                content = _parse(record.content, record.where, fields)
            else:
                content = {fields.text: _decode(record.content, record.where)}
            yield _understand(content, record.where, fields)
        except ValueError as error:
            # A field's name may hold half a character, which can be neither printed nor written.
            yield Document(record.where, error=str(error).encode(errors="backslashreplace").decode())


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8 at byte {error.start}; convert it, name the text files alone with a glob, or leave"
            " such documents out with --on-error skip"
        ) from None


def _parse(raw: bytes, where: str, fields: Fields) -> Fielded:
    text = _decode(raw, where)
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: broken JSON line ({error.msg} at character {error.pos + 1})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or brackets in brackets
        raise ValueError(f"{where}: broken JSON line ({error})") from None
    if any(text.count(f'"{name}"') > 1 for name in fields.names()):
        record, _ = decode(text.strip(), 0, fields.names())
    return _checked(record, where)


def _checked(record: object, where: str) -> Fielded:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a JSON record must be an object with fields, not {type(record).__name__}")
    return record


def _understand(record: Fielded, where: str, fields: Fields) -> Document:
    for name in fields.names():
        if isinstance(record.get(name), Repeated):
            raise ValueError(f"{where}: the field '{name}' is there more than once")
        if record.get(name) is None:
            has = listed(key for key, value in record.items() if value is not None) or "none"
            raise ValueError(f"{where}: no field '{name}' (it has {has}); name the field with its option")
    if fields.ids:
        return _token_document(record, where, fields)
    texts = []
    for field in (fields.text, fields.prompt):
        value = record[field] if field else ""
        if not isinstance(value, str):
            raise ValueError(f"{where}: the field '{field}' is {type(value).__name__}, not text")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            escaped = "\udc80" <= value[error.start] <= "\udcff"  # how a byte that is not UTF-8 is read
            wrong = "is not UTF-8" if escaped else "has a lone surrogate"
            raise ValueError(f"{where}: the field '{field}' {wrong} at character {error.start}: not Unicode") from None
        texts.append(value)
    return Document(where, text=texts[0], prompt=texts[1])


def _token_document(record: Fielded, where: str, fields: Fields) -> Document:
    assert fields.ids is not None
    ids = _numbers(record, fields.ids, where)
    counted = None
    for name in (fields.labels, fields.loss_mask):
        if name is None:
            continue
        values = _numbers(record, name, where)
        extra = len(values) - len(ids)
        if extra and not (name == fields.loss_mask and extra == 1):
            raise ValueError(f"{where}: '{name}' has {len(values)} entries for {len(ids)} tokens")
        counts = values != (IGNORED if name == fields.labels else 0)
        if name == fields.loss_mask and ((values < 0) | (values > 1)).any():
            raise ValueError(f"{where}: '{name}' has other numbers than 0 and 1; a token counts or it does not")
        if name == fields.labels and (values[counts] != ids[counts]).any():
            raise ValueError(
                f"{where}: '{name}' must repeat '{fields.ids}' or be {IGNORED} where a token does not count"
            )
        counted = counts.astype(np.uint8)
    return Document(where, ids=ids, counted=counted)


def _numbers(record: Fielded, name: str, where: str) -> npt.NDArray[np.int64]:
    try:
        values = np.asarray(record[name])
        if values.ndim == 1 and (values.dtype.kind in "iub" or not values.size):
            return values.astype(np.int64)
    except (ValueError, OverflowError):
        pass
    raise ValueError(f"{where}: the field '{name}' must be a list of whole numbers")
