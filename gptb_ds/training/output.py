"""Standard output and error that can't end a training run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO


@contextmanager
def forgiving_output() -> Iterator[None]:
    """Inside, whatever is printed by whomever raises nothing: a closed pipe or a full disk costs what was printed."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (None if stream is None else _Forgiving(stream) for stream in before)
    try:
        yield
    finally:
        for stream in before:
            if stream is not None:
                _make_flushable(stream)
        sys.stdout, sys.stderr = before


class _Forgiving:
    """A text stream whose writing never fails."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            _point_at_nothing(self._stream)  # nobody will ever read it
        except (OSError, ValueError):  # a full disk may have room later; ValueError: the stream is closed
            pass
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            _point_at_nothing(self._stream)
        except (OSError, ValueError):
            pass

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def _make_flushable(stream: TextIO) -> None:
    """What is left in the buffer must not fail when the interpreter flushes it: that would be exit code 120."""
    try:
        stream.flush()
    except (OSError, ValueError):
        _point_at_nothing(stream)
        with suppress(OSError, ValueError):
            stream.flush()


def _point_at_nothing(stream: TextIO) -> None:
    with suppress(OSError, ValueError):  # io.UnsupportedOperation is both: no file behind it
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
