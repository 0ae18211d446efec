"""Kill a run at many moments and resume it each time, as a bad machine and a scheduler would. Does it end as if nobody had?

    python -m tools.faults.kill_test --kills 50 --seed 0
    python -m tools.faults.kill_test --kills 20 --signal SIGTERM

Trains once untouched, and once more with kills at moments drawn from --seed: in writes, by the clock, right after a checkpoint, during
the evaluation. After each kill the files are checked from outside (invariants.py), and the run goes on with --resume, or from the start
if there is no config.json yet. In the end both must be the same, tensor by tensor and row by row. Other signals than SIGKILL must be
answered in time and lose nothing. Takes the flags of `python -m speedyzero`. Prints a line for each kill and a table; exits with 1 and a
line for each fault.
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import monotonic, time
from typing import Literal

import tyro

from tools.faults.invariants import Files, compare, end, follow, inspect
from tools.faults.kill_schedule import Moment, Pace, clock, draw, measured, wait
from tools.faults.run import Run, given
from tools.faults.watch import Watch

GONE_S = 120.0
"""Seconds after a signal in which a process must be gone."""
SCORES = {("Catch-v0", "cpu"): 0.9}
"""Least score of a run with the settings of its preset."""


@dataclass
class Arguments:
    """Kill a run at many moments and resume it. Takes the flags of `python -m speedyzero` as well."""

    kills: int = 50
    """How often."""
    seed: int = 0
    """Of the run and of the moments."""
    env: str = "Catch-v0"
    """Environment."""
    preset: str = "cpu"
    """Preset of the run."""
    checkpoint_interval: int = 25
    """Iterations between two checkpoints."""
    log_interval: int = 5
    """Iterations between two rows of metrics."""
    signal: Literal["SIGKILL", "SIGTERM", "SIGUSR1", "SIGINT"] = "SIGKILL"
    """What it is killed with."""
    stop_s: float = 10.0
    """Seconds in which a run must save and end after another signal than SIGKILL."""
    alternate_ring: bool = False
    """Keep the frames of the ring in every second life only; in the others they come from replaying the emulators."""
    run_dir: Path | None = None
    """Folder for both runs and their output; must not exist. Default: a temporary one, kept after a fault."""
    json: Path | None = None
    """Also write all figures to this file."""


@dataclass
class Kill:
    """One life of the run, and its end."""

    moment: str
    code: int
    came: bool
    """Whether the moment came before the run ended by itself."""
    begun: bool
    """Whether the run had gone on before the moment came, and not only started."""
    hit: str
    """The file that was being written, if any."""
    resumed_at: int | None
    saved: int
    """Iteration of the newest checkpoint after it."""
    lost: int
    """Iterations that were logged and not saved."""
    said_s: float
    """From the signal to the last line, when all is saved; 0 if there was none."""
    exit_s: float
    """From the signal to the end."""
    replayed: bool

    def __str__(self) -> str:
        came = f"exit code {self.code}" if self.came else f"ended before ({self.code})"
        at = "-" if self.resumed_at is None else self.resumed_at
        line = f"{self.moment:22s} {came:18s} from {at:>6} saved {self.saved:6d} lost {self.lost:3d}"
        return line + (f"  while writing {self.hit}" if self.hit else "")


class Hunt:
    """A run that is killed and resumed, in `folder`/killed, and its faults in `broken`."""

    def __init__(self, arguments: Arguments, flags: list[str], folder: Path, pace: Pace):
        self.arguments = arguments
        self.run_dir, self._output = folder / "killed", folder / "killed.txt"
        self.run_dir.mkdir()
        self._flags = [*flags, "--run-dir", str(self.run_dir)]
        self._limit = 60 + 10 * (pace.start_s + pace.iterations * pace.iteration_s + pace.evaluation_s)
        self.files = Files()
        self.starts = 0
        self.kills: list[Kill] = []
        self.broken: list[str] = []

    def live(self, moment: Moment | None) -> Kill:
        """One life: start or resume the run, kill it at the moment or let it end, and check the files and the output."""
        wanted, new = signal.Signals[self.arguments.signal], not (self.run_dir / "config.json").exists()
        if moment and moment.pattern == "metrics.jsonl" and not self.files.rows:
            moment = replace(moment, pattern="config.json")  # there are no rows yet to write again
        ring = [] if not self.arguments.alternate_ring else ["--checkpoint-ring" if self.starts % 2 == 0 else "--no-checkpoint-ring"]
        self.starts += 1
        with contextlib.closing(Watch(self.run_dir)) as watch:
            run = Run([*self._flags, *ring, *([] if new else ["--resume"])], self._output)
            try:
                spare = 2 * self.arguments.checkpoint_interval
                came = moment is not None and wait(run, watch, moment, self.files.newest, spare, self._limit)
                sent, now = monotonic(), time()
                if came:
                    run.process.send_signal(wanted)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    run.process.wait(self._limit if moment is None else GONE_S)
                exit_s, stayed = monotonic() - sent, run.process.poll() is None
            finally:
                run.end()
        before, self.files = self.files, inspect(self.run_dir)
        life = follow(before, self.files, run.said(), self.arguments.checkpoint_interval)
        code, broken = run.process.returncode, self.files.broken + life.broken
        if stayed:
            broken.append(f"did not end in time: {run.last_line()}")
        elif not (came and code == -signal.SIGKILL):
            broken += end(wanted, code, life, self.files)
            if came and exit_s > self.arguments.stop_s:
                broken.append(f"took {exit_s:.1f} s to end")
        if moment is None and (code != 0 or self.files.leftovers):
            broken.append(f"exit code {code}, left {self.files.leftovers}: {run.last_line()}")
        if life.replayed and not self.arguments.alternate_ring and "--no-checkpoint-ring" not in run.flags:
            broken.append("the frames of the ring were not there and had to be replayed")
        hit = self.files.leftovers[0] if self.files.leftovers and self.files.leftovers != before.leftovers else ""
        kill = Kill(
            str(moment), code, came, life.begun, hit, life.resumed_at, self.files.newest,
            max(0, self.files.last_row - self.files.newest) if life.begun else 0,
            max(0.0, self._output.stat().st_mtime - now) if came else 0.0, exit_s, life.replayed,
        )  # fmt: skip
        self.broken += [f"life {self.starts} ({moment}): {line}" for line in broken]
        if new and code == 1:  # a new run was refused: the user has to delete what is there
            shutil.rmtree(self.run_dir)
            self.run_dir.mkdir()
            self.files = Files()
        return kill

    def kill(self, moment: Moment) -> bool:
        """One life that is to be killed; whether it was."""
        self.kills.append(self.live(moment))
        print(f"{len(self.kills):4d}  {self.kills[-1]}", flush=True)
        return self.kills[-1].came

    def figures(self) -> dict:
        """Totals of all kills that came."""
        kills = [kill for kill in self.kills if kill.came]
        hits = Counter(Path(kill.hit).name.split("_")[0].removesuffix(".tmp").removesuffix(".safetensors") for kill in kills if kill.hit)
        return {
            "signal": self.arguments.signal, "kills": len(kills), "kinds": dict(Counter(kill.moment.split()[0] for kill in kills)),
            "in a write": dict(hits), "before the run went on": sum(not kill.begun for kill in kills),
            "frames replayed": sum(kill.replayed for kill in kills), "checkpoints every": self.arguments.checkpoint_interval,
            "iterations lost, most": max((kill.lost for kill in kills), default=0),
            "iterations lost, mean": round(sum(kill.lost for kill in kills) / max(1, len(kills)), 2),
            "seconds to the last line, most": round(max((kill.said_s for kill in kills), default=0.0), 3),
            "seconds to the end, most": round(max((kill.exit_s for kill in kills), default=0.0), 3), "processes": self.starts,
        }  # fmt: skip


def control(flags: list[str], folder: Path) -> Pace:
    """Train once, untouched, in `folder`/control. Leaves with the run's own line if it fails."""
    run_dir = folder / "control"
    run_dir.mkdir(parents=True)
    with contextlib.closing(Watch(run_dir)) as watch:
        run = Run([*flags, "--run-dir", str(run_dir)], folder / "control.txt")
        try:
            pace = measured(run, watch)
        finally:
            run.end()
    if run.process.returncode != 0:
        sys.exit(f"error: the run failed untouched: {run.last_line()}")
    return pace


