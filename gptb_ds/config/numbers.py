"""Numbers that a user gave: those that are too small, and the choices that there are."""

from __future__ import annotations

from math import isqrt


def below_one(options: object, *names: str) -> list[str]:
    """A line for each of these options of a verb that was given and is below 1."""
    values = [(name, getattr(options, name)) for name in names]
    return [
        f"--{name.replace('_', '-')} {value}: must be at least 1"
        for name, value in values
        if value is not None and value < 1
    ]


def divisors(n: int) -> list[int]:
    """All divisors of `n`, ascending: the valid choices that a message names."""
    small = [d for d in range(1, isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})
