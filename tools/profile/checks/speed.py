"""How fast each phase runs, how long the whole recipe would take of that, and that memory stays what it is.

Every phase and R of the recipe is run on one trainer: the random start and the first sweep as in a run, then the ring is filled (see
trainers.py) and the rest is run on it: the kernels see the same shapes as in a run. An iteration is counted nowhere, so the schedules stay
at the start of training; no kernel's time depends on them. The host's clock runs from the call to the return, which waits for the device:
that is what a run's iteration takes, the emulators' turn included.

`first run` holds the compilation of what no part before compiled; `capture` is the second call less an iteration. The projection is the
recipe's iterations times these medians; what was not measured is interpolated, and says so. On CUDA the same is timed without graphs, for
fewer iterations. Stages are those of an uncaptured trainer, since the kernels of a replayed graph belong to none: on CUDA the time of
their kernels, which a graph does not change; on a CPU the host's. The largest gaps to the floor are what to work on first.
"""

import dataclasses
import math
import os
import statistics
from pathlib import Path
from time import monotonic, perf_counter

import numpy as np
import torch

from speedyzero.loop import Trainer
from speedyzero.stages import PARTS, STAGES
from tools.profile import roofline, trace
from tools.profile.checks.facts import ceilings_of
from tools.profile.checks.job import Job, Record
from tools.profile.checks.trainers import end, fill, filled, forget, most_roots, once, start, step
from tools.profile.launches import Iterations

Key = tuple[str, int]
"""A phase and its R."""
PHASES = ("collect", "sweep", "train", "learn")
# Growth of the process that is not a leak: logs of the emulators, buffers of the allocator of the C library.
RSS_SLACK = 2**25
SNAPSHOTS = 8
# Of the time that is left when all is captured: stages and uncaptured iterations take the rest.
MEMORY_SHARE = 0.35


class Clock:
    """Seconds of every iteration of one trainer, in order, by phase and R."""

    def __init__(self, trainer: Trainer, captures: bool):
        self.trainer = trainer
        self.calls: dict[Key, list[float]] = {}
        # A trainer runs the first iteration of a graph as it is, and captures the second.
        self.unlike = 2 if captures else 1

    def start(self) -> None:
        """The random start and the first sweep, as in a run."""
        while self.trainer.phase() in ("collect", "sweep"):
            key, seconds = step(self.trainer)
            self.calls.setdefault(key, []).append(seconds)

    def run(self, key: Key, least: int, most: int, seconds: float) -> None:
        """Iterations of one kind: `least` that count, then more until there are `most` or the time is over."""
        calls, over = self.calls.setdefault(key, []), monotonic() + seconds
        while len(calls) < self.unlike + least or (len(calls) < self.unlike + most and monotonic() < over):
            calls.append(once(self.trainer, *key))

    def milliseconds(self) -> dict[Key, float]:
        """Median of the iterations that are as all to come, of what was run often enough."""
        return {key: 1e3 * statistics.median(calls[self.unlike :]) for key, calls in self.calls.items() if calls[self.unlike :]}

    def row(self, key: Key) -> dict:
        """The numbers of a phase and R."""
        config, (phase, roots), times = self.trainer.config, key, sorted(self.calls[key][self.unlike :])
        median = statistics.median(times)
        return {
            "phase": phase, "roots": roots, "iterations": len(times), "ms_median": 1e3 * median,
            "ms_p95": 1e3 * times[max(0, math.ceil(0.95 * len(times)) - 1)],
            "env_steps_a_second": config.lanes / median if phase in ("collect", "train") else None,
            "updates_a_second": config.updates_per_iteration / median if phase in ("train", "learn") else None,
            "first_run_s": self.calls[key][0], "capture_s": self.calls[key][1] - median if self.unlike == 2 else None,
        }  # fmt: skip


def table(rows: list[dict]) -> list[str]:
    """The rows of a clock, in the order of a run."""
    heads = {"ms_median": 10, "ms_p95": 10, "env_steps_a_second": 19, "updates_a_second": 17, "first_run_s": 12, "capture_s": 10}
    lines = [f"{'phase':8s} {'R':>6s} {'times':>6s} " + " ".join(f"{name:>{width}s}" for name, width in heads.items())]
    for row in sorted(rows, key=lambda row: (PHASES.index(row["phase"]), row["roots"])):
        numbers = (f"{'-' if row[name] is None else f'{row[name]:.3f}':>{width}s}" for name, width in heads.items())
        lines.append(f"{row['phase']:8s} {row['roots']:6d} {row['iterations']:6d} " + " ".join(numbers))
    return lines


