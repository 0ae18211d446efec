"""Kill a run at many moments and resume it each time, as a bad machine and a scheduler would. Does it end as if nobody had?

    python -m tools.faults.kill_test --kills 50 --seed 0
    python -m tools.faults.kill_test --kills 20 --signal SIGTERM
    python -m tools.faults.kill_test --kills 20 --ranks 2

Trains once untouched, and once more with kills at moments drawn from --seed (kill_schedule.py). After each kill the files are checked from
outside (invariants.py), and the run goes on with --resume, or from the start if there is no config.json yet. In the end both must be the
same, tensor by tensor and row by row. Other signals than SIGKILL must be answered in time and lose nothing. With --ranks a rank or torchrun
is hit, with signals of all kinds; torchrun starts the ranks again itself, and no rank may outlive it. Takes the flags of
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

from tools.faults.invariants import Files, Life, compare, end, end_over_ranks, follow, inspect
from tools.faults.kill_schedule import Blow, Moment, Pace, Watch, blows, clock, draw, wait
from tools.faults.run import GONE_S, Run, given, rows_of, with_defaults

DEFAULTS = {"env": "Catch-v0", "preset": "cpu", "checkpoint-interval": 25, "log-interval": 5}
"""Flags of the run unless others are given."""


@dataclass
class Arguments:
    """Kill a run at many moments and resume it. Takes the flags of `python -m speedyzero` as well."""

    kills: int = 50
    """How often."""
    seed: int = 0
    """Of the run and of the moments."""
    signal: Literal["SIGKILL", "SIGTERM", "SIGUSR1", "SIGINT"] = "SIGKILL"
    """What it is killed with; over ranks this is drawn."""
    ranks: int = 1
    """How many processes share the work; with more than one torchrun starts them."""

    @property
    def torchrun(self) -> list[str]:
        """Its flags, if there are several ranks."""
        return ["--standalone", f"--nproc-per-node={self.ranks}", f"--max-restarts={self.kills}"] if self.ranks > 1 else []
    alternate_ring: bool = False
    """Keep the frames of the ring in every second life only; in the others they come from replaying the emulators."""


@dataclass
class Kill:
    """One life of the run, and its end."""

    moment: Moment | None
    blow: Blow | None
    code: int
    """-9 if a rank was killed and torchrun goes on."""
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
        line = f"{self.moment!s:22s} {self.blow!s:17s} {came:18s} from {at:>6} saved {self.saved:6d} lost {self.lost:3d}"
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
        self._run: Run | None = None
        """Goes on, as torchrun does when a rank was killed."""
        self.lives = 0
        self.kills: list[Kill] = []
        self.broken: list[str] = []

    def live(self, moment: Moment | None, blow: Blow | None) -> Kill:
        """One life: start or resume the run, kill it at the moment or let it end, and check the files and the output."""
        before, flags = self.files, [*self._flags, *(["--resume"] if (self.run_dir / "config.json").exists() else [])]
        if self.arguments.alternate_ring:
            flags.append("--no-checkpoint-ring" if self.lives % 2 else "--checkpoint-ring")
        self.lives += 1
        with contextlib.closing(Watch(self.run_dir)) as watch:
            if self._run:
                self._run.begin()
            run = self._run = self._run or Run(flags, self._output, self.arguments.torchrun)
            came = moment is not None and wait(run, watch, moment, before.newest, 2 * self.interval, self._limit)
            sent, now = monotonic(), time()
            came = came and run.strike(*blow, self._limit)
            hit_rank = came and blow.rank is not None
            if not hit_rank:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    run.process.wait(GONE_S if came else self._limit)
            outlived = run.wait_gone(GONE_S)
            exit_s, code = monotonic() - sent, run.process.poll()
        goes_on = hit_rank and code is None
        with run.frozen() if goes_on else contextlib.nullcontext():
            after, said = inspect(self.run_dir), run.said()
        if not goes_on:
            self.close()
        life, self.files = follow(before, after, said, self.interval), after
        broken = after.broken + life.broken
        if outlived or (code is None and not goes_on):
            broken.append(f"did not end in time{f', ranks {outlived}' if outlived else ''}: {life.last_line}")
        elif came and self.arguments.ranks > 1:
            broken += end_over_ranks(*blow, code, life, after)
        elif not (came and code == -signal.SIGKILL):
            broken += end(blow.signal if blow else signal.SIGKILL, code, life, after)
        if moment is None and (code != 0 or after.leftovers):
            broken.append(f"exit code {code}, left {after.leftovers}: {life.last_line}")
        if life.replayed and not self.arguments.alternate_ring and "--no-checkpoint-ring" not in flags:
            broken.append("the frames of the ring were not there and had to be replayed")
        self.broken += [f"life {self.lives} ({moment}, {blow}): {line}" for line in broken]
        return Kill(
            moment, blow, -signal.SIGKILL if code is None else code, came, life, after.newest,
            max(0, after.last_row - after.newest) if life.begun else 0,
            hit=next((name for name in after.leftovers if name not in before.leftovers), ""),
            said_s=max(0.0, self._output.stat().st_mtime - now) if came else 0.0, exit_s=exit_s,
        )  # fmt: skip

    def kill(self, moment: Moment, blow: Blow) -> bool:
        """One life that is to be killed; whether it was."""
        self.kills.append(self.live(moment, blow))
        print(f"{len(self.kills):4d}  {self.kills[-1]}", flush=True)
        return self.kills[-1].came

    def close(self) -> None:
        """End what still runs."""
        if self._run:
            self._run.end()
        self._run = None

    def figures(self) -> dict[str, object]:
        """Totals of all kills that came."""
        kills = [kill for kill in self.kills if kill.came]
        lost = [kill.lost for kill in kills] or [0]
        return {
            "signal": self.arguments.signal if self.arguments.ranks == 1 else "drawn",
            "blows": dict(Counter(str(kill.blow) for kill in kills)),
            "kills": len(kills), "kinds": dict(Counter(kill.moment.kind for kill in kills)),
            "in a write": dict(Counter(Path(kill.hit).name.partition("_")[0].removesuffix(".tmp") for kill in kills if kill.hit)),
            "before the run went on": sum(not kill.life.begun for kill in kills),
            "frames replayed": sum(kill.life.replayed for kill in kills), "checkpoints every": self.interval,
            "iterations lost, most": max(lost), "iterations lost, mean": round(sum(lost) / len(lost), 2),
            "seconds to the last line, most": round(max((kill.said_s for kill in kills), default=0.0), 3),
            "seconds to the end, most": round(max((kill.exit_s for kill in kills), default=0.0), 3), "lives": self.lives,
        }  # fmt: skip


def control(flags: list[str], run_dir: Path, torchrun: list[str]) -> tuple[Pace, int]:
    """Train once, untouched: the pace of it, and its checkpoint interval. Leaves with the run's own line if it fails."""
    begin, run = time(), Run([*flags, "--run-dir", str(run_dir)], run_dir.with_suffix(".txt"), torchrun)
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
    if arguments.ranks > 1 and (arguments.signal != "SIGKILL" or arguments.alternate_ring):
        sys.exit("error: --signal, --alternate-ring: not with --ranks, which draws signals of all kinds; leave them out")
    if given(rest, "resume") or given(rest, "run-dir") or (arguments.alternate_ring and given(rest, "checkpoint-ring")):
        sys.exit("error: --resume, --run-dir, --checkpoint-ring: decided here for each life; leave them out")
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it reports every resume
    # A job in the background ignores Ctrl-C, and its children would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder, moments = Path(tempfile.mkdtemp(prefix="kill_test_")), random.Random(arguments.seed)
    flags = with_defaults([f"--seed={arguments.seed}", *rest], DEFAULTS)
    pace, interval = control(flags, folder / "control", arguments.torchrun)
    print(f"untouched: {pace.start_s:.1f} s to start, {pace.iterations} iterations of {pace.iteration_s * 1e3:.0f} ms", flush=True)
    hunt = Hunt(arguments, flags, folder, pace, interval)
    with contextlib.closing(hunt):
        fatal = signal.Signals[arguments.signal]
        drawn = blows(moments, arguments.kills, arguments.ranks) if arguments.ranks > 1 else [Blow(fatal)] * arguments.kills
        for moment, blow in zip(draw(moments, arguments.kills, pace, interval), drawn, strict=True):
            if not hunt.kill(moment, blow):  # the run ended before it: take any time
                hunt.kill(clock(moments, pace, 0), blow)
        hunt.live(None, None)
    broken = hunt.broken
    if hunt.files.complete:
        # A run that is asked to stop saves, and may then find best games between two checkpoints of the other run.
        kept = "--no-checkpoint-ring" not in rest and not arguments.alternate_ring
        broken += compare(folder / "control", hunt.run_dir, frames=kept, metas=arguments.ranks == 1 and fatal == signal.SIGKILL)
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
