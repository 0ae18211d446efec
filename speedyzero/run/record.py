"""What a run left on the disk, read back without PyTorch: its settings, its rows of metrics, its evaluations. For reports."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speedyzero.run.rows import read_rows
from speedyzero.scores import human_normalised


class RunError(ValueError):
    """A directory is not that of a run, or a file in it is damaged; the message is one line."""


@dataclass(frozen=True)
class Recorded:
    """One run, finished or not."""

    folder: Path
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    """Of metrics.jsonl, ascending by iteration; at least one. A value that was not finite is None."""
    left_out: int
    """Lines of metrics.jsonl that are no rows, or repeat one; a torn last line does not count."""
    evaluation: dict[str, Any] | None
    summary: dict[str, Any] | None

    @property
    def env(self) -> str:
        return self.config["env"]

    @property
    def last(self) -> dict[str, Any]:
        """Counts and seconds at the end, on the run's own clock: without the time between its processes, and without their starts."""
        return self.summary or self.rows[-1]


def read(folder: Path) -> Recorded:
    """Read the files of a run. Raises RunError: there is no run, it has no row yet, or a file is damaged."""
    counts = {"env_steps": int, "updates": int}
    config = _object(folder / "config.json", {"env": str, "preset": str, "seed": int, "device": str, "env_steps": int})
    if config is None:
        raise RunError(f"{folder}: no run there (config.json is missing); give the folder of a run")
    rows: list[dict[str, Any]] = []
    left_out = 0
    path = folder / "metrics.jsonl"
    with path.open("rb") if path.exists() else io.BytesIO() as file:
        for text, row in read_rows(file):
            if text.endswith(b"\n"):  # the last line may be being written
                if row is None or (rows and row["iteration"] <= rows[-1]["iteration"]):
                    left_out += 1
                else:
                    rows.append(row)
    if not rows:
        raise RunError(f"{folder}: metrics.jsonl has no row yet; let the run train until its first row")
    evaluation = _object(folder / "eval.json", counts | {"mean": float, "episodes": int})
    return Recorded(folder, config, rows, left_out, evaluation, _object(folder / "summary.json", counts | {"wall_s": float}))


def evaluations(folder: Path) -> list[dict[str, Any]]:
    """Every evaluation of a run, by updates and then by file; `eval.json` alone if there is no folder of them. Raises RunError."""
    fields = {"env_steps": int, "updates": int, "mean": float, "std": float, "median": float, "episodes": int}
    paths = sorted((folder / "evaluations").glob("*.json")) or [folder / "eval.json"]
    return sorted(filter(None, (_object(path, fields) for path in paths)), key=lambda one: one["updates"])


def human_share(env: str, evaluation: dict[str, Any]) -> float | None:
    """The human-normalised score of an evaluation of `env`: None where there is none, or games were cut too soon for one."""
    if "cut" in evaluation:
        return evaluation["human_normalised"]
    return human_normalised(env, evaluation["mean"])  # from before games were marked


def _object(path: Path, fields: dict[str, type]) -> dict[str, Any] | None:
    """The JSON object in a file, with `fields` of these types (an int will do for a float); None if there is no file."""
    try:
        value = json.loads(path.read_text())
        if wrong := [name for name, kind in fields.items() if type(value.get(name)) not in ((int, float) if kind is float else (kind,))]:
            raise ValueError(f"{wrong[0]} is missing or of another type")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        raise RunError(f"{path}: cannot be read ({error}); copy it again from the run") from None
    return value


def clock(seconds: float) -> str:
    """A duration for a person: 48 s, 7 min 05 s, 2 h 03 min."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    return f"{total // 60} min {total % 60:02} s" if total < 3600 else f"{total // 3600} h {total % 3600 // 60:02} min"


def thousands(value: float, _: Any = None) -> str:
    """An axis label: 800, 2.5k, 100k, 1.2M."""
    for unit, sign in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{sign}"
    return f"{value:g}"
