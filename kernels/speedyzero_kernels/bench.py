"""Times the trees of whole searches: our forms, and with --peers other libraries' beside them, where they are installed.

    python -m speedyzero_kernels.bench            # ours alone
    python -m speedyzero_kernels.bench --peers    # beside LightZero's C++ and mctx; taskset -c 0 gives each of them one core

All of them search one world, a table of random rewards, values and policies, by the same number of simulations, without noise. A
search is first done with the world, and what that answered is kept; timed is a second search that is given those answers: memory,
roots, selection, backup, the visits. Where a library compiles the model into its search (mctx), all of that is timed, and a line says so.
"""

import argparse
import itertools
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter, process_time
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from . import backup, peers, root, select, tree

LEAST_ROUNDS = 5


@dataclass(frozen=True)
class Job:
    """A search to be timed: of `roots` roots in a world of `actions` actions."""

    kind: Literal["puct", "gumbel"]
    simulations: int
    roots: int
    actions: int
    discount: float = 0.997**4

    @property
    def considered(self) -> int:
        """Actions of the root that Gumbel search begins with."""
        return min(16, self.actions)


class World:
    """A model that costs little: `N` states, each with a row of a table. The same for every run of the bench.

    Attributes:
      following: `[N, A]` int64, the next state. reward, logits: `[N, A]` float32. value: `[N]` float32.
    """

    STATES = 4096

    def __init__(self, actions: int):
        draw = np.random.default_rng(0)
        self.following = draw.integers(self.STATES, size=(self.STATES, actions))
        self.reward, self.logits = draw.normal(size=(2, self.STATES, actions)).astype(np.float32)
        self.value = draw.normal(size=self.STATES).astype(np.float32)

    def starts(self, roots: int) -> np.ndarray:
        """The states of the roots, `[B]` int64."""
        return np.arange(roots) % self.STATES


Searcher = Callable[[], np.ndarray | list]
"""Does one search and returns the visits of the root's actions, `[B, A]`, on the host."""


def our_search(job: Job, world: World, device: str, layout: Literal["kernel", "reference"] | None, captured: bool = False) -> Searcher:
    """A search on our trees of a layout; on CUDA each operation launched, or all of it as one captured graph."""
    tables = world.following, world.reward, world.logits, world.value
    following, reward, logits, value = (torch.from_numpy(table).to(device) for table in tables)
    start, everyone = torch.from_numpy(world.starts(job.roots)).to(device), torch.arange(job.roots, device=device)
    root_logits, root_value = logits[start], value[start]
    due = root.considered_visits(job.considered, job.simulations)

    def search(step: Callable[[int, tree.Selection], tuple[Tensor, ...]]) -> Tensor:
        sizes = {"roots": job.roots, "actions": job.actions, "simulations": job.simulations}
        trees = tree.allocate(**sizes, discount=job.discount, lstm_horizon=1, device=device, layout=layout)
        tree.plant(trees, root.root_prior(root_logits), root_logits, root_value)
        for i in range(job.simulations):
            leaf = select.select_puct(trees, i) if job.kind == "puct" else select.select_gumbel(trees, i, due[i])
            backup.expand_and_backup(trees, i, leaf, *step(i, leaf))
        return trees.child_visits[:, 0]

    states, answers = [start], []

    def ask(_: int, leaf: tree.Selection) -> tuple[Tensor, ...]:
        before = torch.stack(states)[leaf.parent, everyone]
        states.append(following[before, leaf.action])
        answers.append((reward[before, leaf.action], logits[states[-1]], value[states[-1]]))
        return answers[-1]

    search(ask)

    def again() -> Tensor:
        return search(lambda i, _: answers[i])

    run = _captured(again) if captured else again
    return lambda: run().cpu().numpy()


