"""The progress display of a run: one plain line, or a live panel."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from rich.console import Group
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text


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
