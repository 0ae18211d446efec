"""The terminal of a run: a bar over all of its work with a line of numbers below, or plain lines where there is no terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from speedyzero.run.record import clock

LINE_S = 10.0
"""Least seconds between two printed lines where there is no terminal."""


class Status(NamedTuple):
    """What there is to show: the counts and rates of the newest row, and the newest known value of every other metric."""

    wall_s: float
    env_steps: int
    updates: int
    total_env_steps: int
    total_updates: int
    env_steps_per_s: float | None
    updates_per_s: float | None
    eta_s: float | None
    metrics: Mapping[str, float | int | None]

    @property
    def phase(self) -> str:
        """`collect` before the first update, `train` up to the last environment step, then `learn`, then `done`."""
        if self.env_steps < self.total_env_steps:
            return "train" if self.updates else "collect"
        return "learn" if self.updates < self.total_updates else "done"

    @property
    def done(self) -> int:
        """How far the bar is, of `total_env_steps + total_updates`. Both counts only grow and so does this: the bar never goes back."""
        return min(self.env_steps, self.total_env_steps) + min(self.updates, self.total_updates)


class Display:
    """Shows the status of a run and its messages. No fault of the terminal raises: output that nobody can read is dropped.

    status: the first one. live: draw the bar (True) or print plain lines (False); None: whether stdout is a terminal.
    wall_s: returns the seconds since the run began, for the bar's clock.
    """

    def __init__(self, status: Status, live: bool | None, wall_s: Callable[[], float]) -> None:
        self._status = status
        self._said_at = -math.inf
        self._unsaid = False
        self._live: Live | None = None
        self._console = Console(highlight=False, force_terminal=True if live else None)
        if live is None:
            live = self._console.is_terminal and not self._console.is_dumb_terminal
        if live:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"), BarColumn(bar_width=None), TaskProgressColumn(), MofNCompleteColumn(),
                TextColumn("steps+updates", style="dim"), TimeElapsedColumn(), TextColumn("eta {task.fields[eta]}", style="cyan"),
                console=self._console, get_time=wall_s, expand=True,
            )  # fmt: skip
            task = self._bar.add_task(status.phase, total=status.total_env_steps + status.total_updates, eta="-")
            self._bar.tasks[0].start_time = 0.0  # the clock of a resumed run goes on
            self._task = task
            self._move_bar()
            display = Live(get_renderable=self._drawn, console=self._console, refresh_per_second=2)
            with _unread():
                display.start()
                self._live = display

    def show(self, status: Status) -> None:
        """Take the status of a new row. Plain lines of it come at least LINE_S apart."""
        self._status, self._unsaid = status, True
        if self._live is not None:
            self._move_bar()
        elif status.wall_s - self._said_at >= LINE_S:
            self._print_line()

    def say(self, text: str) -> None:
        """Print a line above the bar; without a bar, the newest row comes first if it was not printed yet."""
        with _unread():
            if self._live is not None:
                self._console.print(text, markup=False, soft_wrap=True)
                return
            if self._unsaid:
                self._print_line()
            print(text, flush=True)

    def close(self) -> None:
        """Leave the bar as it is, or print the last row. What is said later comes below. Closing twice does nothing."""
        if self._live is not None:
            with _unread():
                self._live.stop()
            self._live = None
            self._unsaid = False
        elif self._unsaid:
            self._print_line()

    def _move_bar(self) -> None:
        now = self._status
        self._bar.update(self._task, completed=now.done, description=now.phase, eta="-" if now.eta_s is None else clock(now.eta_s))

    def _drawn(self) -> Group:
        return Group(self._bar, Text(numbers(self._status), no_wrap=True, overflow="ellipsis"))

    def _print_line(self) -> None:
        self._said_at, self._unsaid = self._status.wall_s, False
        with _unread():
            print(line(self._status), flush=True)


def line(now: Status) -> str:
    """One plain line: `env_steps 1200/20000  updates 400  return 0.35  loss 3.21  ...`; what is unknown is left out."""
    return numbers(now) + (f"  eta {clock(now.eta_s)}" if now.eta_s is not None else "")


def numbers(now: Status) -> str:
    """As `line`, without the time that is left."""
    learning = now.phase == "learn"
    words = [
        f"env_steps {now.env_steps}/{now.total_env_steps}",
        f"updates {now.updates}/{now.total_updates}" if learning else f"updates {now.updates}",
    ]
    rate, unit = (now.updates_per_s, "updates/s") if learning else (now.env_steps_per_s, "steps/s")
    rate = round(rate) if rate is not None and rate >= 10 else rate
    others = (
        ("return {}", now.metrics.get("charts/episodic_return")), ("loss {}", now.metrics.get("losses/loss")), (f"{{}} {unit}", rate),
        ("priority_age {}", now.metrics.get("search/priority_age")),
    )  # fmt: skip
    return "  ".join(words + [text.format(_short(value)) for text, value in others if value is not None])


def _unread() -> suppress:
    """Output that fails is dropped: a hangup, a full disk, a reader that left, which rich answers with SystemExit."""
    return suppress(OSError, SystemExit)


def _short(value: float | int) -> str:
    """At most seven characters or so: 0.35, 12.4, 1,204, -0.912."""
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.1e}"
    if value and abs(value) < 0.01:
        return f"{value:.1e}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"
