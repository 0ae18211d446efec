"""What a run tells the world: `metrics.jsonl`, TensorBoard events, and the progress display. The host's last step.

A row is one dictionary of numbers. Its keys are those of the field (`charts/episodic_return`, `losses/value_loss`).
What depends on the clock is in `wall_s` and under `time/` and nowhere else, so that two runs of one seed can be
compared row by row.
"""

import json
import math
import operator
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from torch.utils.tensorboard import SummaryWriter

from speedyzero.checkpoint import replacing

COUNTS = ("env_steps", "updates", "iteration")
"""Keys that every row must have; `wall_s`, the rates and `time/eta_s` are added."""

LINE_S = 10.0
"""Least seconds between two printed lines where there is no terminal."""

RATE_S = 60.0
"""Rates are means over about this many seconds."""

METRICS = "metrics.jsonl"


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as sorted, indented JSON, whole or not at all; what is not finite becomes null, a Path its text."""
    text = json.dumps(_jsonable(value), sort_keys=True, indent=2, allow_nan=False)
    with replacing(path) as file:
        file.write(text.encode() + b"\n")


class Progress(NamedTuple):
    """All that the display shows: a row's counts and rates, and the newest known value of every other metric."""

    env_steps: int
    updates: int
    iteration: int
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

    def metric(self, *names: str) -> float | int | None:
        """The newest metric whose key, less its group (`charts/`, `losses/`), is one of `names`."""
        for key, value in self.metrics.items():
            if key.rpartition("/")[2] in names:
                return value
        return None


class RunLog:
    """The three logs of one run, in `run_dir`: `metrics.jsonl`, `tensorboard/`, and the terminal.

    total_env_steps, total_updates: where the run ends; they scale the progress bar and the ETA.
    live: draw the panel (True) or print plain lines (False); by default, whether stdout is a terminal.
    resume_at: the iteration of the checkpoint that the run goes on from (-1 keeps nothing). Later rows are dropped,
        from `metrics.jsonl` and in TensorBoard's eyes, and `wall_s` goes on from the last row kept.

    Raises FileExistsError if `run_dir` holds rows and `resume_at` is not given. TensorBoard's steps are iterations: the
    only count that grows in every phase; `env_steps` and `updates` are among its curves.
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
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / METRICS
        self.total_env_steps = total_env_steps
        self.total_updates = total_updates
        last, unreadable = _keep_rows(path, resume_at)
        self._start = monotonic() - (last.get("wall_s") or 0.0)
        mark = (self.wall_s, last.get("env_steps", 0), last.get("updates", 0))
        self._marks = deque([mark])  # (wall_s, env_steps, updates) of the rows that the rates are taken over
        self._progress = self._progress_at(last.get("iteration", 0), {})
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed in `close`)
        self._board = SummaryWriter(
            str(run_dir / "tensorboard"), purge_step=None if resume_at is None else resume_at + 1, flush_secs=5
        )
        self._said_at = -math.inf
        self._unsaid = False
        self._closed = False
        self._console = Console(highlight=False, force_terminal=True if live else None)
        self._live = None
        if live is None:
            live = self._console.is_terminal and not self._console.is_dumb_terminal
        if live:
            self._live = Live(get_renderable=self._panel, console=self._console, refresh_per_second=2)
            self._live.start()
        if unreadable:
            self.message(f"{path}: dropped {unreadable} unreadable rows")

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

        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        for key, value in row.items():
            if value is not None and key not in ("iteration", "wall_s"):
                self._board.add_scalar(key, value, row["iteration"])
        self._unsaid = True
        if self._live is None and monotonic() - self._said_at >= LINE_S:
            self._say()

    def message(self, text: str) -> None:
        """Print a line; the panel stays below it. Without a panel, the newest row comes before it if it was not printed yet."""
        if self._live is None and self._unsaid:
            self._say()
        self._print(text)

    def close(self) -> None:
        """Show the last row and close the files. Closing twice does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._live is not None:
            self._live.stop()
        elif self._unsaid:
            self._say()
        self._file.close()
        self._board.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def wall_s(self) -> float:
        return monotonic() - self._start

    def _print(self, text: str) -> None:
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
        needed = [todo / rate if rate else math.inf for todo, rate in left if todo > 0]
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


def line(now: Progress) -> str:
    """One plain line: `env_steps 1200/20000  updates 400  return 0.35  loss 3.21  ...`; what is unknown is left out."""
    learning = now.phase == "learn"
    words = [
        f"env_steps {now.env_steps}/{now.total_env_steps}",
        f"updates {now.updates}/{now.total_updates}" if learning else f"updates {now.updates}",
    ]
    shown = (
        ("return", now.metric("episodic_return")),
        ("loss", now.metric("loss", "total_loss")),
        ("priority_age", now.metric("priority_age")),
    )
    words += [f"{name} {_short(value)}" for name, value in shown if value is not None]
    rate, unit = (now.updates_per_s, "updates/s") if learning else (now.env_steps_per_s, "steps/s")
    if rate is not None:
        words.append(f"{_rate(rate)} {unit}")
    if now.eta_s is not None:
        words.append(f"eta {_duration(now.eta_s)}")
    return "  ".join(words)


