"""A run of `python -m speedyzero` in a process of its own, from the checkout that this file lies in, its output in a file."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from time import monotonic

from speedyzero.run.rows import read_rows

ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    """This process's variables, with this checkout first on the path of Python."""
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


class Run:
    """One process. `flags`: of `python -m speedyzero`, --run-dir absolute. What it prints is appended to the file `output`."""

    def __init__(self, flags: list[str], output: Path):
        self._output = output
        self._begin = output.stat().st_size if output.exists() else 0
        self.flags, self.started = flags, monotonic()
        with open(output, "ab") as file:
            command = [sys.executable, "-m", "speedyzero", *flags]
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment(), cwd=ROOT)

    def said(self) -> str:
        """All that this process printed so far."""
        return self._output.read_bytes()[self._begin :].decode(errors="replace")

    def last_line(self) -> str:
        """The last line that it printed."""
        return next((line for line in reversed(self.said().split("\n")) if line.strip()), "it said nothing")

    def end(self) -> None:
        """Kill it if it still runs, and wait until it is gone."""
        self.process.kill()
        self.process.wait()


def given(flags: list[str], name: str) -> bool:
    """Whether a flag is on a command line, in either of its forms."""
    return any(flag.partition("=")[0] in (f"--{name}", f"--no-{name}") for flag in flags)


def with_defaults(flags: list[str], defaults: dict[str, object]) -> list[str]:
    """The flags, and those of `defaults` that are not among them."""
    return [*flags, *(f"--{name}={value}" for name, value in defaults.items() if not given(flags, name))]


def rows_of(text: bytes) -> tuple[list[dict], list[str]]:
    """The rows of a metrics.jsonl, and what is wrong with its lines. After the last newline a torn line is no fault."""
    lines = [(line, row) for line, row in read_rows(io.BytesIO(text)) if line.endswith(b"\n")]
    wrong = [f"line {number}: not a row: {line[:40]!r}" for number, (line, row) in enumerate(lines, 1) if row is None]
    return [row for _, row in lines if row is not None], wrong


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder. Files that vanish meanwhile count as 0."""
    total = 0
    for file in [path, *path.rglob("*")]:
        try:
            total += file.stat().st_size if file.is_file() else 0
        except OSError:
            continue
    return total
