"""What a run leaves to read: `metrics.jsonl`, TensorBoard's curves, and lines on the terminal. The host's last step.

A row is one dictionary of numbers. Its keys are those of the field (`charts/episodic_return`, `losses/value_loss`).
What depends on the clock is in `wall_s` and under `time/` and nowhere else, so that two runs of one seed can be
compared row by row. Nothing that happens to a log ends a run: what cannot be written is lost, and one line says so.
"""

from __future__ import annotations

import errno
import json
import math
import operator
import shlex
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from time import monotonic, time
from typing import Any

import numpy as np

from speedyzero.pictures.video import gif
from speedyzero.run.board import SPS, Board
from speedyzero.run.display import Display, Status
from speedyzero.run.rows import COUNTS, append, keep_rows
from speedyzero.run.track import Tracker

METRICS = "metrics.jsonl"

RATE_S = 60.0
"""Rates are means over about this many seconds."""

RETRY_S = 60.0
"""Seconds after which a TensorBoard folder that could not be written is tried again."""


class RunLog:
    """The logs of one run, in `run_dir`: `metrics.jsonl`, `tensorboard/`, and the terminal.

    config: the settings of the run; groups may be nested. TensorBoard shows them, and the first line names some.
    total_env_steps, total_updates: where the run ends; they scale the progress bar and the ETA.
    live: draw the bar (True) or print plain lines (False); by default, whether stdout is a terminal.
    resume_at: the iteration of the checkpoint that the run goes on from (-1 keeps nothing). Later rows are dropped,
        and `wall_s` goes on from the last row kept.
    tracker: gets the same; the log ends it.

    `metrics.jsonl` is the record; TensorBoard's event file is made from it. Neither is kept open between two rows.
    Once it is made, no fault of a file or of the terminal raises. Raises, when made:
        FileExistsError: `run_dir` holds rows and `resume_at` is not given.
        OSError: `metrics.jsonl` cannot be written.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        config: Mapping[str, Any],
        total_env_steps: int,
        total_updates: int,
        live: bool | None = None,
        resume_at: int | None = None,
        tracker: Tracker | None = None,
    ) -> None:
        self._run_dir, self._tracker = Path(run_dir), tracker
        self._path = self._run_dir / METRICS
        self._run_dir.mkdir(parents=True, exist_ok=True)
        last, dropped = keep_rows(self._path, resume_at)
        append(self._path, b"")
        self._lost = 0
        self._totals = total_env_steps, total_updates
        self._start = monotonic() - last.get("wall_s", 0.0)
        mark = (self.wall_s, last.get("env_steps", 0), last.get("updates", 0))
        self._marks = deque([mark])  # (wall_s, env_steps, updates) of the rows that the rates are taken over
        self._status = self._status_at_newest_mark({})
        self._display = Display(self._status, live, lambda: self.wall_s)
        settings = dict(_leaves(config))
        named = (f"{name} {settings[name]}" for name in ("preset", "seed", "device") if name in settings)
        self.message(", ".join([str(settings.get("env", "a run")), *named, f"in {self._run_dir}"]))
        if dropped:
            self.message(f"{self._path}: dropped {dropped} unreadable or repeated rows")
        self._board = Board(self._run_dir / "tensorboard", self._path, settings, total_env_steps, time() - self.wall_s)
        self._board_due, self._board_fails = self.wall_s, False
        self._iteration = last.get("iteration", 0)
        self._update_board(lambda: self._board.update(None))

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
        self._status = now = self._status_at_newest_mark({**self._status.metrics, **others})
        row = {key: numbers[key] for key in COUNTS} | {"wall_s": round(now.wall_s, 3)} | others
        row["time/env_steps_per_s"] = now.env_steps_per_s
        row["time/updates_per_s"] = now.updates_per_s
        row["time/eta_s"] = now.eta_s
        self._display.show(now)
        self._iteration = row["iteration"]
        if self._write(row):
            self._update_board(lambda: self._board.update(row))
        if self._tracker:
            self._tracker.log({**row, SPS: now.env_steps_per_s}, self._iteration)

    def scores(self, result: Mapping[str, Any]) -> None:
        """Show an evaluation, as `eval.json` holds it, at the newest row. `metrics.jsonl` has no row of it."""
        scores = {
            "eval/episodic_return": result["mean"],
            "eval/episodic_return_median": result["median"],
            "eval/episodic_length": float(np.mean(result["lengths"])),
        }
        if result["human_normalised"] is not None:
            scores["eval/human_normalised"] = result["human_normalised"]
        self._update_board(lambda: self._board.add_scores(scores, self.wall_s))
        if self._tracker:
            self._tracker.scores(scores, self._iteration)

    def picture(self, name: str, picture: np.ndarray) -> None:
        """Show a picture [H, W, 1 or 3] u8 at the newest row."""
        self._update_board(lambda: self._board.add_picture(name, picture, self.wall_s))
        if self._tracker:
            self._tracker.picture(name, picture, self._iteration)

    def clip(self, name: str, frames: np.ndarray, fps: float) -> None:
        """Show a short video, frames [T, H, W, 1 or 3] u8, at the newest row."""
        encoded, size = gif(frames, fps), frames.shape[1:3]
        self._update_board(lambda: self._board.add_gif(name, encoded, size, self.wall_s))
        if self._tracker:
            self._tracker.gif(name, encoded, self._iteration)

    def message(self, text: str) -> None:
        """Print a line; the bar stays below it. Without a bar, the newest row comes before it if it was not printed yet."""
        self._display.say(text)

    def close(self) -> None:
        """Show the last row and end the display. Closing twice does nothing."""
        self._display.close()
        self._board.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close()
        if self._tracker:
            self._tracker.finish(0 if kind is None else 1)
        if kind is None and self._status.phase == "done":
            run = shlex.quote(str(self._run_dir))
            self.message(
                f"done: everything is in {self._run_dir}\n"
                f"  watch a game:   python -m speedyzero.watch {run}\n"
                f"  make a report:  python -m speedyzero.report {run}\n"
                f"  evaluate again: python -m speedyzero.evaluate {run} --episodes 100\n"
                f"  see the curves: tensorboard --logdir {run}"
                + (f"\n  tracked at:     {self._tracker.url}" if self._tracker and self._tracker.url else "")
            )

    @property
    def wall_s(self) -> float:
        """Seconds since the run began, without those between its processes."""
        return monotonic() - self._start

    def _write(self, row: dict[str, float | int | None]) -> bool:
        """Append a row to `metrics.jsonl`; returns whether it is there. What goes wrong is said, not raised."""
        deleted = not self._lost and not self._path.exists()
        try:
            append(self._path, json.dumps(row, allow_nan=False).encode() + b"\n")
        except OSError as error:
            self._lost += 1
            if self._lost == 1:
                self.message(f"{METRICS}: rows are being lost {_why(error)}")
            return False
        if deleted:
            self.message(f"{self._path} was deleted while running: it begins again")
        if self._lost:
            self.message(f"{METRICS}: rows are written again; {self._lost} lost")
            self._lost = 0
        return True

    def _update_board(self, show: Callable[[], None]) -> None:
        """Show TensorBoard something; what goes wrong is said once, and tried again a minute later."""
        if self.wall_s < self._board_due:
            return
        try:
            show()
            self._board_fails = False
        except Exception as error:  # with TensorFlow installed they are of its own kinds
            self._board_due = self.wall_s + RETRY_S
            if not self._board_fails:
                self.message(f"tensorboard: shows nothing new {_why(error)}; {METRICS} has the rows")
            self._board_fails = True

    def _status_at_newest_mark(self, metrics: Mapping[str, float | int | None]) -> Status:
        (then, steps_then, updates_then), (now, env_steps, updates) = self._marks[0], self._marks[-1]
        total_env_steps, total_updates = self._totals
        span = now - then
        env_rate = (env_steps - steps_then) / span if span > 0 else None
        update_rate = (updates - updates_then) / span if span > 0 else None
        # Both kinds of work go on side by side, each at its own rate; the run ends with the slower one.
        left = (total_env_steps - env_steps, env_rate), (total_updates - updates, update_rate)
        eta = max((todo / rate if rate and rate > 0 else math.inf for todo, rate in left if todo > 0), default=0.0)
        return Status(
            wall_s=now, env_steps=env_steps, updates=updates, total_env_steps=total_env_steps, total_updates=total_updates,
            env_steps_per_s=env_rate, updates_per_s=update_rate, eta_s=eta if math.isfinite(eta) else None, metrics=metrics,
        )  # fmt: skip


class NoLog:
    """The log of a rank that is not the first: it keeps nothing and says nothing."""

    def row(self, metrics: Mapping[str, float | int]) -> None:
        """As `RunLog.row`."""

    def picture(self, name: str, picture: np.ndarray) -> None:
        """As `RunLog.picture`."""

    def clip(self, name: str, frames: np.ndarray, fps: float) -> None:
        """As `RunLog.clip`."""

    def message(self, text: str) -> None:
        """As `RunLog.message`."""

    def __enter__(self) -> NoLog:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _leaves(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The settings of a config, those of its groups among them, by their own names."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value)
        else:
            yield name, value


def _number(value: Any) -> int | float | None:
    """A Python number for any scalar; None for one that is not finite (JSON has no such number)."""
    try:
        return int(operator.index(value))
    except TypeError:
        value = float(value)
    return value if math.isfinite(value) else None


def _why(error: Exception) -> str:
    """What went wrong, and the remedy if it is known: `(No space left on device); make room`."""
    remedy = "; make room" if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) else ""
    return f"({getattr(error, 'strerror', None) or error}){remedy}"
