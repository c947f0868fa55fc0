"""What several verbs need of argparse."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TypeVar

Options = TypeVar("Options")


def options_of(kind: type[Options], args: argparse.Namespace) -> Options:
    """The options object `kind` (a dataclass) out of the arguments of the same names."""
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**values)
