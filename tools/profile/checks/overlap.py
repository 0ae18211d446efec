"""Whether the device works on while the emulators take their turn on the host, and what of the turn shows.

First a probe, on CUDA: graphs of kernels that take KERNELS_S, beside a host function that sleeps SLEEP_S. `on` is the trainer's form, one
graph with the host function as a node on a side branch; `split` replays two graphs back to back, and the main thread waits for the first,
then sleeps while the second runs. Users report that such a node blocks the kernels of other streams on Hopper (NVIDIA/nccl issue 1742).

Then the trainer, in every form that it has: iterations of training in pairs, one with the emulators' turn and one whose `send` and `recv`
return at once (they are called by name at every replay, so nothing is captured again), in changing order. In both,

    hidden share = 1 - (with - without) / turn alone

1: all of it is hidden; 0: none. Of the pairs it is given by the median and the quartiles, unless these say that noise is larger.
"""

import dataclasses
import statistics
import typing
from collections.abc import Callable
from time import perf_counter, sleep
from types import SimpleNamespace

import numpy as np
import torch

from speedyzero.config import Config
from speedyzero.envs import Emulators
from speedyzero.graph import StreamTurn
from speedyzero.loop import Trainer
from tools.profile.checks.job import Job, Record
from tools.profile.checks.trainers import end, filled, forget, most_roots, once

SLEEP_S, KERNELS_S, MATRIX = 5e-3, 10e-3, 4096


def hidden_shares(differences: list[float], turn: float) -> tuple[float, float, float]:
    """Of a turn, what costs nothing: by the median of what pairs differ by, and by the quartiles, the lower share first."""
    low, middle, high = statistics.quantiles(differences, n=4, method="inclusive")
    return 1 - middle / turn, 1 - high / turn, 1 - low / turn


def verdict(hidden: float, low: float, high: float) -> str:
    """The hidden share in words. A share far from 0 to 1, or pairs that differ by more than a turn, are noise: they say nothing of it."""
    if high - low > 1 or not -0.25 <= hidden <= 1.25:
        return "how much of the turn is hidden is lost in the noise: iterations differ by more than a turn takes"
    return f"{100 * hidden:.0f} % of the turn is hidden, {100 * low:.0f} to {100 * high:.0f} % by the quartiles of the pairs"


def median_seconds(function: Callable[[], None], times: int = 11) -> float:
    """Median seconds of a call, the device waited for, after one that does not count."""
    spent = []
    for _ in range(times + 1):
        torch.cuda.synchronize()
        begin = perf_counter()
        function()
        torch.cuda.synchronize()
        spent.append(perf_counter() - begin)
    return statistics.median(spent[1:])


def graph_of(function: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A graph of what `function` launches; it has run once before."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        function()
    return graph


def probe(device: torch.device) -> dict[str, float]:
    """Seconds of the kernels alone and with a sleeping host in either form."""
    a, out = torch.randn(MATRIX, MATRIX, device=device).bfloat16(), torch.empty(MATRIX, MATRIX, device=device, dtype=torch.bfloat16)
    one = median_seconds(lambda: torch.mm(a, a, out=out))
    turn = StreamTurn(SimpleNamespace(send=lambda: sleep(SLEEP_S), recv=lambda: None), device)

    def kernels() -> None:
        for _ in range(max(1, round(KERNELS_S / one))):
            torch.mm(a, a, out=out)

    def forked() -> None:
        turn.begin()
        kernels()
        turn.end()

    first, second, whole = graph_of(lambda: torch.mm(a, a, out=out)), graph_of(kernels), graph_of(forked)

    def split(host: Callable[[], None]) -> None:
        first.replay()
        done = torch.cuda.Event()
        done.record()
        second.replay()
        done.synchronize()
        host()

    return {
        "alone": median_seconds(second.replay), "on": median_seconds(whole.replay),
        "split_alone": median_seconds(lambda: split(lambda: None)), "split": median_seconds(lambda: split(lambda: sleep(SLEEP_S))),
    }  # fmt: skip


def tell_probe(record: Record, found: dict[str, float]) -> None:
    """Note what the probe found."""
    record.keep("probe", found)
    for form, alone in (("on", "alone"), ("split", "split_alone")):
        more = found[form] - found[alone]
        does = "overlaps" if more < 0.2 * SLEEP_S else "overlaps in part" if more < 0.8 * SLEEP_S else "DOES NOT overlap"
        record.say(f"--graph {form}: a host that sleeps {1e3 * SLEEP_S:g} ms {does} {1e3 * found[alone]:.2f} ms of kernels: "
                   f"{1e3 * found[form]:.2f} ms together")


class Gate:
    """Stands before the emulators' `send` and `recv`, and lets them through or not."""

    def __init__(self, emulators: Emulators):
        self.open = True
        self._send, self._recv = emulators.send, emulators.recv
        emulators.send, emulators.recv = self.send, self.recv

    def send(self) -> None:
        if self.open:
            self._send()

    def recv(self) -> None:
        if self.open:
            self._recv()


def turn_alone(emulators: Emulators, turns: int) -> float:
    """Median seconds of a turn with random actions and nothing else going on."""
    spent = []
    for row in np.random.default_rng(0).integers(emulators.spec.num_actions, size=(turns, emulators.lanes)):
        emulators.actions.numpy()[:] = row
        begin = perf_counter()
        emulators.send()
        emulators.recv()
        spent.append(perf_counter() - begin)
    emulators.drain_finished()
    return statistics.median(spent)


def pairs(trainer: Trainer, gate: Gate, roots: int, most: int, left: Callable[[], float]) -> dict[bool, list[float]]:
    """Seconds of iterations with and without the turn: at least three pairs, and at most `most` while `left()` is not 0."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    while len(seconds[True]) < 3 or (len(seconds[True]) < most and left() > 0):
        for gate.open in (True, False) if len(seconds[True]) % 2 else (False, True):
            seconds[gate.open].append(once(trainer, "train", roots))
    gate.open = True
    return seconds


def run(job: Job, record: Record) -> None:
    if job.cuda:
        tell_probe(record, probe(job.device))
    known = typing.get_args(typing.get_type_hints(Config)["graph"])
    for form in [form for form in ("on", "split") if form in known] if job.cuda else ["off"]:
        trainer, roots = filled(dataclasses.replace(job.config, graph=form), job.spec), most_roots(job.config)
        for _ in range(3):
            once(trainer, "train", roots)
        turn = turn_alone(trainer.state.emulators, job.pick(200, 50))
        found = pairs(trainer, Gate(trainer.state.emulators), roots, job.pick(40, 15), job.left)
        shares = hidden_shares([a - b for a, b in zip(found[True], found[False], strict=True)], turn)
        end(trainer)
        del trainer
        forget()
        with_ms, without_ms = (1e3 * statistics.median(found[is_open]) for is_open in (True, False))
        record.keep(form, {
            "turn_ms": 1e3 * turn, "pairs": len(found[True]), "with_ms": with_ms, "without_ms": without_ms, "hidden_share": shares[0],
            "hidden_share_quartiles": shares[1:], "roots": roots,
        })  # fmt: skip
        record.say(f"--graph {form}, {job.config.lanes} lanes, R {roots}: a turn alone takes {1e3 * turn:.3f} ms; training takes "
                   f"{with_ms:.3f} ms with a turn and {without_ms:.3f} without; {verdict(*shares)}")
