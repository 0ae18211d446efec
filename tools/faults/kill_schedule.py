"""When to kill a run, and how: moments drawn from a seed and spread over the run, and the wait for one of them."""

from __future__ import annotations

import ctypes
import os
import random
import re
import select
import signal
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from time import monotonic, sleep
from typing import Literal, NamedTuple

from tools.faults.run import Run

DELAY_S = 0.005
"""About what it takes to write a file; and, once a checkpoint has its name, to sync, link the best, and delete the old."""
_CHECKPOINT = re.compile(r"checkpoint_(\d+)\.safetensors")
_CREATED, _MOVED, _FOLDER = 0x100, 0x80, 0x40000000
_HEAD = struct.Struct("iIII")  # of an inotify_event: watch, mask, cookie, bytes of the name


class Watch:
    """The names that appear below a folder, from inotify, so that a write is seen when it begins. Linux only. Raises OSError."""

    def __init__(self, folder: Path):
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._file = self._libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        self._folders: dict[int, Path] = {}
        for path in [folder, *filter(Path.is_dir, folder.rglob("*"))]:
            self._add(path)

    def _add(self, folder: Path) -> None:
        number = self._libc.inotify_add_watch(self._file, os.fsencode(folder), _CREATED | _MOVED)
        if number < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
        self._folders[number] = folder

    def appeared(self, seconds: float) -> Iterator[Path]:
        """The files created, or moved to their name, since the last call; waits up to `seconds` for the first."""
        if not select.select([self._file], [], [], seconds)[0]:
            return
        data = os.read(self._file, 1 << 16)
        while data:
            number, mask, _, length = _HEAD.unpack_from(data)
            name, data = data[_HEAD.size : _HEAD.size + length].rstrip(b"\0"), data[_HEAD.size + length :]
            if number not in self._folders:  # the queue overflowed
                continue
            path = self._folders[number] / os.fsdecode(name)
            if mask & _FOLDER:
                self._add(path)
            else:
                yield path

    def close(self) -> None:
        os.close(self._file)


class Pace(NamedTuple):
    """Timing of a run that nobody kills."""

    iterations: int
    start_s: float
    """Until config.json is there."""
    iteration_s: float
    evaluation_s: float


@dataclass(frozen=True)
class Moment:
    """When to kill a process.

    clock: `delay` seconds after it started. write: `delay` after a file like `pattern` begins to be written, once there is a checkpoint of
    `iteration`. after: `delay` after such a file has its name. evaluation: `delay` after the games of the end began.
    """

    kind: Literal["clock", "write", "after", "evaluation"]
    pattern: str = ""
    iteration: int = 0
    delay: float = 0.0

    def __str__(self) -> str:
        return f"{self.kind} {self.pattern}".strip()


class Blow(NamedTuple):
    """What a run is killed with, and who gets it."""

    signal: signal.Signals
    rank: int | None = None
    """None: the process; over ranks that is torchrun."""

    def __str__(self) -> str:
        return self.signal.name if self.rank is None else f"{self.signal.name} to rank {self.rank}"


def blows(random: random.Random, kills: int, ranks: int) -> list[Blow]:
    """Of eight over ranks: four SIGKILLs of a rank, two of torchrun, a SIGTERM and a SIGINT to torchrun. Mixed."""
    kinds = [signal.SIGKILL] * 6 + [signal.SIGTERM, signal.SIGINT]
    drawn = [Blow(kinds[at % 8], random.randrange(ranks) if at % 8 < 4 else None) for at in range(kills)]
    random.shuffle(drawn)
    return drawn


def draw(random: random.Random, kills: int, pace: Pace, interval: int) -> list[Moment]:
    """Moments in the order of a run: half of them in a write, a third by the clock, the others right after a checkpoint. In the last
    tenth, writes are those of the results and the others lie in the evaluation. The first is the very first write.

    interval: iterations between checkpoints.
    """
    early = kills - max(1, kills // 10)
    moments = [Moment("write", "config.json")]
    for number in range(1, kills):
        kind, late = random.choices(("write", "clock", "after"), (3, 2, 1))[0], number >= early
        # The iteration that the run must reach before this kill: so kills spread over a run, however little each life adds.
        target = pace.iterations if late else max(0, int(pace.iterations * number / early) - 2 * interval)
        delay = random.uniform(0, DELAY_S)
        if late and kind != "write":
            moments.append(Moment("evaluation", delay=random.uniform(0, pace.evaluation_s)))
        elif kind == "clock":
            moments.append(clock(random, pace, 2 * interval))
        elif kind == "after":
            moments.append(Moment(kind, "checkpoint_*", target, delay))
        else:
            files = ("eval.json", "summary.json") if late else (*["checkpoint_*"] * 3, *["frames_*"] * 2, "metrics.jsonl")
            moments.append(Moment(kind, random.choice(files), target, delay))
    return moments


def clock(random: random.Random, pace: Pace, iterations: int) -> Moment:
    """A moment between the start of a process and about `iterations` iterations later, uniform."""
    return Moment("clock", delay=random.uniform(0, pace.start_s + iterations * pace.iteration_s))


def wait(run: Run, watch: Watch, moment: Moment, reached: int, spare: int, limit_s: float) -> bool:
    """Wait for a moment. False if the run ends before it, or it does not come within `limit_s`.

    reached: iteration of the newest checkpoint when the run began. spare: a checkpoint this many iterations after `moment.iteration`
    stands in for a write that does not come.
    """

    def came() -> bool:
        nonlocal reached
        if moment.kind == "clock":
            return True
        if moment.kind == "evaluation" and "playing " in run.said():
            return True
        for path in watch.appeared(0.01):
            if saved := _CHECKPOINT.fullmatch(path.name):
                reached = max(reached, int(saved[1]))
            due = path.name.endswith(".tmp") == (moment.kind == "write") and fnmatch(path.name.removesuffix(".tmp"), moment.pattern)
            if (due and reached >= moment.iteration) or (moment.pattern and saved and reached >= moment.iteration + spare):
                return True
        return False

    while run.process.poll() is None and monotonic() < run.started + limit_s:
        if came():
            sleep(moment.delay)
            return run.process.poll() is None
    return False
