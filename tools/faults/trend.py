"""Whether a long run drifts: samples of it, figures of their trends, and verdicts on the figures."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

MB = 1e6

RSS_MB_PER_HOUR = 10.0
"""Trend of the resident memory that counts as a leak."""
RSS_GROWTH = 1.02
"""Most resident memory at the end, relative to that at the beginning."""
TIME_GROWTH = 1.10
"""Most change of the CPU time of an iteration between beginning and end, either way."""
WRITING = 4
"""Files that may be open for a moment while something is written: a checkpoint, its folder, a row of metrics, an event."""


@dataclass(frozen=True)
class Sample:
    """One look at a run from outside."""

    seconds: float
    """Since its start."""
    rss_mb: float
    fds: int
    threads: int
    cpu_s: float
    """User and system time of all threads so far."""
    iteration: int
    env_steps: int
    updates: int
    metrics_bytes: int
    tensorboard_bytes: int
    checkpoints_bytes: int


class Verdict(NamedTuple):
    """A bound and whether it is kept."""

    name: str
    text: str
    kept: bool

    def __str__(self) -> str:
        return f"{'ok  ' if self.kept else 'FAIL'}  {self.name}: {self.text}"


def write_csv(path: Path, samples: Sequence[Sample]) -> None:
    """Write samples, one a line."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Sample)])
        writer.writeheader()
        writer.writerows(asdict(sample) for sample in samples)


def settled(samples: Sequence[Sample], ring: int) -> list[Sample]:
    """The samples after the first tenth of the time, once the ring of that many positions is full and a checkpoint is saved."""
    warm = 0.1 * samples[-1].seconds if samples else 0.0
    return [
        sample for sample in samples
        if sample.seconds >= warm and sample.env_steps >= ring and sample.updates > 0 and sample.checkpoints_bytes > 0
    ]


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the least-squares line; 0 if all of x is one value."""
    return statistics.linear_regression(x, y).slope if len(set(x)) > 1 else 0.0


def figures(samples: Sequence[Sample], log_interval: int) -> dict[str, float]:
    """Numbers for the verdicts, `first` and `last` being fifths. samples: settled ones, at least ten. log_interval: iterations a row.

    Raises:
        ValueError: too few samples.
    """
    if len(samples) < 10:
        raise ValueError(f"{len(samples)} samples after the warm-up, ten are needed; run longer, or give a smaller --ring-positions")

    def values(of: str, part: Sequence[Sample] = samples) -> list[float]:
        return [getattr(sample, of) for sample in part]

    hours, count = [second / 3600 for second in values("seconds")], len(samples) // 5
    found = {
        "hours": hours[-1] - hours[0], "iterations": samples[-1].iteration - samples[0].iteration,
        "rss_mb_per_hour": slope(hours, values("rss_mb")), "fds_least": min(values("fds")), "fds_most": max(values("fds")),
        "threads_least": min(values("threads")), "threads_most": max(values("threads")),
    }  # fmt: skip
    for name, part in (("first", samples[:count]), ("last", samples[-count:])):
        def a_step(of: str, part: Sequence[Sample] = part) -> float:
            return slope(values("iteration", part), values(of, part))

        found |= {
            f"rss_mb_{name}": statistics.median_high(values("rss_mb", part)), f"fds_{name}": min(values("fds", part)),
            f"checkpoints_mb_{name}": statistics.median_high(values("checkpoints_bytes", part)) / MB,
            f"cpu_s_per_iteration_{name}": a_step("cpu_s"),
            f"metrics_bytes_per_row_{name}": a_step("metrics_bytes") * log_interval,
            f"tensorboard_bytes_per_row_{name}": a_step("tensorboard_bytes") * log_interval,
        }  # fmt: skip
    return found


def verdicts(found: dict[str, float]) -> list[Verdict]:
    """Which bounds the figures keep."""
    trend, rss = found["rss_mb_per_hour"], (found["rss_mb_first"], found["rss_mb_last"])
    threads = found["threads_least"], found["threads_most"]
    begin, end = found["cpu_s_per_iteration_first"], found["cpu_s_per_iteration_last"]
    time = end / begin if begin > 0 else float("inf")
    return [
        Verdict("memory, trend", f"{trend:+.1f} MB/h (below {RSS_MB_PER_HOUR:g})", trend < RSS_MB_PER_HOUR),
        Verdict("memory, last fifth", f"{rss[1]:.1f} MB after {rss[0]:.1f} (at most {RSS_GROWTH:g} times)", rss[1] <= RSS_GROWTH * rss[0]),
        # A sample may see the file of a write: only a leak raises the least for good.
        Verdict(
            "open files", f"least {found['fds_first']} in the first fifth, {found['fds_last']} in the last, most {found['fds_most']}",
            found["fds_first"] == found["fds_last"] and found["fds_most"] <= found["fds_least"] + WRITING,
        ),
        Verdict("threads", f"{threads[0]} to {threads[1]} (constant)", threads[0] == threads[1]),
        Verdict(
            "CPU time of an iteration", f"{end * 1e3:.1f} ms in the last fifth, {begin * 1e3:.1f} in the first: {time:.3f} times",
            1 / TIME_GROWTH <= time <= TIME_GROWTH,
        ),
    ]  # fmt: skip
