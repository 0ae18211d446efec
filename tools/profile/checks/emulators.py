"""What the emulators cost, and whether the device's work hides it: iterations with their turn against the same without.

The turn alone is timed by `send` and `recv` with nothing else going on; its threads' time is the process's less that of the thread that
waits. Then training iterations are run in pairs, one with the turn and one whose `send` and `recv` return at once (the turn is called by
name at every replay, so nothing is captured anew), in changing order. What the pairs differ by is what of the turn shows:

    hidden share = 1 - (with - without) / turn alone

1: all of it is hidden; 0: none. Noise can push it past either: it is given for the median pair and for the quartiles. On CUDA the same is
done with MANY lanes.
"""

import dataclasses
import os
import statistics
from collections.abc import Callable
from time import perf_counter, process_time, thread_time

import numpy as np

from speedyzero.config import Config, ConfigError, check
from speedyzero.envs import Emulators
from speedyzero.loop import Trainer
from tools.profile.checks.clock import percentile
from tools.profile.checks.job import Job, Record
from tools.profile.checks.trainers import end, filled, forget, most_roots, once

MANY = 32


def verdict(hidden: float, low: float, high: float) -> str:
    """The hidden share in words; pairs that differ by more than a turn without a reason say nothing of the turn."""
    between = f"{100 * low:.0f} to {100 * high:.0f} % by the quartiles of the pairs"
    if high - low > 1:
        return f"how much of the turn is hidden is lost in the noise: {between}"
    return f"{100 * hidden:.0f} % of the turn is hidden, {between}"


class Gate:
    """Stands before the emulators' `send` and `recv`, and lets them through or not; times those that it lets through."""

    def __init__(self, emulators: Emulators):
        self.open = True
        self.send_s: list[float] = []
        self.recv_s: list[float] = []
        self._send, self._recv = emulators.send, emulators.recv
        emulators.send, emulators.recv = self.send, self.recv

    def _timed(self, function: Callable[[], None], times: list[float]) -> None:
        if self.open:
            begin = perf_counter()
            function()
            times.append(perf_counter() - begin)

    def send(self) -> None:
        self._timed(self._send, self.send_s)

    def recv(self) -> None:
        self._timed(self._recv, self.recv_s)


def hidden_shares(differences: list[float], turn: float) -> tuple[float, float, float]:
    """Of the turn, what costs an iteration nothing: by the median of what pairs differ by, and by the quartiles, the lower share first."""
    low, middle, high = statistics.quantiles(differences, n=4, method="inclusive")
    return 1 - middle / turn, 1 - high / turn, 1 - low / turn


def alone(emulators: Emulators, turns: int) -> dict:
    """Turns with random actions and nothing else: their seconds, and the seconds of a core that the emulators' threads take for one."""
    draw = np.random.default_rng(0)
    actions = draw.integers(emulators.spec.num_actions, size=(turns, emulators.lanes))
    times = []
    process, thread = process_time(), thread_time()
    for row in actions:
        emulators.actions.numpy()[:] = row
        begin = perf_counter()
        emulators.send()
        emulators.recv()
        times.append(perf_counter() - begin)
    process, thread = process_time() - process, thread_time() - thread
    emulators.drain_finished()
    median = statistics.median(times)
    return {
        "turns": turns, "ms_median": 1e3 * median, "ms_p95": 1e3 * percentile(times, 0.95), "steps_a_second": emulators.lanes / median,
        "threads_cpu_ms": 1e3 * max(0.0, process - thread) / turns, "caller_cpu_ms": 1e3 * thread / turns,
    }  # fmt: skip


def pairs(trainer: Trainer, gate: Gate, roots: int, most: int, left: Callable[[], float]) -> dict:
    """Iterations with and without the turn, in turns, at least three pairs and at most `most` while `left()` is not 0."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    cpu: dict[bool, list[float]] = {True: [], False: []}
    gate.send_s.clear()
    gate.recv_s.clear()
    done = 0
    while done < 3 or (done < most and left() > 0):
        for is_open in (True, False) if done % 2 else (False, True):
            gate.open = is_open
            begin = process_time()
            seconds[is_open].append(once(trainer, "train", roots))
            cpu[is_open].append(process_time() - begin)
        done += 1
    gate.open = True
    median = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "pairs": done, "with_ms": 1e3 * median[True], "without_ms": 1e3 * median[False],
        "differences_ms": [1e3 * (a - b) for a, b in zip(seconds[True], seconds[False], strict=True)],
        "process_cpu_with_ms": 1e3 * statistics.median(cpu[True]), "process_cpu_without_ms": 1e3 * statistics.median(cpu[False]),
        "send_in_place_ms": 1e3 * statistics.median(gate.send_s), "recv_in_place_ms": 1e3 * statistics.median(gate.recv_s),
    }  # fmt: skip


def measure(job: Job, record: Record, config: Config) -> None:
    """One number of lanes."""
    before = len(os.listdir("/proc/self/task"))
    trainer = filled(config, job.spec)
    roots, emulators = most_roots(config), trainer.state.emulators
    for _ in range(3):
        once(trainer, "train", roots)
    turn = alone(emulators, job.pick(200, 50)) | {"threads_more": len(os.listdir("/proc/self/task")) - before}
    gate = Gate(emulators)
    found = pairs(trainer, gate, roots, job.pick(40, 15), job.left)
    hidden, low, high = hidden_shares(found["differences_ms"], turn["ms_median"])
    end(trainer)
    record.keep(f"lanes_{config.lanes}", {
        "turn": turn, "iterations": found, "roots": roots, "hidden_share": hidden, "hidden_share_quartiles": [low, high],
    })  # fmt: skip
    record.say(
        f"{config.lanes} lanes: a turn takes {turn['ms_median']:.3f} ms (p95 {turn['ms_p95']:.3f}), {turn['steps_a_second']:.0f} steps/s",
        f"  of that on cores: {turn['threads_cpu_ms']:.3f} ms in the emulators' threads, {turn['caller_cpu_ms']:.3f} in the caller's",
        f"  training, R {roots}: {found['with_ms']:.3f} ms with a turn, {found['without_ms']:.3f} without it",
        f"  {verdict(hidden, low, high)}",
    )
    if job.cuda:
        record.say(f"  in its place in the graph a turn takes {found['send_in_place_ms'] + found['recv_in_place_ms']:.3f} ms")


def run(job: Job, record: Record) -> None:
    measure(job, record, job.config)
    if not job.cuda or job.config.lanes == MANY:
        return
    forget()
    config = dataclasses.replace(job.config, lanes=MANY)
    try:
        check(config)
    except ConfigError as error:
        record.say(f"{MANY} lanes: not measured, these settings do not go with as many ({error})")
        return
    if job.left() < 10:
        record.say(f"{MANY} lanes: not measured, out of time")
        return
    measure(job, record, config)
