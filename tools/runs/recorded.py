"""What a run left in its directory, read without PyTorch: its rows, its settings, its evaluation, and the line for BENCHMARKS.md.

Works on a run that still trains and on a folder of prove.sh, which holds copies of the same files, and status.json beside them.
"""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speedyzero.scores import human_normalised

COUNTS = ("iteration", "env_steps", "updates")
COLUMNS = (
    *COUNTS, "wall_s", "charts/episodic_return", "charts/episodes",
    "losses/loss", "losses/value_prefix_loss", "losses/value_loss", "losses/policy_loss", "losses/consistency_loss",
    "train/value_abs_max", "train/value_target", "search/visit_entropy", "search/priority_age",
    "train/grad_norm", "train/learning_rate", "train/skipped_updates",
)  # fmt: skip
"""Of the CSV, after the name of the run."""

HEAD = ("environment", "preset", "seed", "device", "environment steps", "updates", "wall-clock", "mean score", "human-normalised")


class RunError(ValueError):
    """A directory is not that of a run, or a file in it is damaged; the message is one line that names it and the mend."""


@dataclass(frozen=True)
class Recorded:
    """One run, finished or not."""

    folder: Path
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    """Of metrics.jsonl, ascending by iteration; at least one. A value that was not finite is None."""
    left_out: int
    """Lines of metrics.jsonl that are no rows, or repeat one; a torn last line is not counted."""
    evaluation: dict[str, Any] | None
    summary: dict[str, Any] | None
    status: dict[str, Any] | None
    """What prove.sh says of its last call."""

    @property
    def env(self) -> str:
        return self.config["env"]

    @property
    def complete(self) -> bool:
        return self.summary is not None

    @property
    def seconds(self) -> float:
        """On the run's own clock: without what lies between its processes, and without their starts."""
        return self.summary["wall_s"] if self.summary else self.rows[-1]["wall_s"]

    @property
    def device(self) -> str:
        """The name of the GPU if it is known, else the kind of device."""
        return (self.status or {}).get("gpu") or self.config["device"]

    def column(self, key: str) -> list[float | None]:
        """A value for every row; None where a row has none."""
        return [row.get(key) for row in self.rows]


def read(folder: Path) -> Recorded:
    """Read the files of a run.

    Raises:
        RunError: there is no run, it has no row yet, or a file is damaged.
    """
    config = _object(folder / "config.json", {"env": str, "preset": str, "seed": int, "device": str})
    if config is None:
        raise RunError(f"{folder}: no run there (config.json is missing); give the --run-dir of a run")
    counts = {"env_steps": int, "updates": int}
    rows, left_out = _rows(folder / "metrics.jsonl")
    return Recorded(
        folder, config, rows, left_out,
        evaluation=_object(folder / "eval.json", counts | {"mean": float, "episodes": int}),
        summary=_object(folder / "summary.json", counts | {"wall_s": float}),
        status=_object(folder / "status.json", {}),
    )  # fmt: skip


def _object(path: Path, fields: dict[str, type]) -> dict[str, Any] | None:
    """The JSON object in a file, None if there is no file. It must have `fields` of these types; a whole number will do for a float."""
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}; make it readable") from None
    except (ValueError, RecursionError):
        raise RunError(f"{path}: is not JSON; copy it anew from the run") from None
    if not isinstance(value, dict):
        raise RunError(f"{path}: is not an object; copy it anew from the run")
    for name, kind in fields.items():
        if type(value.get(name)) not in ((int, float) if kind is float else (kind,)):
            raise RunError(f"{path}: {name} is missing or no {kind.__name__}; copy it anew from the run")
    return value


def _rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of metrics.jsonl, and how many lines were left out."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]  # after the last newline is nothing, or a line that is being written
    except FileNotFoundError:
        raise RunError(f"{path.parent}: metrics.jsonl is missing; let the run train until its first row") from None
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}; make it readable") from None
    rows: list[dict[str, Any]] = []
    for line in lines:
        row = _row(line)
        if row is not None and (not rows or row["iteration"] > rows[-1]["iteration"]):
            rows.append(row)
    if not rows:
        raise RunError(f"{path}: has no row yet; let the run train until its first row")
    return rows, len(lines) - len(rows)


def _row(line: bytes) -> dict[str, Any] | None:
    """The row that a line holds, if it is one."""
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or any(type(row.get(key)) is not int for key in COUNTS):
        return None
    numbers = all(row.get(key) is None or type(row[key]) in (int, float) for key in COLUMNS)
    return row if numbers and row.get("wall_s") is not None else None


def to_csv(runs: Sequence[Recorded], labels: Sequence[str]) -> str:
    """All rows of all runs, the name of the run first; a cell is empty where a row has no value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("run", *COLUMNS))
    for run, label in zip(runs, labels, strict=True):
        writer.writerows((label, *(row.get(key) for key in COLUMNS)) for row in run.rows)
    return text.getvalue()


def table(runs: Sequence[Recorded], labels: Sequence[str]) -> str:
    """A table for BENCHMARKS.md, a line a run; of several, the name of the run first."""
    lines = [HEAD, ("---",) * len(HEAD), *map(_cells, runs)]
    if len(runs) > 1:
        lines = [(first, *cells) for first, cells in zip(("run", "---", *labels), lines, strict=True)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(run: Recorded) -> tuple[str, ...]:
    env_steps, updates = ((run.summary or run.rows[-1])[name] for name in ("env_steps", "updates"))
    score, human = "none yet", "-"
    played = run.evaluation
    if played:
        score = f"{played['mean']:.2f} over {played['episodes']} episodes"
        if (played["env_steps"], played["updates"]) != (env_steps, updates):
            score += f", played after {played['env_steps']:,} steps and {played['updates']:,} updates"
        share = human_normalised(run.env, played["mean"])
        human = "-" if share is None else f"{share:.3f}"
    else:
        last = next((value for value in reversed(run.column("charts/episodic_return")) if value is not None), None)
        score += "" if last is None else f" (the last games of training {last:.2f})"
    return (
        run.env, run.config["preset"], str(run.config["seed"]), run.device, f"{env_steps:,}", f"{updates:,}",
        clock(run.seconds) + ("" if run.complete else ", unfinished"), score, human,
    )  # fmt: skip


def clock(seconds: float) -> str:
    """A duration for a person: 48 s, 7 min 05 s, 2 h 03 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
