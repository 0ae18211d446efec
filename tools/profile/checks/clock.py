"""Times of many iterations: a clock for each phase and R, the numbers that stand for it, and the memory of the process."""

import math
import os
import statistics
from pathlib import Path
from time import monotonic

import torch

from speedyzero.loop import Trainer
from speedyzero.schedule import Phase
from tools.profile.checks.projection import Key
from tools.profile.checks.trainers import once, step


def percentile(values: list[float], share: float) -> float:
    """The least value that at least `share` of them do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


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

    def run(self, phase: Phase, roots: int, least: int, most: int, seconds: float) -> None:
        """Iterations of one kind: `least` that count, then more until there are `most` or the time is over."""
        calls = self.calls.setdefault((phase, roots), [])
        over = monotonic() + seconds
        while len(calls) < self.unlike + least or (len(calls) < self.unlike + most and monotonic() < over):
            calls.append(once(self.trainer, phase, roots))

    def like(self, key: Key) -> list[float]:
        """Seconds of the iterations that are as all to come: without the first, and the capture."""
        return self.calls.get(key, [])[self.unlike :]

    def milliseconds(self) -> dict[Key, float]:
        """Median of an iteration for all that was run often enough."""
        return {key: 1e3 * statistics.median(self.like(key)) for key in self.calls if self.like(key)}

    def row(self, key: Key) -> dict:
        """The numbers of a phase and R."""
        config, (phase, roots), times = self.trainer.config, key, self.like(key)
        median = statistics.median(times)
        return {
            "phase": phase, "roots": roots, "iterations": len(times),
            "ms_median": 1e3 * median, "ms_p95": 1e3 * percentile(times, 0.95), "ms_least": 1e3 * min(times),
            "iterations_a_second": 1 / median,
            "env_steps_a_second": config.lanes / median if phase in ("collect", "train") else None,
            "updates_a_second": config.updates_per_iteration / median if phase in ("train", "learn") else None,
            "first_run_s": self.calls[key][0], "capture_s": self.calls[key][1] - median if self.unlike == 2 else None,
        }  # fmt: skip


def memory(device: torch.device) -> dict[str, int]:
    """Bytes that the process holds, and on CUDA those of PyTorch's tensors and of its allocator."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    found = {"rss": pages * os.sysconf("SC_PAGE_SIZE")}
    if device.type == "cuda":
        found |= {"allocated": torch.cuda.memory_allocated(device), "reserved": torch.cuda.memory_reserved(device)}
    return found
