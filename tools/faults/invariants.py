"""What a run owes to whoever kills it, checked from outside, on its files and its output. Functions return one line for each fault."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from speedyzero.run import checkpoint
from speedyzero.run.frames import FrameStore
from tools.faults.run import rows_of

FILES = (
    "lock", "config.json", "metrics.jsonl", "eval.json", "summary.json", "evaluations/*.json", "tensorboard/events.out.tfevents.*",
    "checkpoints/checkpoint_*.safetensors", "checkpoints/best.safetensors", "checkpoints/frames/frames_*.safetensors", "*.tmp", "*/.tmp*",
)  # fmt: skip
"""All that may lie in a run directory."""

_RESUMED = re.compile(r"^resumed .* at iteration (\d+):", re.MULTILINE)
_STOPPED = re.compile(r"^stopped by (\w+)(?: at iteration (\d+) and saved|, nothing is lost); go on with --resume", re.MULTILINE)
_MISSED = re.compile(r"error: (rank \d+ (ended or is stuck|lost the others)|torchrun, which started this rank, has ended)")
"""The lines with which ranks may end when another, or torchrun, was killed."""
_NEVER = ("is damaged", "trying the one before", "unreadable or repeated", "was deleted while running", "was not written", "not written (")
"""Parts of lines that a run whose files nobody touched must not print."""


@dataclass
class Files:
    """A run directory while no process runs."""

    newest: int = 0
    """Iteration of the newest checkpoint; 0 if there is none."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Of metrics.jsonl."""
    leftovers: list[str] = field(default_factory=list)
    """Partial files of killed writes."""
    complete: bool = False
    """Whether there is a summary.json."""
    broken: list[str] = field(default_factory=list)

    @property
    def last_row(self) -> int:
        """Iteration of the last row, 0 if there is none."""
        return self.rows[-1]["iteration"] if self.rows else 0


def inspect(run_dir: Path) -> Files:
    """Read everything in a run directory: each file must be complete and readable, or its name end in .tmp."""
    found = Files(complete=(run_dir / "summary.json").exists())
    for path in sorted(path for path in run_dir.rglob("*") if path.is_file()):
        name = str(path.relative_to(run_dir))
        try:
            if not any(fnmatch(name, pattern) for pattern in FILES):
                found.broken.append(f"{name}: unknown file")
            elif ".tmp" in name:
                found.leftovers.append(name)
            elif name.endswith(".json"):
                json.loads(path.read_bytes())
            elif name.endswith(".safetensors"):
                _, meta = checkpoint.load(path)
                if path.stem.startswith("checkpoint_"):
                    found.newest = max(found.newest, meta["iterations"])
                    if checkpoint.path_of(path.parent, meta["iterations"]) != path:
                        found.broken.append(f"{name}: holds iteration {meta['iterations']}")
        except (ValueError, checkpoint.CheckpointError) as error:
            found.broken.append(f"{name}: {str(error).partition(';')[0]}")
    metrics = run_dir / "metrics.jsonl"
    found.rows, wrong = rows_of(metrics.read_bytes() if metrics.exists() else b"")
    found.broken += [f"metrics.jsonl: {line}" for line in wrong]
    for before, row in pairwise(found.rows):
        if row["iteration"] <= before["iteration"] or any(row[name] < before[name] for name in ("wall_s", "env_steps", "updates")):
            found.broken.append(f"metrics.jsonl: counts or time fall in the row of iteration {row['iteration']}")
    return found


@dataclass
class Life:
    """One process of a run, from its output."""

    begun: bool = False
    """Whether it began or resumed the run, and did not only start."""
    resumed_at: int | None = None
    """Iteration at which it resumed."""
    stopped_at: int | None = None
    """Iteration at which it stopped and saved."""
    stopped_by: str | None = None
    """The signal that it named."""
    replayed: bool = False
    """Whether missing frames were replayed."""
    last_line: str = "it said nothing"
    missed: list[str] = field(default_factory=list)
    """What its ranks said of each other's end, or torchrun's."""
    broken: list[str] = field(default_factory=list)


def follow(before: Files, after: Files, said: str, interval: int) -> Life:
    """Check a life between two looks at the files: it resumes at the newest checkpoint and loses nothing that came before.

    interval: iterations between checkpoints; at most two intervals may be lost, as the last one may still be being written.
    """
    lines = said.strip().splitlines() or [Life.last_line]
    life = Life("env_steps " in said or "playing " in said, replayed="the frames come from replaying" in said, last_line=lines[-1])
    life.broken += [f"it said: {line}" for line in lines if any(part in line for part in _NEVER)]
    life.missed = [line for line in lines if _MISSED.match(line)]
    if (ends := len(_STOPPED.findall(said))) > 1:
        life.broken.append(f"{ends} lines say that it stopped")
    if match := _RESUMED.search(said):
        life.begun, life.resumed_at = True, int(match[1])
        if life.resumed_at < before.newest:
            life.broken.append(f"resumed at iteration {life.resumed_at}, though {before.newest} was saved")
    if match := _STOPPED.search(said):
        life.stopped_by, life.stopped_at = match[1], int(match[2]) if match[2] else None
    if after.newest < before.newest:
        life.broken.append(f"the newest checkpoint is of iteration {after.newest}, and was of {before.newest}")
    if life.begun and after.last_row - after.newest >= 2 * interval:
        life.broken.append(f"iteration {after.last_row} is logged and {after.newest} saved: more than two intervals of {interval} are lost")
    return life


