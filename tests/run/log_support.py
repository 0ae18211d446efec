"""What the tests of a run's logs share: a clock that stands still, a disk that is full, accidents to a file, and what is in the files."""

import contextlib
import random
import resource
import time
from pathlib import Path

import speedyzero.run.log as log_module
from tests.run.test_log import Clock, rows_of


def clock_of(monkeypatch) -> Clock:
    """The clock of the logs, which goes on when a test says so."""
    clock = Clock()
    assert log_module.monotonic is time.monotonic  # what it stands for: not the time of day, which jumps
    monkeypatch.setattr(log_module, "monotonic", clock)
    return clock


@contextlib.contextmanager
def file_size_limit(size: int):
    """No file of this process can grow beyond `size` bytes: the part of a write that fits is written, then EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def iterations(run_dir: Path) -> list[int]:
    return [row["iteration"] for row in rows_of(run_dir)]


def event_files(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "tensorboard").iterdir())


def said(capsys, word: str) -> list[str]:
    return [text for text in capsys.readouterr().out.splitlines() if word in text]


def mutated(data: bytes, chance: random.Random) -> bytes:
    """`data` after one to four accidents."""
    for _ in range(chance.randint(1, 4)):
        kind = chance.randrange(8)
        at = chance.randrange(len(data) + 1)
        lines = data.splitlines(keepends=True)
        if kind == 0 and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at]
        elif kind == 2 and len(lines) > 1:
            i, j = chance.sample(range(len(lines)), 2)
            lines[i], lines[j] = lines[j], lines[i]
            data = b"".join(lines)
        elif kind == 3 and lines:
            lines.insert(chance.randrange(len(lines)), chance.choice(lines))
            data = b"".join(lines)
        elif kind == 4:
            data = data[:at] + chance.randbytes(chance.randint(1, 40)) + data[at:]
        elif kind == 5:
            words = [b"NaN", b"1e999", b"-", b'"', b"}\n{", b"\0" * 9, b"[" * 3000, b"true", b"9" * 30]
            data = data[:at] + chance.choice(words) + data[at:]
        elif kind == 6:
            data = data[:at] + data[at + chance.randint(1, 30) :]
        else:
            data = data[:at] + bytes(len(data[at : at + 64])) + data[at + 64 :]
    return data
