"""What a file is: told by its content first, then by its name; and the file opened without its compression."""

from __future__ import annotations

import bz2
import io
import json
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from gptb_ds.data.packed_members import Decompressor, Members

Kind = Literal["text", "json", "table", "parquet", "arrow"]
KIND_NAMES: dict[Kind, str] = {
    "text": "text",
    "json": "JSON records",
    "table": "tables",
    "parquet": "Parquet",
    "arrow": "Arrow",
}
TABLE_DELIMITERS = {".csv": None, ".tsv": "\t", ".tab": "\t", ".psv": "|"}  # None: found out from the content

_BY_NAME: dict[str, Kind] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "table",
    ".tsv": "table",
    ".tab": "table",
    ".psv": "table",
}
_PACKINGS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz"}
_PACKED_NAMES = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}
_ARROW_STREAM = b"\xff\xff\xff\xff"  # what each message of Arrow's format without a footer begins with
_HEAD = 1 << 16

# The first bytes of formats that are not read: what they are, and what to do.
_UNPACK = "unpack it first"
_CONVERT = "convert it to text first"
_REFUSED: list[tuple[bytes, str, str]] = [
    (b"PARE", "an encrypted Parquet file", "decrypt it first"),
    (b"\x89LZO\x00", "lzop-compressed", f"{_UNPACK} (lzop -d)"),
    (b"PK\x03\x04", "a zip archive or office document", f"{_UNPACK} (unzip), or {_CONVERT}"),
    (b"PK\x05\x06", "an empty zip archive", "leave it out"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", f"{_UNPACK} (7z x)"),
    (b"Rar!\x1a\x07", "a rar archive", f"{_UNPACK} (unrar x)"),
    (b"\x04\x22\x4d\x18", "lz4-compressed", f"{_UNPACK} (unlz4)"),
    (b"\x02\x21\x4c\x18", "lz4-compressed", f"{_UNPACK} (unlz4)"),
    (b"\xff\x06\x00\x00sNaPpY", "snappy-compressed", _UNPACK),
    (b"LZIP\x01", "lzip-compressed", f"{_UNPACK} (lzip -d)"),
    (b"\x1f\x9d", "compress-ed (.Z)", f"{_UNPACK} (uncompress)"),
    (b"\x1f\xa0", "compress-ed (.z)", f"{_UNPACK} (gzip -d)"),
    (b"]\x00\x00", "lzma-compressed", f"{_UNPACK} (unlzma)"),
    (b"!<arch>\n", "an ar archive or package", _UNPACK),
    (b"\xed\xab\xee\xdb", "an rpm package", _UNPACK),
    (b"MSCF\x00", "a cab archive", _UNPACK),
    (b"%PDF-", "a PDF document", f"{_CONVERT} (pdftotext)"),
    (b"%!PS", "a PostScript document", f"{_CONVERT} (ps2ascii)"),
    (b"{\\rtf", "an RTF document", _CONVERT),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an office document", _CONVERT),
    (b"AT&TFORM", "a DjVu document", f"{_CONVERT} (djvutxt)"),
    (b"SQLite format 3\x00", "an SQLite database", "export its text first"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", "export its text first"),
    (b"\x93NUMPY", "a NumPy array", "save its tokens as Parquet first"),
    (b"Obj\x01", "an Avro file", "save it as Parquet first"),
    (b"FEA1", "a Feather file of version 1", "save it as Parquet first"),
    (b"WARC/", "a WARC archive of web pages", "extract its texts first (warcio, trafilatura)"),
    (b"<mediawiki", "a dump of a wiki", "extract its texts first (wikiextractor)"),
    (b"version https://git-lfs.", "a pointer of Git LFS, not the file itself", "fetch the file first (git lfs pull)"),
    (b"\x89PNG\r\n", "a picture", "leave it out"),
    (b"\xff\xd8\xff", "a picture", "leave it out"),
    (b"GIF87a", "a picture", "leave it out"),
    (b"GIF89a", "a picture", "leave it out"),
    (b"\x7fELF", "a program", "leave it out"),
    (b"\x00asm", "a program", "leave it out"),
    (b"\xff\xfe\x00\x00", "UTF-32 text", "convert it first (iconv -f UTF-32 -t UTF-8)"),
    (b"\x00\x00\xfe\xff", "UTF-32 text", "convert it first (iconv -f UTF-32 -t UTF-8)"),
    (b"\xff\xfe", "UTF-16 text", "convert it first (iconv -f UTF-16 -t UTF-8)"),
    (b"\xfe\xff", "UTF-16 text", "convert it first (iconv -f UTF-16 -t UTF-8)"),
]


@dataclass(frozen=True)
class Format:
    """How a file is read. `problem`: why it can't be, and the remedy. `looks_like_json`: text that holds JSON lines."""

    kind: Kind
    packing: str | None = None
    problem: str | None = None
    looks_like_json: bool = False


def identify(file: Path) -> Format:
    """The format of a file, by what it holds and what it is called. Never raises: what is wrong is its `problem`."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    named_packing = _PACKED_NAMES.get(suffixes[-1]) if suffixes else None
    suffix = (suffixes[:-1] if named_packing else suffixes)[-1:] or [""]
    kind = _BY_NAME.get(suffix[0], "text")
    try:
        head = _head(file, None)
        packing = _packing(head)
        if named_packing and not packing and head:
            what = f"it holds no {named_packing} data; where it is not compressed, take {suffixes[-1]} off its name"
            return Format(kind, problem=f"cannot be read ({what})")
        if packing:
            head = _head(file, packing)
    except reading_errors() as error:
        return Format(kind, problem=f"cannot be read ({reason(error)})")
    return _of_content(head, suffix[0], kind, packing)


def _of_content(head: bytes, suffix: str, kind: Kind, packing: str | None) -> Format:
    if packing and _packing(head):
        return Format(kind, packing, "packed twice: unpack it once")
    if _is_tar(head):
        packed = "a compressed tar archive" if packing else "a tar archive"
        return Format(kind, packing, f"{packed}: {_UNPACK} (tar -xf)")
    if head[:5] == b"07070" and all(byte in b"0123456789abcdefABCDEF" for byte in head[:110]) and len(head) > 110:
        return Format(kind, packing, f"a cpio archive: {_UNPACK} (cpio -i)")
    if kind == "parquet" and head and not head.startswith((b"PAR1", b"PARE")):
        return Format(kind, packing, "cannot be read (it does not begin as a Parquet file does)")
    for start, what, remedy in _REFUSED:
        if head.startswith(start):
            return Format(kind, packing, f"{what}: {remedy}")
    columns: dict[bytes, Kind] = {b"PAR1": "parquet", b"ARROW1": "arrow", _ARROW_STREAM: "arrow"}
    for start, named in columns.items():
        if head.startswith(start):
            problem = f"unpack it first, {named} files are compressed inside" if packing else None
            return Format(named, packing, problem)
    if kind == "arrow":
        return Format(kind, packing, f"unpack it first, {kind} files are compressed inside" if packing else None)
    if head.count(0) > len(head) // 10:
        return Format(kind, packing, "not text (every tenth byte is 0): leave it out, or convert it to UTF-8 text")
    if kind == "text" and _holds_json(head):
        # A name without an ending says nothing; one that ends in .txt or .md says text.
        return Format("json", packing) if suffix.strip(".0123456789-") == "" else Format(kind, packing, None, True)
    return Format(kind, packing)


def _decompressors(packing: str) -> Callable[[], Decompressor]:
    """What makes a decompressor for each member of a file."""
    if packing == "gzip":
        return lambda: zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    if packing == "bzip2":
        return bz2.BZ2Decompressor
    if packing == "xz":
        return lzma.LZMADecompressor
    import zstandard

    # The library refuses windows above 128 MiB (zstd --long=28 and more) unless it is told that they may be.
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj


def unpacked(file: Path, packing: str | None) -> IO[bytes]:
    """The file's content, read through the decompression of `packing`: all members or frames one after another."""
    if packing:
        return io.BufferedReader(Members(file.open("rb"), _decompressors(packing)), 1 << 20)
    return file.open("rb")


def reading_errors() -> tuple[type[Exception], ...]:
    """What opening and reading a file can raise, whatever its format."""
    import zstandard

    return (OSError, EOFError, ValueError, RecursionError, zlib.error, lzma.LZMAError, zstandard.ZstdError)


def reason(error: BaseException) -> str:
    """An exception as part of a line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:300] or type(error).__name__


def listed(names: Iterable[object]) -> str:
    """Names of fields for one line: the first of many, with what can't be printed as escapes."""
    found = [str(name) for name in names]
    shown = [_printable(name) if len(name) <= 80 else f"{_printable(name[:80])}.." for name in found[:20]]
    return ", ".join(shown) + (f" and {len(found) - 20:,} more" if len(found) > 20 else "")


def _printable(text: str) -> str:
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def _head(file: Path, packing: str | None) -> bytes:
    head = b""
    with unpacked(file, packing) as stream:
        while len(head) < _HEAD and (part := stream.read(_HEAD - len(head))):
            head += part
    return head


def _packing(head: bytes) -> str | None:
    if head[:4] in {bytes([byte]) + b"\x2a\x4d\x18" for byte in range(0x50, 0x60)}:
        return "zstd"  # a frame to be skipped, as pzstd begins its files
    found = next((name for start, name in _PACKINGS.items() if head.startswith(start)), None)
    if found == "bzip2" and head[4:10] not in (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90"):
        return None
    return found


def _is_tar(head: bytes) -> bool:
    """Whether it begins with the header of a tar member: its checksum says so, of old archives as well."""
    try:
        tarfile.TarInfo.frombuf(head[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _holds_json(head: bytes) -> bool:
    """Whether it holds JSON records: its first lines are objects, or it begins with an object or an array of them.

    A line that the head cuts off does not count.
    """
    text = head.removeprefix(b"\xef\xbb\xbf")
    lines = text.split(b"\n")
    whole = [line for line in (lines[:-1] if len(head) == _HEAD else lines) if line.strip()][:3]
    try:
        if whole and all(isinstance(json.loads(line), dict) for line in whole):
            return True
    except (ValueError, RecursionError):
        pass
    begun = text.decode(errors="ignore").strip().removeprefix("[").lstrip()
    try:
        value, end = json.JSONDecoder().raw_decode(begun)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and bool(value) and begun[end:].lstrip()[:1] in ("", ",", "]", "{")