def panel(now: Progress, wall_s: float, width: int) -> Panel:
    """The live display: seven lines between the borders, whatever is known, so that it never jumps."""
    learning = now.phase in ("learn", "done")
    done, total = (now.updates, now.total_updates) if learning else (now.env_steps, now.total_env_steps)
    share = min(done / total, 1.0) if total else 1.0

    bar = Table.grid(expand=True, padding=(0, 1))
    bar.add_column(ratio=1)
    bar.add_column(width=6, justify="right", no_wrap=True)
    bar.add_column(width=10, justify="right", no_wrap=True)
    bar.add_row(
        ProgressBar(total=1.0, completed=share, finished_style="bar.complete"),
        f"{math.floor(share * 1000) / 10:.1f}%",
        Text(f"eta {_duration(now.eta_s)}", style="bold cyan"),
    )

    counts = Table.grid(expand=True, padding=(0, 2, 0, 0))
    counts.add_column(style="dim", width=9, no_wrap=True)
    counts.add_column(ratio=4, justify="right", no_wrap=True, overflow="ellipsis")
    counts.add_column(style="green", width=11, justify="right", no_wrap=True)
    counts.add_column(style="dim", width=12, no_wrap=True)
    counts.add_column(ratio=3, justify="right", no_wrap=True, overflow="ellipsis")
    counts.add_row(
        "env steps",
        f"{now.env_steps:,} / {now.total_env_steps:,}",
        f"{_rate(now.env_steps_per_s)}/s",
        "elapsed",
        _duration(wall_s),
    )
    counts.add_row(
        "updates",
        f"{now.updates:,} / {now.total_updates:,}",
        f"{_rate(now.updates_per_s)}/s",
        "iteration",
        f"{now.iteration:,}",
    )
    counts.add_row(
        Text("return", style="bold"),
        Text(_short(now.metric("episodic_return")), style="bold magenta"),
        "",
        "priority age",
        _short(now.metric("priority_age")),
    )

    names = [key for key in now.metrics if key.startswith("losses/")][: (width - 4) // 14] or ["losses/loss"]
    losses = Table.grid(expand=True, padding=(0, 1, 0, 0))
    for _ in names:
        losses.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    losses.add_row(*(Text(_loss_name(key), style="dim") for key in names))
    losses.add_row(*(_short(now.metrics.get(key)) for key in names))

    title = Text.assemble(("speedyzero", "bold"), (" · ", "dim"), (now.phase, "bold yellow"))
    return Panel(Group(bar, counts, Text(""), losses), title=title, title_align="left", border_style="dim", width=width)


def _keep_rows(path: Path, resume_at: int | None) -> tuple[dict[str, Any], int]:
    """Drop from `path` every row after iteration `resume_at`, and what a killed run tore.

    Returns the last row kept ({} if none) and the number of unreadable lines other than a torn last one.
    """
    if not path.exists() or path.stat().st_size == 0:
        return {}, 0
    if resume_at is None:
        raise FileExistsError(f"{path} already holds a run; resume it, or start anew with another --run-dir")
    last: dict[str, Any] = {}
    unreadable = 0
    with open(path, "rb") as old, replacing(path) as new:
        for text in old:
            try:
                row = json.loads(text)
                kept = row["iteration"] <= resume_at
            except (ValueError, TypeError, KeyError):
                unreadable += text.endswith(b"\n")
                continue
            if kept:
                new.write(text.rstrip(b"\n") + b"\n")
                last = row
    return last, unreadable


def _number(value: Any) -> int | float | None:
    """A Python number for any scalar; None for one that is not finite (JSON has no such number)."""
    try:
        return int(operator.index(value))
    except TypeError:
        value = float(value)
    return value if math.isfinite(value) else None


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _loss_name(key: str) -> str:
    """`losses/value_loss` is shown as `value`."""
    name = key.rpartition("/")[2]
    return (name.removesuffix("_loss") or name).replace("_", " ")


def _short(value: float | int | None) -> str:
    """At most seven characters or so: 0.35, 12.4, 1,204, -0.912; `-` for the unknown."""
    if value is None:
        return "-"
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.1e}"
    if value and abs(value) < 0.01:
        return f"{value:.1e}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def _rate(value: float | None) -> str:
    """As `_short`, in whole numbers from ten on."""
    return _short(round(value) if value is not None and value >= 10 else value)


def _duration(seconds: float | None) -> str:
    """45s, 3m12s, 8h05m, 2d03h; `-` for the unknown."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
