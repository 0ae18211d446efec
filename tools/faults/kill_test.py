"""Kill a run at many moments and resume it each time, as a bad machine and a scheduler would. Does it end as if nobody had?

    python -m tools.faults.kill_test --kills 50 --seed 0
    python -m tools.faults.kill_test --kills 20 --signal SIGTERM

Trains once untouched, and once more with kills at moments drawn from --seed (kill_schedule.py). After each kill the files are checked from
outside (invariants.py), and the run goes on with --resume, or from the start if there is no config.json yet. In the end both must be the
same, tensor by tensor and row by row. Other signals than SIGKILL must be answered in time and lose nothing. Takes the flags of
`python -m speedyzero`. Prints a line for each kill and a table; exits with 1 and a line for each fault, and then keeps both runs.
"""

import contextlib
import json
import logging
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, time
from typing import Literal

import tyro

from tools.faults.invariants import Files, Life, compare, end, follow, inspect
from tools.faults.kill_schedule import Moment, Pace, Watch, clock, draw, wait
from tools.faults.run import Run, given, rows_of, with_defaults

DEFAULTS = {"env": "Catch-v0", "preset": "cpu", "checkpoint-interval": 25, "log-interval": 5}
"""Flags of the run unless others are given."""
GONE_S = 120.0
"""Seconds after a signal in which a process must have saved and ended."""


@dataclass
class Arguments:
    """Kill a run at many moments and resume it. Takes the flags of `python -m speedyzero` as well."""

    kills: int = 50
    """How often."""
    seed: int = 0
    """Of the run and of the moments."""
    signal: Literal["SIGKILL", "SIGTERM", "SIGUSR1", "SIGINT"] = "SIGKILL"
    """What it is killed with."""
    alternate_ring: bool = False
    """Keep the frames of the ring in every second life only; in the others they come from replaying the emulators."""


@dataclass
class Kill:
    """One life of the run, and its end."""

    moment: Moment | None
    code: int
    came: bool
    """Whether the moment came before the run ended by itself."""
    life: Life
    saved: int
    """Iteration of the newest checkpoint after it."""
    lost: int
    """Iterations that were logged and not saved."""
    hit: str
    """The file that was being written, if any."""
    said_s: float
    """From the signal to the last line, when all is saved; 0 if there was none."""
    exit_s: float
    """From the signal to the end."""

    def __str__(self) -> str:
        came = f"exit code {self.code}" if self.came else f"ended before ({self.code})"
        at = "-" if self.life.resumed_at is None else self.life.resumed_at
        line = f"{self.moment!s:22s} {came:18s} from {at:>6} saved {self.saved:6d} lost {self.lost:3d}"
        return line + (f"  while writing {self.hit}" if self.hit else "")


class Hunt:
    """A run that is killed and resumed, in `folder`/killed, and its faults in `broken`. `interval`: between its checkpoints."""

    def __init__(self, arguments: Arguments, flags: list[str], folder: Path, pace: Pace, interval: int):
        self.arguments, self.interval = arguments, interval
        self.run_dir, self._output = folder / "killed", folder / "killed.txt"
        self.run_dir.mkdir()
        self._flags = [*flags, "--run-dir", str(self.run_dir)]
        self._limit = 60 + 10 * (pace.start_s + pace.iterations * pace.iteration_s + pace.evaluation_s)
        self.files = Files()
        self.lives = 0
        self.kills: list[Kill] = []
        self.broken: list[str] = []

    def live(self, moment: Moment | None) -> Kill:
        """One life: start or resume the run, kill it at the moment or let it end, and check the files and the output."""
        number, before = signal.Signals[self.arguments.signal], self.files
        flags = [*self._flags, *(["--resume"] if (self.run_dir / "config.json").exists() else [])]
        if self.arguments.alternate_ring:
            flags.append("--no-checkpoint-ring" if self.lives % 2 else "--checkpoint-ring")
        self.lives += 1
        with contextlib.closing(Watch(self.run_dir)) as watch:
            run = Run(flags, self._output)
            try:
                came = moment is not None and wait(run, watch, moment, before.newest, 2 * self.interval, self._limit)
                sent, now = monotonic(), time()
                if came:
                    run.process.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    run.process.wait(GONE_S if came else self._limit)
                exit_s, stayed = monotonic() - sent, run.process.poll() is None
            finally:
                run.end()
        code, after = run.process.returncode, inspect(self.run_dir)
        life, self.files = follow(before, after, run.said(), self.interval), after
        broken = after.broken + life.broken
        if stayed:
            broken.append(f"did not end in time: {life.last_line}")
        elif not (came and code == -signal.SIGKILL):
            broken += end(number, code, life, after)
        if moment is None and (code != 0 or after.leftovers):
            broken.append(f"exit code {code}, left {after.leftovers}: {life.last_line}")
        if life.replayed and not self.arguments.alternate_ring and "--no-checkpoint-ring" not in flags:
            broken.append("the frames of the ring were not there and had to be replayed")
        self.broken += [f"life {self.lives} ({moment}): {line}" for line in broken]
        return Kill(
            moment, code, came, life, after.newest, max(0, after.last_row - after.newest) if life.begun else 0,
            hit=next((name for name in after.leftovers if name not in before.leftovers), ""),
            said_s=max(0.0, self._output.stat().st_mtime - now) if came else 0.0, exit_s=exit_s,
        )  # fmt: skip

    def kill(self, moment: Moment) -> bool:
        """One life that is to be killed; whether it was."""
        self.kills.append(self.live(moment))
        print(f"{len(self.kills):4d}  {self.kills[-1]}", flush=True)
        return self.kills[-1].came

    def figures(self) -> dict[str, object]:
        """Totals of all kills that came."""
        kills = [kill for kill in self.kills if kill.came]
        lost = [kill.lost for kill in kills] or [0]
        return {
            "signal": self.arguments.signal, "kills": len(kills), "kinds": dict(Counter(kill.moment.kind for kill in kills)),
            "in a write": dict(Counter(Path(kill.hit).name.partition("_")[0].removesuffix(".tmp") for kill in kills if kill.hit)),
            "before the run went on": sum(not kill.life.begun for kill in kills),
            "frames replayed": sum(kill.life.replayed for kill in kills), "checkpoints every": self.interval,
            "iterations lost, most": max(lost), "iterations lost, mean": round(sum(lost) / len(lost), 2),
            "seconds to the last line, most": round(max((kill.said_s for kill in kills), default=0.0), 3),
            "seconds to the end, most": round(max((kill.exit_s for kill in kills), default=0.0), 3), "processes": self.lives,
        }  # fmt: skip