def main() -> None:
    arguments, rest = tyro.cli(Arguments, prog="kill_test", return_unknown_args=True)
    if arguments.kills < 1:
        sys.exit(f"error: --kills {arguments.kills}: must be at least 1")
    if given(rest, "resume") or (arguments.alternate_ring and given(rest, "checkpoint-ring")):
        sys.exit("error: --resume, --checkpoint-ring: decided here for each life; leave them out")
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it reports every resume
    # A job in the background ignores Ctrl-C, and its children would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = (arguments.run_dir or Path(tempfile.mkdtemp(prefix="kill_test_"))).resolve()
    if arguments.run_dir and folder.exists():
        sys.exit(f"error: --run-dir {arguments.run_dir}: exists already; give another folder")
    flags = ["--env", arguments.env, "--preset", arguments.preset, "--seed", str(arguments.seed), *rest]
    flags += ["--checkpoint-interval", str(arguments.checkpoint_interval), "--log-interval", str(arguments.log_interval)]
    pace = control(flags, folder)
    print(f"untouched: {pace.start_s:.1f} s to start, {pace.iterations} iterations of {pace.iteration_s * 1e3:.0f} ms", flush=True)
    moments = random.Random(arguments.seed)
    hunt = Hunt(arguments, flags, folder, pace)
    for moment in draw(moments, arguments.kills, pace, arguments.checkpoint_interval):
        if not hunt.kill(moment):  # the run ended before it: take any time
            hunt.kill(clock(moments, pace, 0))
    hunt.live(None)
    broken = hunt.broken
    if (hunt.run_dir / "summary.json").exists():
        # A run that is asked to stop saves, and may then find best games between two checkpoints of the other run.
        kept = "--no-checkpoint-ring" not in rest and not arguments.alternate_ring
        broken += compare(folder / "control", hunt.run_dir, frames=kept, metas=arguments.signal == "SIGKILL")
        score = json.loads((hunt.run_dir / "eval.json").read_bytes())["mean"]
        print(f"score {score:.2f}")
        if score < (least := SCORES.get((arguments.env, arguments.preset), score)):
            broken.append(f"the score is {score:.2f}, and must be at least {least:g}")
    else:
        broken.append("the run did not come to its end: there is no summary.json")
    figures = hunt.figures()
    print("\n".join(f"{name}: {value}" for name, value in figures.items()))
    if arguments.json:
        report = {"flags": flags, "pace": asdict(pace), "figures": figures, "broken": broken, "lives": list(map(asdict, hunt.kills))}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if broken:
        print("\n".join(f"broken: {text}" for text in broken))
        sys.exit(f"{len(broken)} faults; the runs are in {folder}")
    print("every promise kept: the run is the same as one that was never killed")
    if not arguments.run_dir:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