def end(number: signal.Signals, code: int, life: Life, after: Files) -> list[str]:
    """Check how a process ended, by itself or after a signal. A SIGKILL that reached it needs no check.

    number: the signal that was sent, or came too late. code: its exit code, negative if a signal ended it.
    """
    if after.complete and (code == 0 or code == -number != -signal.SIGKILL):  # the signal came while Python ended
        return []
    if number == signal.SIGKILL or code not in (-number, 128 + number):
        return [f"exit code {code}: {life.last_line}"]
    faults = {
        f"did not handle {number.name}": code < 0 and life.begun,
        f"exit code {code}, but it said: {life.last_line}": code > 0 and life.stopped_by != number.name,
        f"stopped at iteration {life.stopped_at}, saved is {after.newest}": life.stopped_at not in (None, after.newest),
        f"iteration {after.last_row} was logged, and {after.newest} saved": life.begun and after.last_row > after.newest,
        f"left {', '.join(after.leftovers)}": code > 0 and after.leftovers,
    }
    return [text for text, wrong in faults.items() if wrong]


def end_over_ranks(number: signal.Signals, rank: int | None, code: int | None, life: Life, after: Files) -> list[str]:
    """Check how the ranks ended after a signal to one of them, or to torchrun, which they must take for a SIGTERM if it was killed.

    code: torchrun's exit code; None if it goes on, since it starts the ranks again.
    """
    if rank is not None:
        others = [line for line in life.missed if not line.startswith(f"error: rank {rank} ended or is stuck")]
        faults = {
            f"torchrun ended with {code}: {life.last_line}": code not in (None, 0),
            f"rank {rank} was killed, and ranks said: {', '.join(others)}": others,
            f"{len(life.missed)} ranks said that rank {rank} was killed": len(life.missed) > 1,
        }
        return [text for text, wrong in faults.items() if wrong]
    asked = signal.SIGTERM if number == signal.SIGKILL else number
    # torchrun's own is 1 after any signal, and its own death if it was killed or had not begun.
    handled = life.begun or life.stopped_by is not None
    if after.complete and life.stopped_by is None:  # the signal came when all was done
        code = 0
    faults = [f"torchrun ended with {code}"] if code not in (0, 1, -number) else []
    return faults + end(asked, 0 if code == 0 else 128 + asked if handled else -asked, life, after)


def compare(control: Path, killed: Path, frames: bool, metas: bool = True) -> list[str]:
    """Compare a complete run with one of the same seed that was never killed. Nothing differs if resuming is exact.

    frames: also compare the ring's, all of which the last process must have kept. metas: also what a checkpoint says besides tensors.
    """
    runs = control, killed
    paths = [checkpoint.latest(run_dir / "checkpoints") for run_dir in runs]
    if None in paths or paths[0].name != paths[1].name:
        return [f"the last checkpoints are {paths[0]} and {paths[1]}"]
    (wanted, meta), (tensors, other) = map(checkpoint.load, paths)
    broken = [f"tensor {name}: in one of the two only" for name in sorted(wanted.keys() ^ tensors.keys())]
    broken += [f"tensor {name}: differs" for name in wanted if name in tensors and not _same(wanted[name], tensors[name])]
    if metas:
        broken += [f"{name} is {other[name]}, not {value}" for name, value in meta.items() if name != "config" and other[name] != value]
    try:
        if frames and not torch.equal(*(_ring(run_dir, meta) for run_dir in runs)):
            broken.append("the frames of the ring differ")
    except checkpoint.CheckpointError as error:
        broken.append(str(error))
    rows = [[_timeless(row) for row in inspect(run_dir).rows] for run_dir in runs]
    if odd := [at for at, (one, two) in enumerate(zip_longest(*rows), 1) if one != two]:
        broken.append(f"metrics.jsonl: {len(rows[1])} rows, not {len(rows[0])}; the first that differs is row {odd[0]}")
    for name in ("eval.json", "summary.json"):
        one, two = (_timeless(json.loads((run_dir / name).read_bytes())) for run_dir in runs)
        if one != two:
            broken.append(f"{name} differs: {two}, not {one}")
    board = EventAccumulator(str(killed / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    drawn = [event.value for event in board.Scalars("env_steps")] if "env_steps" in board.Tags()["scalars"] else []
    if drawn != [row["env_steps"] for row in rows[1]]:
        broken.append("tensorboard shows other rows than metrics.jsonl")
    return broken


def _same(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Bit for bit: a NaN is like itself."""
    alike = (one.dtype, one.shape) == (two.dtype, two.shape)
    return alike and torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (one, two)))


def _timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "wall_s" and not name.startswith("time/")}


def _ring(run_dir: Path, meta: dict[str, Any]) -> torch.Tensor:
    """[L, T, C, H, W], the frames of the ring at the end of a run."""
    store = FrameStore(run_dir / "checkpoints" / "frames")
    lap = -(-meta["config"]["ring_positions"] // meta["config"]["lanes"])
    _, piece = checkpoint.load(next(path for _, path in store.pieces()))
    lanes, _, *frame = piece["shape"]
    ring = torch.zeros(lanes, lap, *frame, dtype=getattr(torch, piece["dtype"].removeprefix("torch.")))
    store.read(ring, meta["slots"])
    return ring
