"""Whether a long run drifts: its samples, their trends, and the verdicts on them."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

MB = 1e6

RSS_MB_PER_HOUR = 10.0
"""Trend of the resident memory from which on it counts as a leak."""
RSS_GROWTH = 1.02
"""The resident memory at the end, by that at the beginning."""
TIME_GROWTH = 1.10
"""CPU time of an iteration at the end by that at the beginning, either way."""
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


@dataclass(frozen=True)
class Verdict:
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


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the least-squares line; 0 if all of x is one value."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread if spread else 0.0


def settled(samples: Sequence[Sample], ring: int) -> list[Sample]:
    """The samples after the first tenth of the time in which the ring of so many positions is full, and what saving needs is there."""
    warm = 0.1 * samples[-1].seconds if samples else 0.0
    return [
        sample for sample in samples
        if sample.seconds >= warm and sample.env_steps >= ring and sample.updates > 0 and sample.checkpoints_bytes > 0
    ]


def fifths(samples: Sequence[Sample]) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """The first and the last fifth; at least two samples each."""
    count = max(2, len(samples) // 5)
    return samples[:count], samples[-count:]


def median(samples: Sequence[Sample], of: Callable[[Sample], float]) -> float:
    """Median of something about the samples; the upper one of an even number."""
    return sorted(map(of, samples))[len(samples) // 2]


def figures(samples: Sequence[Sample], log_interval: int) -> dict[str, float]:
    """What the verdicts are about. samples: settled ones, ten at least. log_interval: iterations between two rows of metrics.

    Raises:
        ValueError: too few samples.
    """
    if len(samples) < 10:
        raise ValueError(f"{len(samples)} samples after the warm-up: ten are needed; let it run longer, or take a smaller --ring-positions")
    hours = [sample.seconds / 3600 for sample in samples]
    first, last = fifths(samples)
    found = {
        "hours": hours[-1] - hours[0],
        "iterations": samples[-1].iteration - samples[0].iteration,
        "rss_mb_per_hour": slope(hours, [sample.rss_mb for sample in samples]),
        "rss_mb_first": median(first, lambda sample: sample.rss_mb),
        "rss_mb_last": median(last, lambda sample: sample.rss_mb),
        "fds_first": min(sample.fds for sample in first),
        "fds_last": min(sample.fds for sample in last),
        "fds_least": min(sample.fds for sample in samples),
        "fds_most": max(sample.fds for sample in samples),
        "threads_least": min(sample.threads for sample in samples),
        "threads_most": max(sample.threads for sample in samples),
        "checkpoints_mb_first": median(first, lambda sample: sample.checkpoints_bytes / MB),
        "checkpoints_mb_last": median(last, lambda sample: sample.checkpoints_bytes / MB),
    }
    for name, part in (("first", first), ("last", last)):
        iterations = [sample.iteration for sample in part]
        found[f"cpu_s_per_iteration_{name}"] = slope(iterations, [sample.cpu_s for sample in part])
        found[f"metrics_bytes_per_row_{name}"] = slope(iterations, [sample.metrics_bytes for sample in part]) * log_interval
        found[f"tensorboard_bytes_per_row_{name}"] = slope(iterations, [sample.tensorboard_bytes for sample in part]) * log_interval
    return found


def verdicts(found: dict[str, float]) -> list[Verdict]:
    """Of `figures`, which bounds are kept."""
    trend, rss = found["rss_mb_per_hour"], (found["rss_mb_first"], found["rss_mb_last"])
    fds, threads = (found["fds_least"], found["fds_most"]), (found["threads_least"], found["threads_most"])
    begin, end = found["cpu_s_per_iteration_first"], found["cpu_s_per_iteration_last"]
    time = end / begin if begin > 0 else float("inf")
    return [
        Verdict("memory, trend", f"{trend:+.1f} MB/h (below {RSS_MB_PER_HOUR:g})", trend < RSS_MB_PER_HOUR),
        Verdict(
            "memory, last fifth by first", f"{rss[1]:.1f} MB by {rss[0]:.1f} MB (at most {RSS_GROWTH:g} times)",
            rss[1] <= RSS_GROWTH * rss[0],
        ),
        # A sample may fall into a write, and then sees its file: what is leaked raises the least, for good.
        Verdict(
            "open files",
            f"least {found['fds_first']:.0f} in the first fifth, {found['fds_last']:.0f} in the last (the same), most {fds[1]:.0f} "
            f"(at most {WRITING} more, for a moment)",
            found["fds_first"] == found["fds_last"] and fds[1] <= fds[0] + WRITING,
        ),
        Verdict("threads", f"{threads[0]:.0f} to {threads[1]:.0f} (constant)", threads[0] == threads[1]),
        Verdict(
            "CPU time of an iteration, last fifth by first",
            f"{end * 1e3:.1f} ms by {begin * 1e3:.1f} ms, {time:.3f} times (within {TIME_GROWTH - 1:.0%})",
            1 / TIME_GROWTH <= time <= TIME_GROWTH,
        ),
    ]
