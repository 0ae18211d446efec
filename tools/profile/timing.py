"""Timing two functions against each other in one run, and what the machine can do at most."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter, process_time

import torch

# A GPU of 2 GHz sleeps this many cycles a second; too many only make a bench wait.
CYCLES = 2e9
NOISE = {"cpu": 1.5, "cuda": 1.15}
"""A ratio is worse than its baseline if even the lower quartile of the pairs exceeds it by this factor."""


class Stopwatch:
    """Seconds a call takes on a device.

    On CUDA the device sleeps while the calls are queued, so that what counts is the kernels one after the other, as in a captured
    graph, and not the host. On a CPU it is the time that this process was given, whatever else runs beside it.
    """

    def __init__(self, function: Callable[[], object], device: torch.device):
        self.function, self.cuda = function, device.type == "cuda"
        for _ in range(3):
            function()
        self._wait()
        start = perf_counter()
        function()
        self.host = perf_counter() - start
        self._wait()
        whole = perf_counter() - start
        # The queue of a device holds about a thousand launches, and a reference may take a hundred.
        self.calls = max(1, min(5 if self.cuda else 1000, int(2e-3 / whole)))

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self) -> float:
        """Of one call, the mean over a few in a row."""
        if self.cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(int(min(0.1, 2 * self.host * self.calls + 1e-4) * CYCLES))
            start.record()
            for _ in range(self.calls):
                self.function()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / self.calls
        begin = process_time()
        for _ in range(self.calls):
            self.function()
        return (process_time() - begin) / self.calls


@dataclass(frozen=True)
class Comparison:
    """Ours against another in alternation."""

    ours: float
    """Median seconds."""
    other: float
    ratios: tuple[float, ...]
    """Seconds of ours over those of the other, pair by pair, ascending."""

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def quartiles(self) -> tuple[float, float]:
        low, _, high = statistics.quantiles(self.ratios, n=4)
        return low, high

    def regressed(self, baseline: float, noise: float) -> bool:
        """Whether ours has become slower against the other than the pairs' spread and `noise` explain."""
        return self.quartiles[0] > baseline * noise


def compare(ours: Callable[[], object], other: Callable[[], object], device: torch.device, pairs: int = 21) -> Comparison:
    """Time the two in turns, the order changing from pair to pair."""
    watches = Stopwatch(ours, device), Stopwatch(other, device)
    times: list[tuple[float, float]] = []
    for pair in range(pairs):
        first, second = (watch.seconds() for watch in watches[:: -1 if pair % 2 else 1])
        times.append((second, first) if pair % 2 else (first, second))
    mine, theirs = zip(*times, strict=True)
    return Comparison(statistics.median(mine), statistics.median(theirs), tuple(sorted(a / b for a, b in times)))


def median_seconds(function: Callable[[], object], device: torch.device, times: int = 21) -> float:
    """Of one call."""
    watch = Stopwatch(function, device)
    return statistics.median(watch.seconds() for _ in range(times))


@dataclass(frozen=True)
class Ceilings:
    """What the device does at best, measured in this process."""

    bytes_a_second: float
    """Read and written by a large copy."""
    flops_a_second: float
    """By a large matrix product."""

    def floor(self, bytes_moved: float, flops: float) -> float:
        """Seconds that an operation takes at least."""
        return max(bytes_moved / self.bytes_a_second, flops / self.flops_a_second)


def ceilings(device: torch.device, side: int = 8192, copied: int = 2**30) -> Ceilings:
    """Measure a device: a copy of `copied` bytes, and a product of two matrices of `side` numbers a side, in bf16 on CUDA, else in fp32."""
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = median_seconds(lambda: target.copy_(source), device)
    matrix = torch.randn(side, side, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    product = median_seconds(lambda: matrix @ matrix, device)
    return Ceilings(2 * copied / copy, 2 * side**3 / product)
