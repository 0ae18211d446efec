"""A run of `python -m speedyzero` as a process of its own: the tree that this file lies in, its output in a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from time import monotonic

ROOT = Path(__file__).resolve().parents[2]


class Run:
    """One process.

    flags: of `python -m speedyzero`; --run-dir absolute. output: gets what it says; what was there is kept, and not part of `said`.
    """

    def __init__(self, flags: list[str], output: Path):
        self._output = output
        self._begin = output.stat().st_size if output.exists() else 0
        paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        self.flags, self.started = flags, monotonic()
        with open(output, "ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "speedyzero", *flags], stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, cwd=ROOT,
            )  # fmt: skip

    def said(self) -> str:
        """All that it said so far."""
        with open(self._output, "rb") as file:
            file.seek(self._begin)
            return file.read().decode(errors="replace")

    def last_line(self) -> str:
        """The last line that it said, or that it said nothing."""
        lines = self.said().split("\n")
        return next((line for line in reversed(lines) if line.strip()), "it said nothing")

    def end(self) -> None:
        """Kill it if it still runs, and wait until it is gone."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def given(flags: list[str], name: str) -> bool:
    """Whether a flag is among those of a command line, in either of its forms."""
    return any(flag.partition("=")[0] in (f"--{name}", f"--no-{name}") for flag in flags)


def rows_of(text: bytes) -> tuple[list[dict], list[str]]:
    """The rows of a metrics.jsonl, and what is wrong with its lines; of the last, a part will do: a kill may have torn it."""
    rows, wrong = [], []
    lines = text.split(b"\n")
    for number, line in enumerate(lines, 1):
        if number == len(lines):
            break  # empty, or torn
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not all(type(row.get(name)) is int for name in ("iteration", "env_steps", "updates")):
                raise ValueError("not a row")
            rows.append(row)
        except ValueError as error:
            wrong.append(f"line {number}: {error}: {line[:40]!r}")
    return rows, wrong


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder and below, whatever vanishes meanwhile; 0 if there is none."""
    total = 0
    for file in [path, *path.rglob("*")]:
        try:
            total += file.stat().st_size if file.is_file() else 0
        except OSError:
            continue
    return total
