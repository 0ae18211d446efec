"""What a run owes to whoever kills it, checked from outside, on its files and its output. Functions return one line for each fault."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import dataclass, field
from fnmatch import fnmatch
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

_RESUMED = re.compile(r"^resumed .* at iteration (\d+): (\d+) steps, (\d+) updates$", re.MULTILINE)
_STOPPED = re.compile(r"^stopped by (\w+)(?: at iteration (\d+) and saved|, nothing is lost); go on with --resume", re.MULTILINE)
_NEVER = ("is damaged", "trying the one before", "unreadable or repeated", "was deleted while running", "was not written", "not written (")
"""Parts of lines that a run whose files nobody touched must not print."""


@dataclass
class Files:
    """A run directory while no process runs."""

    newest: int = 0
    """Iteration of the newest checkpoint; 0 if there is none."""
    counts: dict[str, int] = field(default_factory=dict)
    """Its env_steps and updates."""
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
                if fnmatch(name, "checkpoints/checkpoint_*"):
                    iteration = int(path.stem.rpartition("_")[2])
                    if meta["iterations"] != iteration:
                        found.broken.append(f"{name}: holds iteration {meta['iterations']}")
                    if iteration >= found.newest:
                        found.newest, found.counts = iteration, {count: meta[count] for count in ("env_steps", "updates")}
        except (ValueError, checkpoint.CheckpointError) as error:
            found.broken.append(f"{name}: {str(error).partition(';')[0]}")
    metrics = run_dir / "metrics.jsonl"
    found.rows, wrong = rows_of(metrics.read_bytes() if metrics.exists() else b"")
    found.broken += [f"metrics.jsonl: {line}" for line in wrong]
    for before, row in zip(found.rows, found.rows[1:], strict=False):
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
    last_line: str = ""
    replayed: bool = False
    """Whether missing frames were replayed."""
    broken: list[str] = field(default_factory=list)


def follow(before: Files, after: Files, said: str, interval: int) -> Life:
    """Check a life between two looks at the files: it resumes at the newest checkpoint and loses nothing that came before.

    interval: iterations between checkpoints; at most two intervals may be lost, as the last one may still be being written.
    """
    life = Life(begun="env_steps " in said or "playing " in said, replayed="the frames come from replaying" in said)
    life.last_line = said.strip().rpartition("\n")[2]
    life.broken += [f"it said: {line}" for line in said.splitlines() if any(part in line for part in _NEVER)]
    if match := _RESUMED.search(said):
        life.resumed_at, steps, updates = map(int, match.groups())
        life.begun = True
        if life.resumed_at < before.newest:
            life.broken.append(f"resumed at iteration {life.resumed_at}, though {before.newest} was saved")
        if life.resumed_at == before.newest and before.counts not in ({}, {"env_steps": steps, "updates": updates}):
            life.broken.append(f"resumed at {steps} steps and {updates} updates, saved were {before.counts}")
        kept, found = ([row for row in files.rows if row["iteration"] <= life.resumed_at] for files in (before, after))
        if kept != found:
            life.broken.append(f"metrics.jsonl: rows up to iteration {life.resumed_at} changed at the resume")
        later = [row for row in after.rows if row["iteration"] > life.resumed_at]
        if any(row["env_steps"] < steps or row["updates"] < updates for row in later):
            life.broken.append(f"metrics.jsonl: a row after the resume has less than {steps} steps and {updates} updates")
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
        return [f"exit code {code}: {life.last_line or 'it said nothing'}"]
    wrong = []
    if code == -number and life.begun:
        wrong.append(f"did not handle {number.name}")
    if code > 0 and life.stopped_by != number.name:
        wrong.append(f"exit code {code}, but it said: {life.last_line}")
    if life.stopped_at not in (None, after.newest):
        wrong.append(f"stopped at iteration {life.stopped_at}, saved is {after.newest}")
    if life.begun and after.last_row > after.newest:
        wrong.append(f"iteration {after.last_row} was logged, and {after.newest} saved")
    if code > 0 and after.leftovers:
        wrong.append(f"left {', '.join(after.leftovers)}")
    return wrong


def compare(control: Path, killed: Path, frames: bool, metas: bool = True) -> list[str]:
    """Compare a complete run with one of the same seed that was never killed. Nothing differs if resuming is exact.

    frames: also compare the ring's, all of which the last process must have kept. metas: also what a checkpoint says besides tensors.
    """
    paths = [checkpoint.latest(run_dir / "checkpoints") for run_dir in (control, killed)]
    if None in paths or paths[0].name != paths[1].name:
        return [f"the last checkpoints are {paths[0]} and {paths[1]}"]
    (wanted, meta), (tensors, other) = map(checkpoint.load, paths)
    broken = [f"tensor {name}: in one of the two only" for name in sorted(wanted.keys() ^ tensors.keys())]
    broken += [f"tensor {name}: differs" for name in wanted if name in tensors and not _same(wanted[name], tensors[name])]
    if metas:
        broken += [f"{name} is {other[name]}, not {value}" for name, value in meta.items() if name != "config" and other[name] != value]
    try:
        if frames and not torch.equal(*(_ring(run_dir, meta) for run_dir in (control, killed))):
            broken.append("the frames of the ring differ")
    except checkpoint.CheckpointError as error:
        broken.append(str(error))
    rows = [[_timeless(row) for row in inspect(run_dir).rows] for run_dir in (control, killed)]
    if rows[0] != rows[1]:
        at = next((i for i, (a, b) in enumerate(zip(*rows, strict=False)) if a != b), min(map(len, rows)))
        broken.append(f"metrics.jsonl: {len(rows[1])} rows, not {len(rows[0])}; the first that differs is row {at + 1}")
    for name in ("eval.json", "summary.json"):
        one, two = (_timeless(json.loads((run_dir / name).read_bytes())) for run_dir in (control, killed))
        if one != two:
            broken.append(f"{name} differs: {two}, not {one}")
    if events(killed) != [row["env_steps"] for row in rows[1]]:
        broken.append("tensorboard shows other rows than metrics.jsonl")
    return broken


def events(run_dir: Path) -> list[float]:
    """The points of env_steps that TensorBoard draws."""
    accumulator = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    found = accumulator.Scalars("env_steps") if "env_steps" in accumulator.Tags()["scalars"] else []
    return [event.value for event in found]


def _same(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Bit for bit."""
    if (one.dtype, one.shape) != (two.dtype, two.shape):
        return False
    return torch.equal(*(tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, two)))


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
