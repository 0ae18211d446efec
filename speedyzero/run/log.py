"""What a run tells the world: `metrics.jsonl`, TensorBoard events, and the progress display. The host's last step.

A row is one dictionary of numbers. Its keys are those of the field (`charts/episodic_return`, `losses/value_loss`).
What depends on the clock is in `wall_s` and under `time/` and nowhere else, so that two runs of one seed can be
compared row by row. Nothing that happens to a log ends a run: what cannot be written is lost, and one line says so.
"""

import json
import math
import operator
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any, BinaryIO

from rich.console import Console
from rich.live import Live
from rich.panel import Panel

from speedyzero.run.display import Progress, line, panel
from speedyzero.run.events import event_head, event_path, row_event, superseded
from speedyzero.run.files import replacing
from speedyzero.run.records import LONGEST, RecordFile

COUNTS = ("env_steps", "updates", "iteration")
"""Keys that every row must have; `wall_s`, the rates and `time/eta_s` are added."""

LINE_S = 10.0
"""Least seconds between two printed lines where there is no terminal."""

RATE_S = 60.0
"""Rates are means over about this many seconds."""

METRICS = "metrics.jsonl"

MOST_S = 1e9
"""Seconds of the longest run whose clock is believed: thirty years."""

MOST_COUNT = 2**63 - 1


class RunLog:
    """The three logs of one run, in `run_dir`: `metrics.jsonl`, `tensorboard/`, and the terminal.

    total_env_steps, total_updates: where the run ends; they scale the progress bar and the ETA.
    live: draw the panel (True) or print plain lines (False); by default, whether stdout is a terminal.
    resume_at: the iteration of the checkpoint that the run goes on from (-1 keeps nothing). Later rows are dropped,
        from `metrics.jsonl` and in TensorBoard's eyes, and `wall_s` goes on from the last row kept.

    TensorBoard's steps are iterations: the only count that grows in every phase; `env_steps` and `updates` are among its curves.
    A row of 24 metrics takes 0.9 KB in `metrics.jsonl` and 0.7 KB in TensorBoard, and there is one for every `log_interval`
    iterations and one at the end. A resumed run begins an event file; those of lives of which nothing was kept are deleted then.

    Once it is made, no fault of a file or of the terminal raises: rows are lost while the disk is full, a deleted directory is
    made anew, output that nobody can read is dropped. Nothing is open between two rows. Raises, when made:
        FileExistsError: `run_dir` holds rows and `resume_at` is not given.
        OSError: `run_dir` cannot be written.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        total_env_steps: int,
        total_updates: int,
        live: bool | None = None,
        resume_at: int | None = None,
    ) -> None:
        self._dir = run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        path, events = run_dir / METRICS, run_dir / "tensorboard"
        self.total_env_steps = total_env_steps
        self.total_updates = total_updates
        last, dropped = _keep_rows(path, resume_at)
        self._start = monotonic() - last.get("wall_s", 0.0)
        mark = (self.wall_s, last.get("env_steps", 0), last.get("updates", 0))
        self._marks = deque([mark])  # (wall_s, env_steps, updates) of the rows that the rates are taken over
        self._progress = self._progress_at(last.get("iteration", 0), {})
        old_files, purge_from = ([], None) if resume_at is None else superseded(events, resume_at)
        self._rows = RecordFile(METRICS, lambda: path, end=b"\n")
        self._events = RecordFile("tensorboard", lambda: event_path(events), head=event_head(purge_from))
        for old in old_files:  # not before there is a file that hides what they hid
            with suppress(OSError):
                old.unlink()
        self._said_at = -math.inf
        self._unsaid = False
        self._closed = False
        self._console = Console(highlight=False, force_terminal=True if live else None)
        self._live = None
        if live is None:
            live = self._console.is_terminal and not self._console.is_dumb_terminal
        if live:
            display = Live(get_renderable=self._panel, console=self._console, refresh_per_second=2)
            with _unread():
                display.start()
                self._live = display
        if dropped:
            self.message(f"{path}: dropped {dropped} unreadable or repeated rows")

    def row(self, metrics: Mapping[str, float | int]) -> None:
        """Log one row: `metrics` with at least `env_steps`, `updates` and `iteration`. A tensor in it costs a sync."""
        missing = [key for key in COUNTS if key not in metrics]
        if missing:
            raise ValueError(f"a row of metrics lacks {', '.join(missing)}")
        numbers = {key: _number(value) for key, value in metrics.items()}
        self._marks.append((self.wall_s, numbers["env_steps"], numbers["updates"]))
        while self._marks[1][0] <= self._marks[-1][0] - RATE_S:
            self._marks.popleft()
        others = {key: value for key, value in numbers.items() if key not in COUNTS}
        self._progress = now = self._progress_at(numbers["iteration"], {**self._progress.metrics, **others})
        row = {key: numbers[key] for key in COUNTS} | {"wall_s": round(self._marks[-1][0], 3)} | others
        row["time/env_steps_per_s"] = now.env_steps_per_s
        row["time/updates_per_s"] = now.updates_per_s
        row["time/eta_s"] = now.eta_s
        self._unsaid = True
        self._write(row)
        if self._live is None and monotonic() - self._said_at >= LINE_S:
            self._say()

    def message(self, text: str) -> None:
        """Print a line; the panel stays below it. Without a panel, the newest row comes before it if it was not printed yet."""
        if self._live is None and self._unsaid:
            self._say()
        self._print(text)

    def close(self) -> None:
        """Show the last row and end the display. Closing twice does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._live is not None:
            with _unread():
                self._live.stop()
        elif self._unsaid:
            self._say()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def wall_s(self) -> float:
        return monotonic() - self._start

    def _write(self, row: dict[str, float | int | None]) -> None:
        """Append a row to both files; what befalls them is said, not raised."""
        gone = [(file, file.path) for file in (self._rows, self._events) if file.gone()]
        lines = [self._rows.append(json.dumps(row, allow_nan=False).encode() + b"\n"), self._events.append(row_event(row))]
        if gone and not any(file.gone() for file, _ in gone):
            where = self._dir if len(gone) == 2 else gone[0][1]
            self.message(f"{where} was deleted while running: logs start anew there")
        for text in filter(None, lines):
            self.message(text)

    def _print(self, text: str) -> None:
        with _unread():
            if self._live is None:
                print(text, flush=True)
            else:
                self._console.print(text, markup=False, soft_wrap=True)

    def _say(self) -> None:
        self._print(line(self._progress))
        self._said_at = monotonic()
        self._unsaid = False

    def _panel(self) -> Panel:
        return panel(self._progress, self.wall_s, min(self._console.width, 100))

    def _progress_at(self, iteration: int, metrics: Mapping[str, float | int | None]) -> Progress:
        """The state of the run at the newest mark."""
        (then, steps_then, updates_then), (now, env_steps, updates) = self._marks[0], self._marks[-1]
        span = now - then
        env_rate = (env_steps - steps_then) / span if span > 0 else None
        update_rate = (updates - updates_then) / span if span > 0 else None
        # Both kinds of work go on side by side, each at its own rate; the run ends with the slower one.
        left = (self.total_env_steps - env_steps, env_rate), (self.total_updates - updates, update_rate)
        needed = [todo / rate if rate and rate > 0 else math.inf for todo, rate in left if todo > 0]
        eta = max(needed, default=0.0)
        return Progress(
            env_steps=env_steps,
            updates=updates,
            iteration=iteration,
            total_env_steps=self.total_env_steps,
            total_updates=self.total_updates,
            env_steps_per_s=env_rate,
            updates_per_s=update_rate,
            eta_s=eta if math.isfinite(eta) else None,
            metrics=metrics,
        )