def _captured(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`function` as a CUDA graph; every replay writes the one result."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()  # compiles, which may not happen in a capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()

    def replay(_reads: object = function) -> Tensor:  # the tensors that a graph reads must outlive it
        graph.replay()
        return result

    return replay


Makers = dict[str, Callable[[Job, World], Searcher]]
"""The contenders by name, the one that others are compared with first."""


def ours(device: str) -> Makers:
    """Our forms on a device."""
    if device == "cpu":
        forms: dict[str, tuple] = {"numba": (None,), "PyTorch": ("reference",)}
    else:
        forms = {"Triton, captured": ("kernel", True), "Triton": ("kernel",), "PyTorch": ("reference",)}
    return {name: lambda job, world, form=form: our_search(job, world, device, *form) for name, form in forms.items()}


def milliseconds(searchers: list[Searcher], seconds: float) -> list[float]:
    """Median of each over rounds in which they take turns, for about so many seconds in all.

    On one core it is the time that this process was given, whatever else runs there; on several, where threads wait for each other, and
    on CUDA, it is the clock's.
    """
    clock = process_time if not torch.cuda.is_initialized() and len(os.sched_getaffinity(0)) == 1 else perf_counter
    times: list[list[float]] = [[] for _ in searchers]
    end = perf_counter() + seconds
    while len(times[0]) < LEAST_ROUNDS or perf_counter() < end:
        for searcher, mine in zip(searchers, times, strict=True):
            begin = clock()
            searcher()
            mine.append(1e3 * (clock() - begin))
    return [statistics.median(mine) for mine in times]


def same_visits(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The share of simulations that went through the same action of their root."""
    return 1.0 - np.abs(ours - theirs).sum() / (2.0 * ours.sum())


def rows(makers: Makers, jobs: list[Job], seconds: float) -> Iterator[tuple[Job, list[float], list[float]]]:
    """For each job, milliseconds of each contender, and its share of simulations that went where the first one's did."""
    for job in jobs:
        world = World(job.actions)
        searchers = [make(job, world) for make in makers.values()]
        visits = [np.array(searcher(), dtype=np.int64) for searcher in searchers]
        yield job, milliseconds(searchers, seconds), [same_visits(visits[0], theirs) for theirs in visits]


def report(makers: Makers, jobs: list[Job], seconds: float) -> None:
    """Print a line a job as it is measured, and how far the contenders searched alike."""
    widths = [max(17, len(name)) for name in makers]
    print(f"{'search':8s}{'simulations':>12s}{'roots':>7s}  " + "  ".join(f"{name:>{w}s}" for name, w in zip(makers, widths, strict=True)))
    alike: dict[str, list[list[float]]] = {}
    for job, times, shares in rows(makers, jobs, seconds):
        cells = [f"{times[0]:.3g}"] + [f"{mine:.3g} ({mine / times[0]:.2f}x)" for mine in times[1:]]
        line = f"{job.kind:8s}{job.simulations:12d}{job.roots:7d}  "
        print(line + "  ".join(f"{cell:>{w}s}" for cell, w in zip(cells, widths, strict=True)), flush=True)
        alike.setdefault(job.kind, []).append(shares)
    for kind, shares in alike.items():
        means = ", ".join(f"{name} {100 * share:.1f} %" for name, share in list(zip(makers, np.mean(shares, 0), strict=True))[1:])
        print(f"{kind}: simulations that took the same action of the root as {next(iter(makers))}'s: {means}")


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: must be at least 1")
    return number


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m speedyzero_kernels.bench", description="Time the trees of whole searches.")
    parser.add_argument("--peers", action="store_true", help="also LightZero's trees and mctx, where they are installed")
    parser.add_argument("--search", nargs="+", choices=("puct", "gumbel"), default=["puct", "gumbel"])
    parser.add_argument("--roots", nargs="+", type=_at_least_one, metavar="N", default=[1, 16, 64, 256, 1024])
    parser.add_argument("--simulations", nargs="+", type=_at_least_one, metavar="N", default=[16, 50])
    parser.add_argument("--actions", type=_at_least_one, metavar="N", default=6)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of our trees and of PyTorch")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for a line of the table")
    given = parser.parse_args(arguments)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if given.device == "auto" else given.device
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda: PyTorch finds no CUDA device")
    makers, notes = ours(device), []
    for peer in peers.PEERS if given.peers else ():
        try:
            library = peer()
        except ImportError as error:
            notes.append(f"{peer.NAME}: not installed ({error}); {peer.INSTALL}")
        else:
            makers[library.title] = library.searcher
            notes.append(f"{library.title}: {peer.TIMED}")
    cores = f"{len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads of PyTorch"
    where = torch.cuda.get_device_name() if device == "cuda" else cores
    print(f"{device} ({where}), {given.actions} actions; milliseconds a search, and how many times those of {next(iter(makers))}")
    print("\n".join(notes), end="\n" if notes else "")
    jobs = [Job(*sizes, given.actions) for sizes in itertools.product(given.search, given.simulations, given.roots)]
    try:
        report(makers, jobs, given.seconds)
    except ValueError as error:  # begins with the name of what the trees cannot be made with
        sys.exit(f"error: --{error}")


if __name__ == "__main__":
    main()
