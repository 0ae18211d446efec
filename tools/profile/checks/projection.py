"""From milliseconds of an iteration to minutes of a run, measured and at the floor."""

from dataclasses import asdict, dataclass

import numpy as np

Key = tuple[str, int]
"""A phase and its R."""


@dataclass(frozen=True)
class Part:
    """The iterations of one phase and R in a run."""

    phase: str
    roots: int
    iterations: int
    ms: float | None
    """Of an iteration; None where nothing says."""
    source: str
    """"measured", or what it was taken from."""
    floor_ms: float

    @property
    def seconds(self) -> float:
        return self.iterations * (self.ms or 0.0) / 1e3

    @property
    def floor_seconds(self) -> float:
        return self.iterations * self.floor_ms / 1e3


def estimate(points: dict[int, float], roots: int) -> tuple[float | None, str]:
    """Milliseconds of an iteration with `roots`, and their source, from those of other R of the phase.

    On the line between the nearest R on either side; outside of all, those of the nearest R; with no point, nothing.
    """
    if roots in points or not points:
        return points.get(roots), "measured" if points else "not measured"
    known = sorted(points)
    ms = float(np.interp(roots, known, [points[r] for r in known]))
    nearest = min(known, key=lambda r: abs(r - roots))
    return ms, f"as R {nearest}" if roots < known[0] or roots > known[-1] else "interpolated"


def project(recipe: dict[Key, int], measured: dict[Key, float], floors: dict[Key, float]) -> list[Part]:
    """The parts of a run: `recipe` has its iterations, `measured` and `floors` milliseconds of one.

    A phase of which nothing was measured takes the time of `train` if it learns: that is a little too much.
    """
    parts = []
    for (phase, roots), iterations in sorted(recipe.items()):
        points = {r: ms for (name, r), ms in measured.items() if name == phase}
        ms, source = estimate(points, roots)
        if ms is None and phase == "learn":
            ms, source = estimate({r: ms for (name, r), ms in measured.items() if name == "train"}, roots)
            source = f"train, {source}"
        parts.append(Part(phase, roots, iterations, ms, source, floors[phase, roots]))
    return parts


def total(parts: list[Part], snapshots: int, snapshot_ms: float, snapshot_floor_ms: float) -> dict:
    """The whole run: seconds, floor, the share of the floor, and whether every part was measured."""
    seconds = sum(part.seconds for part in parts) + snapshots * snapshot_ms / 1e3
    floor = sum(part.floor_seconds for part in parts) + snapshots * snapshot_floor_ms / 1e3
    return {
        "parts": [asdict(part) | {"seconds": part.seconds, "floor_seconds": part.floor_seconds} for part in parts],
        "snapshots": snapshots, "snapshot_ms": snapshot_ms, "snapshot_floor_ms": snapshot_floor_ms,
        "seconds": seconds, "floor_seconds": floor, "floor_share": floor / seconds if seconds else None,
        "measured": all(part.source == "measured" for part in parts), "complete": all(part.ms is not None for part in parts),
        "left_out": "starting, compiling and capturing, rows of the log, checkpoints, the evaluation; transitions lost to resets",
    }  # fmt: skip

