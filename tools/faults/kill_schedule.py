"""When to kill: moments drawn from a seed and spread over a run, and the wait for one of them."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from time import monotonic, sleep
from typing import Literal

from tools.faults.run import Run
from tools.faults.watch import Watch

Kind = Literal["clock", "write", "after", "evaluation"]

AFTER_S = 0.005
"""Seconds after a checkpoint has its name in which the run syncs, links the best, and deletes the old."""
_CHECKPOINT = re.compile(r"checkpoint_(\d+)\.safetensors")


@dataclass(frozen=True)
class Pace:
    """Timing of a run that nobody kills."""

    start_s: float
    """Until config.json is there."""
    iteration_s: float
    iterations: int
    evaluation_s: float
    write_s: dict[str, float]
    """Median time that writing a file takes, by pattern of its name."""


@dataclass(frozen=True)
class Moment:
    """When to kill a process.

    clock: `delay` seconds after it started. write: `delay` after a file like `pattern` begins to be written, once there is a checkpoint of
    `iteration`. after: `delay` after such a file has its name. evaluation: `delay` after the games of the end began.
    """

    kind: Kind
    pattern: str = ""
    iteration: int = 0
    delay: float = 0.0

    def __str__(self) -> str:
        return f"{self.kind} {self.pattern}".strip()


def draw(random: random.Random, kills: int, pace: Pace, interval: int) -> list[Moment]:
    """Moments in the order of a run: half of them in a write, a third by the clock, the others right after a checkpoint. In the last
    tenth, writes are those of the results and the others lie in the evaluation. The first is the very first write.

    interval: iterations between checkpoints.
    """
    ending = max(1, kills // 10)
    kinds: list[Kind] = ["write"] * -(-kills // 2) + ["clock"] * (kills // 3)
    kinds += ["after"] * (kills - len(kinds))
    random.shuffle(kinds)
    first = kinds.index("write")
    kinds[0], kinds[first] = kinds[first], kinds[0]
    moments = [Moment("write", "config.json")]
    for number, kind in enumerate(kinds[1:], 1):
        late = number >= kills - ending
        # The iteration that the run must reach before this kill: so kills spread over a run, however little each life adds.
        target = max(0, int(pace.iterations * number / max(1, kills - ending)) - 2 * interval)
        pattern = random.choice(("checkpoint_*", "checkpoint_*", "checkpoint_*", "frames_*", "frames_*", "metrics.jsonl"))
        if late and kind == "write":
            pattern, target = random.choice(("eval.json", "summary.json")), pace.iterations
        if late and kind != "write":
            moments.append(Moment("evaluation", delay=random.uniform(0, pace.evaluation_s)))
        elif kind == "clock":
            moments.append(clock(random, pace, 2 * interval))
        elif kind == "after":
            moments.append(Moment(kind, "checkpoint_*", target, random.uniform(0, AFTER_S)))
        else:
            moments.append(Moment(kind, pattern, target, random.uniform(0, pace.write_s.get(pattern, 0.0))))
    return moments


def clock(random: random.Random, pace: Pace, iterations: int) -> Moment:
    """A moment between the start of a process and about `iterations` iterations later, uniform."""
    return Moment("clock", delay=random.uniform(0, pace.start_s + iterations * pace.iteration_s))


def wait(run: Run, watch: Watch, moment: Moment, reached: int, spare: int, limit_s: float) -> bool:
    """Wait for a moment. False if the run ends before it, or it does not come within `limit_s`.

    reached: iteration of the newest checkpoint when the run began. spare: a checkpoint this many iterations after `moment.iteration`
    stands in for a write that does not come.
    """
    deadline = run.started + limit_s
    while run.process.poll() is None and monotonic() < deadline:
        came = moment.kind == "evaluation" and "\nplaying " in "\n" + run.said()
        if moment.kind == "clock" and (left := run.started + moment.delay - monotonic()) < 0.02:
            sleep(max(0.0, left))
            return run.process.poll() is None
        for event in () if came else watch.events(0.01):
            name, arrived = event.path.name.removesuffix(".tmp"), _CHECKPOINT.fullmatch(event.path.name) if event.moved else None
            if arrived:
                reached = max(reached, int(arrived[1]))
            right = event.moved == (moment.kind == "after") and event.path.name.endswith(".tmp") != event.moved
            matches = right and reached >= moment.iteration and fnmatch(name, moment.pattern + "*")
            if moment.kind in ("write", "after") and (matches or (arrived and reached >= moment.iteration + spare)):
                came = True
                break
        if came:
            sleep(moment.delay)
            return run.process.poll() is None
    return False


def measured(run: Run, watch: Watch) -> Pace:
    """The pace of a new run that ends by itself, watched from its start."""
    begun: dict[Path, float] = {}
    took: dict[str, list[float]] = {}
    at: dict[str, float] = {}
    iterations, ended = 0, False
    while not ended:
        ended = run.process.poll() is not None  # and then look once more
        for event in watch.events(0.05):
            now, path = monotonic() - run.started, event.path
            if not event.moved:
                begun[path] = now
            elif (began := begun.pop(path.with_name(path.name + ".tmp"), None)) is not None:
                pattern = re.sub(r"_\d+\.safetensors", "_*", path.name)
                took.setdefault(pattern, []).append(now - began)
                at[pattern] = now
            if event.moved and (match := _CHECKPOINT.fullmatch(path.name)):
                iterations = int(match[1])
    start, end = at.get("config.json", 0.0), at.get("checkpoint_*", 0.0)
    medians = {pattern: sorted(times)[len(times) // 2] for pattern, times in took.items()}
    return Pace(start, (end - start) / max(1, iterations), iterations, max(0.0, at.get("eval.json", end) - end), medians)
