"""How files reach the disk: whole or not at all, and checksummed."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Gives a temporary path to write to; afterwards its content is on the disk under `path`, all of it or nothing.

    Raises OSError (disk full, say), which names `path`, after removing the temporary file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        mode = usual_mode(path.parent)
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_path(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def usual_mode(folder: Path) -> int:
    """The permissions of a new file in `folder`: what the umask leaves.

    safetensors 0.8 (`save_file`) writes into a temporary file that only its owner may read, and renames it: without
    this, nobody else in a group could load a checkpoint or an export.
    """
    probe = folder / f".mode.{os.getpid()}.{threading.get_ident()}.tmp"
    try:
        descriptor = os.open(probe, os.O_CREAT | os.O_WRONLY, 0o666)
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        os.close(descriptor)
        return mode
    finally:
        probe.unlink(missing_ok=True)


def replace_file(path: Path, content: bytes) -> None:
    """Writes `content` under `path`, all of it or nothing."""
    with write_atomically(path) as temporary:
        temporary.write_bytes(content)


def sync_path(path: Path) -> None:
    """Puts a file's content, or the names in a folder, on the disk: a rename is not there before."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