def control(flags: list[str], run_dir: Path) -> tuple[Pace, int]:
    """Train once, untouched: the pace of it, and its checkpoint interval. Leaves with the run's own line if it fails."""
    begin, run = time(), Run([*flags, "--run-dir", str(run_dir)], run_dir.with_suffix(".txt"))
    try:
        code = run.process.wait()
    finally:
        run.end()
    if code != 0:
        sys.exit(f"error: the run failed untouched: {run.last_line()}")
    config, summary = (json.loads((run_dir / f"{name}.json").read_bytes()) for name in ("config", "summary"))
    rows, _ = rows_of((run_dir / "metrics.jsonl").read_bytes())
    iterations, trained_s = summary["iterations"], rows[-1]["wall_s"]
    start_s = (run_dir / "config.json").stat().st_mtime - begin
    return Pace(iterations, start_s, trained_s / iterations, summary["wall_s"] - trained_s), config["checkpoint_interval"]


def main() -> None:
    arguments, rest = tyro.cli(Arguments, prog="kill_test", return_unknown_args=True)
    if arguments.kills < 1:
        sys.exit(f"error: --kills {arguments.kills}: must be at least 1")
    if given(rest, "resume") or given(rest, "run-dir") or (arguments.alternate_ring and given(rest, "checkpoint-ring")):
        sys.exit("error: --resume, --run-dir, --checkpoint-ring: decided here for each life; leave them out")
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it reports every resume
    # A job in the background ignores Ctrl-C, and its children would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder, moments = Path(tempfile.mkdtemp(prefix="kill_test_")), random.Random(arguments.seed)
    flags = with_defaults([f"--seed={arguments.seed}", *rest], DEFAULTS)
    pace, interval = control(flags, folder / "control")
    print(f"untouched: {pace.start_s:.1f} s to start, {pace.iterations} iterations of {pace.iteration_s * 1e3:.0f} ms", flush=True)
    hunt = Hunt(arguments, flags, folder, pace, interval)
    for moment in draw(moments, arguments.kills, pace, interval):
        if not hunt.kill(moment):  # the run ended before it: take any time
            hunt.kill(clock(moments, pace, 0))
    hunt.live(None)
    broken = hunt.broken
    if hunt.files.complete:
        # A run that is asked to stop saves, and may then find best games between two checkpoints of the other run.
        kept = "--no-checkpoint-ring" not in rest and not arguments.alternate_ring
        broken += compare(folder / "control", hunt.run_dir, frames=kept, metas=arguments.signal == "SIGKILL")
        print(f"score: {json.loads((hunt.run_dir / 'eval.json').read_bytes())['mean']:.2f}")
    else:
        broken.append("the run did not come to its end: there is no summary.json")
    print("\n".join(f"{name}: {value}" for name, value in hunt.figures().items()))
    if broken:
        print("\n".join(f"broken: {text}" for text in broken))
        sys.exit(f"{len(broken)} faults; the runs are in {folder}")
    print("every promise kept: the run is the same as one that was never killed")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
