"""Spoils checkpoints, frames and configs in every way we know of, and sees that each is refused in one line and none ends the process.

    python tools/faults/mutate.py --cases 1000 --seed 0 --json report.json

Two small runs of Catch are made and stopped; each case spoils one of their files, by damage to its bytes, by contents that no run has
saved under checksums that are good, or by putting something in its place that is no file. Then the run is resumed and evaluated. A
refusal must be one printable line of an error that the program catches; where nothing is refused, an iteration and what is saved after it
must end well. Cases run in processes of --batch each: one that dies, hangs or takes much memory is named. Exit code 1 if a case failed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

HERE = Path(__file__).resolve().parent
OUTCOMES = ("refused", "accepted", "same", "failed")


@dataclass
class Arguments:
    """Spoil files of a run and see what becomes of those who read them."""

    cases: int = 1000
    """Files to spoil."""
    seed: int = 0
    """Of all that is drawn: a case of a number and a seed is always the same."""
    only: str = ""
    """Run only the cases whose kind has this in its name, as `frames` or `contents: another dtype`."""
    batch: int = 50
    """Cases of a process."""
    json: Path | None = None
    """Also write every case to this file."""
    verbose: Annotated[bool, tyro.conf.arg(aliases=["-v"])] = False
    """Also print every case with the line of its refusal."""


def _environment() -> dict[str, str]:
    """For a worker: the package is found from a checkout too."""
    places = [str(HERE), str(HERE.parents[1]), str(HERE.parents[1] / "kernels"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places)), "OMP_NUM_THREADS": "1"}


def _ended(code: int, stderr: str) -> str:
    """How a worker died."""
    if code == -signal.SIGALRM:
        return "hung: the process was ended"
    lines = stderr.strip().splitlines()
    if code < 0:
        return f"ended the process by {signal.Signals(-code).name}" + (f": {lines[-1]}" if lines else "")
    return f"ended the process with exit code {code}" + (f": {lines[-1]}" if lines else "")


def prepare(runs: Path) -> None:
    """Make the good runs, in a process of its own. Raises RuntimeError if that fails."""
    command = [sys.executable, "-m", "badfiles.run", str(runs)]
    took = subprocess.run(command, env=_environment(), capture_output=True, text=True, errors="replace", check=False)
    if took.returncode:
        raise RuntimeError(f"the good runs could not be made: a process {_ended(took.returncode, took.stderr)}")


def run_cases(
    runs: Path, cases: int, seed: int = 0, only: str = "", batch: int = 50, worker: str = "badfiles.worker"
) -> list[dict[str, Any]]:
    """Run the cases in processes of `batch` each: number, kind, outcome, reason, note and MiB of every one.

    runs: the folder of the good runs. worker: the module that the processes run, called as `badfiles.worker` is.

    Raises:
        RuntimeError: a process ended outside of a case.
    """
    done: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.jsonl"
        while True:
            report.write_text("")
            took = subprocess.run(
                [sys.executable, "-m", worker, str(runs), str(report), "--cases", str(cases), "--seed", str(seed), "--only", only,
                 "--skip", str(len(done)), "--take", str(batch)],
                env=_environment(), capture_output=True, text=True, errors="replace", check=False,
            )  # fmt: skip
            lines = [json.loads(line) for line in report.read_text().splitlines()]
            new = [line for line in lines if "outcome" in line]
            if lines and "outcome" not in lines[-1]:
                new.append(lines[-1] | {"outcome": "failed", "why": _ended(took.returncode, took.stderr), "note": "", "mib": 0})
            elif took.returncode:
                raise RuntimeError(f"outside of a case, a process {_ended(took.returncode, took.stderr)}")
            done += new
            if len(new) < batch and (not new or took.returncode == 0):
                return done


def table(done: list[dict[str, Any]]) -> str:
    """Cases by kind and outcome."""
    counts = {kind: Counter(case["outcome"] for case in done if case["kind"] == kind) for kind in sorted({case["kind"] for case in done})}
    width = max([len(kind) for kind in counts], default=0)
    head = ("tried", "refused", "accepted", "equivalent", "failed")
    rows = [f"{'':{width}s}  " + "  ".join(f"{name:>10s}" for name in head)]
    for kind, count in [*counts.items(), ("all", Counter(case["outcome"] for case in done))]:
        rows.append(f"{kind:{width}s}  " + "  ".join(f"{number:10d}" for number in (count.total(), *(count[name] for name in OUTCOMES))))
    return "\n".join(rows)


def main() -> None:
    arguments = tyro.cli(Arguments, prog="mutate.py")
    if arguments.cases < 1 or arguments.batch < 1:
        sys.exit("error: --cases and --batch: must be greater than 0")
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        done = run_cases(Path(folder), arguments.cases, arguments.seed, arguments.only, arguments.batch)
    if not done:
        sys.exit(f"error: --only {arguments.only}: no kind among the {arguments.cases} cases has that in its name")
    if arguments.json:
        arguments.json.write_text(json.dumps({"seed": arguments.seed, "cases": done}, indent=1))
    for case in done:
        if arguments.verbose or case["outcome"] == "failed":
            print(f"{case['case']:5d} {case['outcome']:8s} {case['kind']}: {ascii(case['note'])[1:-1][:100]}\n      {case['why']}")
    print(table(done))
    print(f"most memory that a case took: {max(case['mib'] for case in done)} MiB")
    failed = sum(case["outcome"] == "failed" for case in done)
    if failed:
        sys.exit(f"error: {failed} of {len(done)} cases failed; run one kind by --only KIND --seed {arguments.seed} -v")


if __name__ == "__main__":
    main()
