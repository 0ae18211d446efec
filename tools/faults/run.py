"""A run of `python -m speedyzero` as processes of its own, from the checkout that this file lies in, its output in a file."""

from __future__ import annotations

import contextlib
import io
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import monotonic, sleep

from speedyzero.run.rows import read_rows

ROOT = Path(__file__).resolve().parents[2]


GONE_S = 120.0
"""Seconds after a signal in which a process must have saved and ended."""


def environment() -> dict[str, str]:
    """This process's variables, with this checkout first on the path of Python."""
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


class Run:
    """One process. `flags`: of `python -m speedyzero`, --run-dir absolute. What it prints is appended to the file `output`.

    torchrun: flags of torchrun, which then is the process, and starts the ranks. Linux only.
    """

    def __init__(self, flags: list[str], output: Path, torchrun: Sequence[str] = ()):
        self._output, self._over_ranks = output, bool(torchrun)
        self._watched: dict[int, int] = {}
        """By process: a file that can be read when it has ended."""
        self.flags = flags
        self.begin()
        launcher = ["-m", "torch.distributed.run", *torchrun] if torchrun else []
        command = [sys.executable, *launcher, "-m", "speedyzero", *flags]
        with open(output, "ab") as file:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment(), cwd=ROOT)

    def begin(self) -> None:
        """Begin to count time and output, as if it started now."""
        self.started, self._begin = monotonic(), self._output.stat().st_size if self._output.exists() else 0

    def pids(self) -> dict[int, int]:
        """The processes that torchrun has at present, by their rank."""
        found = {}
        with contextlib.suppress(OSError):  # it may end, and they, at any time
            for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
                with contextlib.suppress(OSError):
                    names = dict(pair.partition(b"=")[::2] for pair in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
                    if b"RANK" in names:
                        found[int(names[b"RANK"])] = int(pid)
        return found

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Within the block torchrun neither starts a process nor answers one. Without ranks nothing is frozen."""
        if self._over_ranks:
            self.process.send_signal(signal.SIGSTOP)
            while self.process.poll() is None and _state(self.process.pid) not in "Tt":
                sleep(0.001)
        yield
        if self._over_ranks:
            self.process.send_signal(signal.SIGCONT)

    def strike(self, number: signal.Signals, rank: int | None = None, limit_s: float = 60.0) -> bool:
        """Send a signal to the process, or to one rank once it is there; whether it was."""
        while rank is not None and rank not in self.pids() and self.process.poll() is None and monotonic() < self.started + limit_s:
            sleep(0.01)
        with self.frozen():
            pids = self.pids()
            self._watched |= {pid: os.pidfd_open(pid) for pid in pids.values() if pid not in self._watched}
            if rank is None:
                self.process.send_signal(number)
            elif rank in pids:
                signal.pidfd_send_signal(self._watched[pids[rank]], number)
        return rank is None or rank in pids

    def wait_gone(self, limit_s: float) -> list[int]:
        """Wait until all ranks there were at the strike have ended; returns the processes that have not in time."""
        end = monotonic() + limit_s
        while self._watched:
            ended = select.select(list(self._watched.values()), [], [], max(0.0, end - monotonic()))[0]
            if not ended:
                break
            for pid in [pid for pid, file in self._watched.items() if file in ended]:
                os.close(self._watched.pop(pid))
        return list(self._watched)

    def said(self) -> str:
        """All that this process printed so far."""
        return self._output.read_bytes()[self._begin :].decode(errors="replace")

    def last_line(self) -> str:
        """The last line that it printed."""
        return next((line for line in reversed(self.said().split("\n")) if line.strip()), "it said nothing")

    def end(self) -> None:
        """Kill it if it still runs, and its ranks, and wait until they are gone."""
        self.strike(signal.SIGKILL)
        for file in self._watched.values():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(file, signal.SIGKILL)
        self.process.wait()
        self.wait_gone(GONE_S)


def _state(pid: int) -> str:
    """The letter that the kernel has for what a process does, as T: stopped; empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


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
