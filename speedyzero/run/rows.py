"""The file of a run's rows, `metrics.jsonl`: a JSON object a line, of which a killed process may leave a part."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from speedyzero.run.files import replacing

COUNTS = ("env_steps", "updates", "iteration")
"""Keys that every row must have; `wall_s`, the rates and `time/eta_s` are added."""

LONGEST = 1 << 20
"""Bytes of the longest row that is read back."""

MOST_S = 1e9
"""Seconds of the longest run whose clock is believed: thirty years."""

MOST_COUNT = 2**63 - 1


def append(path: Path, text: bytes) -> None:
    """Append `text` to a file, and make it and its directory if need be; what a full disk took of it is cut off again. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as file:
        size = file.seek(0, 2)
        try:
            while text:  # a disk that fills takes a part first
                text = text[file.write(text) :]
        except OSError:
            with suppress(OSError):
                file.truncate(size)
            raise


def keep_rows(path: Path, resume_at: int | None) -> tuple[dict[str, Any], int]:
    """Drop from `path` every row after iteration `resume_at`, what a killed run tore, and what is not a row or repeats one.

    Returns the last row kept ({} if none) and how many lines were unreadable or repeated; a torn last one is not counted.
    """
    if not path.exists() or path.stat().st_size == 0:
        return {}, 0
    if resume_at is None:
        raise FileExistsError(f"{path} already holds a run; resume it, or start with another --run-dir")
    last: dict[str, Any] = {}
    seen: set[int] = set()
    dropped = 0
    with open(path, "rb") as old, replacing(path) as new:
        for text, row in read_rows(old):
            if row is None or row["iteration"] in seen:
                dropped += text.endswith(b"\n")
            elif row["iteration"] <= resume_at:
                new.write(text.rstrip(b"\n") + b"\n")
                seen.add(row["iteration"])
                last = row
    return last, dropped


def read_rows(file: BinaryIO) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Every line of a file and the row that it holds, if it is one: a JSON object of numbers whose counts and clock can be gone on
    from; a number that was not finite is null.

    A line of LONGEST bytes or more comes in pieces.
    """
    while text := file.readline(LONGEST):
        row = None
        with suppress(ValueError, RecursionError):
            row = json.loads(text.decode(), parse_constant=_refuse)
        if not (
            isinstance(row, dict)
            and all(type(row.get(key)) is int and 0 <= row[key] <= MOST_COUNT for key in COUNTS)
            and type(row.get("wall_s")) in (int, float)
            and 0 <= row["wall_s"] <= MOST_S
            and all(value is None or type(value) in (int, float) for value in row.values())
        ):
            row = None
        yield text, row


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
