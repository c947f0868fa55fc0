"""Owns what several verbs check of their options."""

from __future__ import annotations

import argparse


def below_one(args: argparse.Namespace, *names: str) -> list[str]:
    """A line for each of these options that was given and is below 1."""
    values = [(name, getattr(args, name.replace("-", "_"))) for name in names]
    return [f"--{name} {value}: must be at least 1" for name, value in values if value is not None and value < 1]
