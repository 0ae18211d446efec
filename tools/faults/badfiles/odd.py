"""Values that a JSON file may hold where something sensible belongs."""

from __future__ import annotations

from random import Random
from typing import Any

NESTED = 100_000
"""Levels of brackets: far more than any reader of JSON follows."""

_ODD = (
    None, True, False, 0, 1, -1, 2**31, 2**48, 2**63, -(2**63) - 1, 10**400, 0.0, -0.0, 0.5, 1e308, -1e308, 1e-320,
    float("nan"), float("inf"), float("-inf"), "", "x", "1", "nan", "two\nlines", "\ud800", "\x00", "\x1b[2J", "ä" * 300_000,
    [], [0], [[]], {}, {"a": 1}, {"": None},
)  # fmt: skip


def value(random: Random) -> Any:
    """Any of them."""
    return random.choice((*_ODD, nested(random.randint(2, 400)), [0] * 100_000, random.randint(-(10**6), 10**6)))


def nested(levels: int) -> list:
    """A list in a list in a list."""
    inner: list = []
    for _ in range(levels - 1):
        inner = [inner]
    return inner


def told(value: object) -> str:
    """The value for a note, however large."""
    text = ascii(value) if not isinstance(value, list | dict) else f"{type(value).__name__} of {len(value)}"
    return text if len(text) < 60 else f"{text[:40]}... ({len(text)})"