def order(recipe: dict[Key, int]) -> list[Key]:
    """Phases and R as they should be measured, should the time run out: what a run does most first, each phase before a second R."""
    keys = sorted(recipe, key=lambda key: -recipe[key])
    firsts = [next(key for key in keys if key[0] == phase) for phase in dict.fromkeys(phase for phase, _ in keys)]
    return firsts + [key for key in keys if key not in firsts]


def estimate(measured: dict[Key, float], phase: str, roots: int) -> tuple[float | None, str]:
    """Milliseconds of an iteration, and their source: on the line between the nearest R on either side, or those of the nearest R.

    `learn`, if nothing of it was measured, takes the time of `train`: that is a little too much.
    """
    points = {r: ms for (name, r), ms in sorted(measured.items()) if name == phase}
    if not points:
        ms, source = estimate(measured, "train", roots) if phase == "learn" else (None, "not measured")
        return ms, source if ms is None else f"train, {source}"
    if roots in points:
        return points[roots], "measured"
    nearest = min(points, key=lambda r: abs(r - roots))
    between = min(points) < roots < max(points)
    return float(np.interp(roots, list(points), list(points.values()))), "interpolated" if between else f"as R {nearest}"


def project(recipe: dict[Key, int], measured: dict[Key, float], floors: dict[Key, float]) -> list[dict]:
    """What the iterations of each phase and R come to in a run; all times but those that end in `_s` are milliseconds of one."""
    rows = []
    for (phase, roots), iterations in sorted(recipe.items(), key=lambda item: (PHASES.index(item[0][0]), item[0][1])):
        ms, source = estimate(measured, phase, roots)
        spent, floor = iterations * (ms or 0.0) / 1e3, iterations * floors[phase, roots] / 1e3
        row = {"phase": phase, "roots": roots, "iterations": iterations, "ms": ms, "source": source}
        rows.append(row | {"spent_s": spent, "floor_s": floor})
    return rows


def tell_projection(job: Job, record: Record, measured: dict[Key, float], snapshot_ms: float) -> None:
    """The recipe at these speeds and at the floor of this device."""
    config, most = job.config, ceilings_of(job)
    counted, recipe = Iterations(config, job.spec), roofline.recipe(config)
    rows = project(recipe, measured, {key: 1e3 * roofline.floor_of(counted.iteration(*key), *most) for key in recipe})
    copies = config.total_updates // config.snapshot_interval
    spent = sum(row["spent_s"] for row in rows) + copies * snapshot_ms / 1e3
    floor = sum(row["floor_s"] for row in rows)
    record.keep("projection", {"rows": rows, "snapshots": copies, "seconds": spent, "floor_seconds": floor})
    record.say("", f"the whole recipe, {config.env_steps} steps and {config.total_updates} updates, at these speeds:",
               f"{'phase':8s} {'R':>6s} {'iterations':>11s} {'ms each':>10s} {'seconds':>9s} {'floor, s':>9s}  source")
    for row in rows:
        each = "-" if row["ms"] is None else f"{row['ms']:.3f}"
        record.say(f"{row['phase']:8s} {row['roots']:6d} {row['iterations']:11d} {each:>10s} {row['spent_s']:9.2f} {row['floor_s']:9.3g}"
                   f"  {row['source']}")
    record.say(f"{copies} snapshots of {snapshot_ms:.3f} ms each; in all {spent:.1f} s = {spent / 60:.2f} minutes; floor {floor:.3g} s",
               "left out: starting, compiling and capturing, rows of the log, checkpoints, the evaluation; transitions lost to resets")
    if missing := ", ".join(f"{row['phase']} R {row['roots']}" for row in rows if row["ms"] is None):
        record.late(f"projection: nothing was measured for {missing}")


