"""A compressed file read as its members (of bzip2 and xz: streams, of zstd: frames), of which none may be cut off."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, BinaryIO, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed import WriteableBuffer

# Bytes that are decompressed at once: 128 KiB of equal bytes take four bytes of zstd, so this is 128 MiB at the worst.
_CHUNK = 1 << 12


class Decompressor(Protocol):
    """Decompresses one member. `unused_data`: what was given to it beyond its end."""

    def decompress(self, data: bytes, /) -> bytes: ...

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...


class Members(io.RawIOBase):
    """The content of all members, one after another. Bytes of 0 between and behind them are passed over.

    Reading raises EOFError where the last member is cut off, and what the decompressor raises where something else
    follows a member. The libraries' own readers lose both without a word: zstandard 0.25's `stream_reader` ends where
    the file does, and `bz2.BZ2File` and `lzma.LZMAFile` (Python 3.11) end at the first member that can't be read.
    `gzip.GzipFile` raises, but keeps back what it has read just before.
    """

    def __init__(self, file: BinaryIO, new: Callable[[], Decompressor]) -> None:
        self._file, self._new = file, new
        self._member: Decompressor | None = None
        self._packed, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        wanted = memoryview(buffer).cast("B")
        while not self._ready:
            if not self._advance():
                return 0
        count = min(len(wanted), len(self._ready))
        wanted[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()

    def _advance(self) -> bool:
        """Decompresses some more; whether there was more."""
        packed, self._packed = self._packed or self._file.read(_CHUNK), b""
        if not packed:
            if self._member is not None:
                raise EOFError("it is cut off: its compressed data has no end")
            return False
        if self._member is None:
            packed = packed.lstrip(b"\0")
            if not packed:
                return True
            self._member = self._new()
        self._ready = memoryview(self._member.decompress(packed))
        if self._member.eof:
            self._packed, self._member = self._member.unused_data, None
        return True
