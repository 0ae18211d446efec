"""Whether the device works on while the emulators take their turn on the host, and what each form of capture takes of it.

First a probe, on CUDA: graphs of kernels that take KERNELS_S, beside a host function that sleeps SLEEP_S. `on` is the trainer's form, one
graph with the host function as a node on a side branch; `split` replays two graphs back to back, and the main thread waits for the first,
then sleeps while the second runs. Users report that such a node blocks the kernels of other streams on Hopper (NVIDIA/nccl issue 1742).

Then the trainer, in every form that it has: iterations of training as they are, and with a turn whose `send` and `recv` return at once
(they are called by name at every replay, so nothing is captured again). What these differ by is what shows of a turn.
"""

import dataclasses
import statistics
import typing
from collections.abc import Callable
from time import perf_counter, sleep
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

from speedyzero.config import Config
from speedyzero.emulators import Emulators
from speedyzero.graph import StreamTurn
from tools.profile.checks.job import Job, Record
from tools.profile.checks.trainers import end, filled, forget, most_roots, once

SLEEP_S, KERNELS_S, MATRIX = 5e-3, 10e-3, 4096


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


def run(job: Job, record: Record) -> None:
    if job.cuda:
        tell_probe(record, probe(job.device))
    known, times = typing.get_args(typing.get_type_hints(Config)["graph"]), job.pick(40, 10)
    for form in [form for form in ("on", "split") if form in known] if job.cuda else ["off"]:
        trainer, roots = filled(dataclasses.replace(job.config, graph=form), job.spec), most_roots(job.config)
        for _ in range(3):
            once(trainer, "train", roots)
        emulators = trainer.state.emulators
        turn = turn_alone(emulators, job.pick(200, 50))
        taken = statistics.median(once(trainer, "train", roots) for _ in range(times))
        with mock.patch.multiple(emulators, send=lambda: None, recv=lambda: None):
            without = statistics.median(once(trainer, "train", roots) for _ in range(times))
        end(trainer)
        del trainer, emulators
        forget()
        record.keep(form, {"turn_ms": 1e3 * turn, "with_ms": 1e3 * taken, "without_ms": 1e3 * without, "roots": roots})
        record.say(f"--graph {form}, {job.config.lanes} lanes, R {roots}: an iteration takes {1e3 * taken:.3f} ms, {1e3 * without:.3f} "
                   f"without the emulators' turn, which alone takes {1e3 * turn:.3f} ms")