def memory(device: torch.device) -> dict[str, int]:
    """Bytes that the process holds, and on CUDA those of PyTorch's tensors and of its allocator."""
    found = {"rss": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")}
    if device.type == "cuda":
        found |= {"allocated": torch.cuda.memory_allocated(device), "reserved": torch.cuda.memory_reserved(device)}
    return found


def watch_memory(job: Job, record: Record, clock: Clock) -> None:
    """Train with the least R for a while; what is held must not change."""
    key = min(key for key in clock.calls if key[0] == "train")
    before, done = memory(job.device), len(clock.calls[key])
    clock.run(key, 1, done + job.pick(1000, 20) - clock.unlike, MEMORY_SHARE * job.left())
    times, after = len(clock.calls[key]) - done, memory(job.device)
    growth = {name: after[name] - before[name] for name in before}
    record.keep("memory", {"iterations": times, "after": after, "growth": growth})
    record.say(f"memory over {times} iterations of training: "
               + ", ".join(f"{name} {after[name] / 2**20:.1f} MiB ({growth[name] / 2**20:+.1f})" for name in after))
    for name, more in growth.items():
        if more > RSS_SLACK if name == "rss" else more != 0:
            record.fail(f"memory: {name} changed by {more} bytes over {times} iterations of training")


def tell_stages(job: Job, record: Record, trainer: Trainer) -> None:
    """Profile an uncaptured trainer. Writes the trace."""
    roots, most, iterations = most_roots(job.config), ceilings_of(job), job.pick(3, 5)
    once(trainer, "train", roots)
    events, _ = trace.profiled(lambda: once(trainer, "train", roots), iterations, job.cuda, job.work / "trace.json.gz")
    rows, clock = trace.table_of(events, iterations), "device" if job.cuda else "cpu"
    found = Iterations(job.config, job.spec).iteration("train", roots)
    spent = {name: rows[name][f"{clock}_self"] for name in (*STAGES, *PARTS) if name in rows}
    above = dict(spent)
    for launch, times in found.items():
        if launch.stage in above:
            above[launch.stage] -= times * launch.floor(*most)
    total = sum(spent.values())
    gaps = sorted(above.items(), key=lambda item: -item[1])
    floor = roofline.floor_of(found, *most)
    record.keep("stages", {"roots": roots, "clock": clock, "measured": spent, "floor_seconds": floor, "gaps": gaps})
    record.say("", f"an iteration of training, R {roots}, by stage, uncaptured under the profiler ({clock} time):",
               *roofline.rows_of(roofline.by_stage(found, *most), {name: rows[name][f"{clock}_total"] for name in spent}))
    for name, more in gaps[:2] if total else ():
        record.say(f"largest gaps to the floor: {name}, {1e3 * more:.3f} ms ({100 * more / total:.0f} % of the iteration)")
    if total == 0:
        record.fail(f"stages: the profiler saw no {clock} time in any stage")


def run(job: Job, record: Record) -> None:
    recipe = roofline.recipe(job.config)
    trainer = start(job.config, job.spec)
    clock = Clock(trainer, captures=job.cuda)
    clock.start()
    fill(trainer)
    rows, at_line = [], len(record.lines)
    for at, key in enumerate(order(recipe)):
        if at and job.left() < job.pick(60, 0):
            record.late(f"{key[0]} R {key[1]} and what the recipe does less often were not measured")
            break
        clock.run(key, job.pick(5, 3), job.pick(60, 8), job.pick(4.0, 0.5))
        rows.append(clock.row(key))
        record.keep("phases", rows)
        record.lines[at_line:] = []
        record.say(*table(rows))
    times = []
    for _ in range(clock.unlike + SNAPSHOTS):
        begin = perf_counter()
        trainer.run("snapshot", trainer.state.refold)
        times.append(perf_counter() - begin)
    measured = clock.milliseconds()
    tell_projection(job, record, measured, 1e3 * statistics.median(times[clock.unlike :]))
    watch_memory(job, record, clock)
    end(trainer)
    del trainer, clock
    forget()

    trainer = filled(dataclasses.replace(job.config, graph="off"), job.spec)
    tell_stages(job, record, trainer)
    if job.cuda:
        clock, roots = Clock(trainer, captures=False), most_roots(job.config)
        for phase in ("train", "learn"):
            clock.run((phase, roots), 3, 5, 0.2 * job.left())
        for key, ms in clock.milliseconds().items():
            more = f", {ms / measured[key]:.2f} times as long as captured" if key in measured else ""
            record.say(f"uncaptured, {key[0]} R {key[1]}: {ms:.3f} ms{more}")
        record.keep("uncaptured", [clock.row(key) for key in clock.calls])
    end(trainer)
