"""What the tests of a run's logs share: a clock that stands still, a disk that is full, and readers of the files."""

import contextlib
import json
import resource
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import speedyzero.run.log as log_module
from speedyzero.run.log import RunLog


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """The clock of the logs. It stands still until a test moves it."""
    clock = Clock()
    assert log_module.monotonic is time.monotonic  # not the time of day, which jumps
    monkeypatch.setattr(log_module, "monotonic", clock)
    return clock


def run_log(run_dir, **options) -> RunLog:
    return RunLog(run_dir, **{"config": {}, "total_env_steps": 20_000, "total_updates": 24_000, "live": False, **options})


def a_row(iteration: int, **others) -> dict:
    return {"env_steps": 8 * iteration, "updates": 4 * iteration, "iteration": iteration, **others}


def rows_of(run_dir: Path) -> list[dict]:
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (run_dir / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(row, parse_constant=refuse) for row in text.splitlines()]


def iterations(run_dir: Path) -> list[int]:
    return [row["iteration"] for row in rows_of(run_dir)]


def board(run_dir: Path) -> EventAccumulator:
    """What TensorBoard reads."""
    return EventAccumulator(str(run_dir / "tensorboard")).Reload()


def curve(run_dir: Path, key: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in board(run_dir).Scalars(key)]


def event_files(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "tensorboard").iterdir())


def said(capsys, word: str) -> list[str]:
    return [text for text in capsys.readouterr().out.splitlines() if word in text]


@contextlib.contextmanager
def file_size_limit(size: int):
    """No file of this process can grow beyond `size` bytes: the part of a write that fits is written, then EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