def _unread() -> suppress:
    """Output that fails is dropped: a hangup, a full disk, a reader that left, which rich answers with SystemExit."""
    return suppress(OSError, SystemExit)


def _keep_rows(path: Path, resume_at: int | None) -> tuple[dict[str, Any], int]:
    """Drop from `path` every row after iteration `resume_at`, what a killed run tore, and what is not a row or repeats one.

    Returns the last row kept ({} if none) and how many lines were unreadable or repeated; a torn last one is not counted.
    """
    if not path.exists() or path.stat().st_size == 0:
        return {}, 0
    if resume_at is None:
        raise FileExistsError(f"{path} already holds a run; resume it, or start anew with another --run-dir")
    last: dict[str, Any] = {}
    seen: set[int] = set()
    dropped = 0
    with open(path, "rb") as old, replacing(path) as new:
        for text in _lines(old):
            row = _row_of(text)
            if row is None or row["iteration"] in seen:
                dropped += text.endswith(b"\n")
            elif row["iteration"] <= resume_at:
                new.write(text.rstrip(b"\n") + b"\n")
                seen.add(row["iteration"])
                last = row
    return last, dropped


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file with their newlines, in bounded memory: one of LONGEST bytes or more comes as its newline alone."""
    while text := file.readline(LONGEST):
        if len(text) == LONGEST:
            while text and not text.endswith(b"\n"):
                text = file.readline(LONGEST)
            text = text[-1:]
        yield text


def _row_of(text: bytes) -> dict[str, Any] | None:
    """The row that a line holds, if it is one: a JSON object whose counts and clock can be gone on from."""
    try:
        row = json.loads(text.decode(), parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    counted = all(type(row.get(key)) is int and 0 <= row[key] <= MOST_COUNT for key in COUNTS)
    timed = type(row.get("wall_s")) in (int, float) and 0 <= row["wall_s"] <= MOST_S
    return row if counted and timed else None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _number(value: Any) -> int | float | None:
    """A Python number for any scalar; None for one that is not finite (JSON has no such number)."""
    try:
        return int(operator.index(value))
    except TypeError:
        value = float(value)
    return value if math.isfinite(value) else None
