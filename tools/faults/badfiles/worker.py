"""A process that spoils files and reads them, so that its death is no more than a line of the table. Run by `tools/faults/mutate.py`."""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import torch

from . import contents, damage, header, pieces, settings, special
from .run import Kind, Run
from .victim import meet

KINDS: list[Kind] = [*damage.KINDS, *contents.KINDS, *header.KINDS, *pieces.KINDS, *settings.KINDS, *special.KINDS]
MOST_GROWTH = 300 << 20
"""Bytes by which a case may raise the memory in use: the files have a thousandth of that, and the longest header unfolds to 240 MiB."""
MOST_ADDRESSES = 8 << 30
"""Bytes of addresses beyond those of a process that has started: what would take the machine down ends in an error instead."""
LIMIT = 60
"""Seconds of a case, after which the process ends."""


def plan(cases: int, seed: int, only: str = "") -> list[tuple[int, Kind]]:
    """Number and kind of every case: all kinds in turn, as often as their weights say, shuffled so that they meet each other's traces.

    only: a part of the names of the kinds wanted; the cases keep the numbers, and so the contents, that they have among all.
    """
    deck = [kind for kind in KINDS for _ in range(kind.weight)]
    order = Random(f"{seed} order")
    chosen: list[Kind] = []
    while len(chosen) < cases:
        order.shuffle(deck)
        chosen += deck
    return [(number, kind) for number, kind in enumerate(chosen[:cases]) if only in f"{kind.target} {kind.name}"]


def _memory(name: str) -> int:
    """Bytes of a line of /proc/self/status: VmSize, VmRSS, VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def one(run: Run, seed: int, number: int, kind: Kind) -> dict[str, Any]:
    """Spoil a file, see what becomes of it, and mend it."""
    case = kind.make(Random(f"{seed} {number} {kind.target} {kind.name}"), run)
    run.put(kind.target, case)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _memory("VmRSS")
    signal.alarm(LIMIT)
    outcome = meet(run, kind.target, case)
    signal.alarm(0)
    growth = max(0, _memory("VmHWM") - before)
    run.put(kind.target, None)
    what, why = outcome.what, outcome.why
    if growth > MOST_GROWTH and what != "failed":
        what, why = "failed", f"took {growth >> 20} MiB"
    return {"outcome": what, "why": why, "note": case.note, "mib": growth >> 20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, help="folder of the good runs")
    parser.add_argument("report", type=Path, help="file for a line of JSON before and after every case")
    parser.add_argument("--cases", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--only", default="")
    parser.add_argument("--skip", type=int, required=True, help="cases done by other processes")
    parser.add_argument("--take", type=int, required=True, help="cases for this one")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, open(arguments.report, "a", buffering=1) as report:
        runs = []
        for directory in sorted(arguments.runs.iterdir()):
            shutil.copytree(directory, Path(folder) / directory.name)
            runs.append(Run(Path(folder) / directory.name))
        for run in runs:  # what is loaded and allocated once is none of the cases' doing
            one(run, 0, 0, damage.KINDS[-1])
        most = _memory("VmSize") + MOST_ADDRESSES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        chosen = plan(arguments.cases, arguments.seed, arguments.only)
        for number, kind in chosen[arguments.skip : arguments.skip + arguments.take]:
            begun = {"case": number, "kind": f"{kind.target} {kind.name}"}
            report.write(json.dumps(begun) + "\n")
            report.write(json.dumps(begun | one(runs[number % len(runs)], arguments.seed, number, kind)) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
