"""Statistics of scores over games and seeds, by the definitions of rliable.

Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (NeurIPS 2021): the interquartile mean, the
optimality gap, and intervals by a stratified bootstrap, which draws seeds again within each game. Games may have different numbers of
seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

REPETITIONS = 10_000
"""Resamples behind an interval."""
CONFIDENCE = 0.95
"""Share of the resamples that an interval holds."""


class Estimate(NamedTuple):
    """A statistic and its interval; low and high are None where no game has a second seed."""

    value: float
    low: float | None
    high: float | None


Tasks = Sequence[NDArray[np.float64]]
"""For each game an array [..., seeds] of scores; the leading dimensions are equal, and a statistic keeps them."""


def mean(tasks: Tasks) -> NDArray[np.float64]:
    """Mean over the games of each game's mean."""
    return np.stack([task.mean(-1) for task in tasks], -1).mean(-1)


def median(tasks: Tasks) -> NDArray[np.float64]:
    """Median over the games of each game's mean."""
    return np.median(np.stack([task.mean(-1) for task in tasks], -1), -1)


def iqm(tasks: Tasks) -> NDArray[np.float64]:
    """Interquartile mean: of all scores of all games together, the mean without the lowest and the highest quarter (rounded down)."""
    scores = np.sort(np.concatenate(tasks, -1), -1)
    cut = scores.shape[-1] // 4
    return scores[..., cut : scores.shape[-1] - cut].mean(-1)


def optimality_gap(tasks: Tasks) -> NDArray[np.float64]:
    """How far the scores fall short of 1 on average, what lies above it counting as 1: the less, the better."""
    return 1 - np.minimum(np.concatenate(tasks, -1), 1).mean(-1)


STATISTICS: dict[str, Callable[[Tasks], NDArray[np.float64]]] = {
    "mean": mean, "median": median, "IQM": iqm, "optimality gap": optimality_gap,
}  # fmt: skip


def aggregate(
    games: Sequence[ArrayLike], *, repetitions: int = REPETITIONS, confidence: float = CONFIDENCE, seed: int = 0
) -> dict[str, Estimate]:
    """All `STATISTICS` of `games`: for each game the (human-normalised) scores of its seeds, at least one; at least one game.

    repetitions: resamples; an interval is between their (1 - confidence) / 2 and (1 + confidence) / 2 quantiles. seed: of the resamples.

    Raises:
        ValueError: no game, a game without scores, or a score that is not finite.
    """
    tasks = [np.asarray(game, np.float64) for game in games]
    if not tasks or not all(task.ndim == 1 and task.size and np.isfinite(task).all() for task in tasks):
        raise ValueError("aggregate: want at least one finite score of each of at least one game")
    random = np.random.default_rng(seed)
    drawn = [task[random.integers(0, task.size, (repetitions, task.size))] for task in tasks]
    several = any(task.size > 1 for task in tasks)
    found = {}
    for name, statistic in STATISTICS.items():
        low, high = np.quantile(statistic(drawn), [(1 - confidence) / 2, (1 + confidence) / 2]) if several else (None, None)
        found[name] = Estimate(float(statistic(tasks)), *(None if end is None else float(end) for end in (low, high)))
    return found


class Band(NamedTuple):
    """A curve over several seeds: its points, the IQM over the seeds there, and the interval around it; arrays [points]."""

    x: NDArray[np.float64]
    middle: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def band(
    curves: Sequence[tuple[Sequence[float], Sequence[float]]],
    *, points: int = 120, repetitions: int = 2_000, confidence: float = CONFIDENCE, seed: int = 0,
) -> Band | None:
    """The IQM of several seeds' curves (x ascending, y) with a bootstrapped interval, where all of them have begun and none has ended.

    In between two of its points a curve is a straight line. None if there is no such place or only one curve.
    """
    if len(curves) < 2 or not all(len(x) for x, _ in curves):
        return None
    begin, end = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    if begin >= end:
        return None
    x = np.linspace(begin, end, points)
    values = np.stack([np.interp(x, *curve) for curve in curves], -1)  # [points, seeds]
    random = np.random.default_rng(seed)
    drawn = random.integers(0, len(curves), (repetitions, len(curves)))
    resampled = iqm([values[:, drawn]])  # [points, repetitions]
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2], axis=1)
    return Band(x, iqm([values]), low, high)
