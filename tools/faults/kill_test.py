"""Kill a run again and again and go on with it, as a bad machine and a scheduler would: does it end as if nobody had?

    python tools/faults/kill_test.py --kills 50 --seed 0
    python tools/faults/kill_test.py --kills 20 --signal SIGTERM

Trains once untouched, and once more with kills at moments drawn from --seed: within writes, by the clock, right after a checkpoint, during
the evaluation. After each the files are read from outside (promises.py), and the run goes on with --resume, or anew if there is no
config.json yet. In the end both must be the same, tensor by tensor and row by row. Other signals than SIGKILL must be heeded in time, and
lose nothing at all. Takes the flags of `python -m speedyzero`. Prints a line for each kill and a table; exits with 1 and a line for each
broken promise.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from moments import Moment, Pace, clock, draw, measured, wait
from promises import Files, compare, end, follow, inspect
from run import Run, given
from watch import Watch

GONE_S = 120.0
"""In this time at the latest a process is gone after its signal."""
SCORES = {("Catch-v0", "cpu"): 0.9}
"""Least score of a run with the settings of its preset."""


@dataclass
class Arguments:
    """Kill a run again and again and go on with it. Takes the flags of `python -m speedyzero` as well."""

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
    heed: float = 10.0
    """Seconds in which a run must have saved and ended that is asked to by another signal than SIGKILL."""
    alternate_ring: bool = False
    """Keep the frames of the ring in every second life only; in the others they come from replaying the emulators."""
    least_score: float | None = None
    """Mean score that the run must end with; default: 0.9 for Catch-v0 on preset cpu, none otherwise."""
    run_dir: Path | None = None
    """Folder for both runs and what they say; must not exist. Default: a temporary one, kept if a promise is broken."""
    json: Path | None = None
    """Also write all figures to this file."""


@dataclass
class Kill:
    """One life of the run, and its end."""

    number: int
    moment: str
    code: int
    came: bool
    """Whether the moment came before the run ended by itself."""
    begun: bool
    """Whether it had gone on before the moment came, and not only started."""
    hit: str
    """The file that was being written, if one was."""
    resumed_at: int | None
    newest: int
    """Iteration of the newest checkpoint after it."""
    lost: int
    """Iterations that were logged and not saved."""
    seconds: float
    said_s: float
    """From the signal to the last thing it said, when all is saved; the rest is Python's own end. 0 if it said nothing more."""
    exit_s: float
    """From the signal to the end."""
    replayed: bool


class Hunt:
    """A run that is killed and goes on, in `folder`/killed, and what it broke."""

    def __init__(self, arguments: Arguments, flags: list[str], folder: Path, pace: Pace):
        self.arguments, self.pace = arguments, pace
        self.run_dir, self._output = folder / "killed", folder / "killed.txt"
        self.run_dir.mkdir()
        self._flags = [*flags, "--run-dir", str(self.run_dir)]
        self._limit = 60 + 10 * (pace.start_s + pace.iterations * pace.iteration_s + pace.evaluation_s)
        self.files = Files()
        self.starts = 0
        self.kills: list[Kill] = []
        self.broken: list[str] = []

    def _start(self) -> tuple[Run, bool]:
        """The next process, and whether it begins a new run."""
        anew = not (self.run_dir / "config.json").exists()
        ring = [] if not self.arguments.alternate_ring else ["--checkpoint-ring" if self.starts % 2 == 0 else "--no-checkpoint-ring"]
        self.starts += 1
        return Run([*self._flags, *ring, *([] if anew else ["--resume"])], self._output), anew

    def kill(self, moment: Moment) -> Kill:
        """One life: start, wait for the moment, end it, look."""
        number, wanted = len(self.kills) + 1, signal.Signals[self.arguments.signal]
        if moment.pattern == "metrics.jsonl" and not self.files.rows:
            moment = replace(moment, pattern="config.json")  # there is nothing yet to write anew
        with contextlib.closing(Watch(self.run_dir)) as watch:
            run, anew = self._start()
            try:
                spare = 2 * self.arguments.checkpoint_interval
                came = wait(run, watch, moment, self.files.newest, spare, self._limit)
                overdue = not came and run.process.poll() is None
                sent, clock = monotonic(), time()
                if came:
                    run.process.send_signal(wanted)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    run.process.wait(0 if overdue else GONE_S)
                exit_s, stayed = monotonic() - sent, run.process.poll() is None
            finally:
                run.end()
        before, self.files = self.files, inspect(self.run_dir)
        life = follow(before, self.files, run.said(), self.arguments.checkpoint_interval)
        broken = self.files.broken + life.broken
        code = run.process.returncode
        if stayed:
            broken.append(f"still there after {self._limit if overdue else GONE_S:.0f} s: {run.last_line()}")
        elif code != -signal.SIGKILL or not came:
            broken += end(wanted, code, life, self.files)
            if came and exit_s > self.arguments.heed:
                broken.append(f"took {exit_s:.1f} s to end")
        if life.replayed and not self.arguments.alternate_ring and "--no-checkpoint-ring" not in run.flags:
            broken.append("the frames of the ring were not there and had to be made anew")
        lost = max(0, self.files.last_row - self.files.newest) if life.begun else 0
        hit = self.files.leftovers[0] if self.files.leftovers and self.files.leftovers != before.leftovers else ""
        said_s, seconds = max(0.0, self._output.stat().st_mtime - clock) if came else 0.0, monotonic() - run.started
        kill = Kill(
            number, str(moment), code, came, life.begun, hit, life.resumed_at, self.files.newest, lost, seconds, said_s, exit_s,
            life.replayed,
        )  # fmt: skip
        self.kills.append(kill)
        self.broken += [f"life {number} ({moment}): {line}" for line in broken]
        if anew and code == 1:  # a new run was refused: whoever wants one has to delete what is there
            shutil.rmtree(self.run_dir)
            self.run_dir.mkdir()
            self.files = Files()
        return kill

    def finish(self) -> None:
        """Let it come to its end."""
        run, _ = self._start()
        try:
            code = run.process.wait(self._limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            run.end()
        before, self.files = self.files, inspect(self.run_dir)
        life = follow(before, self.files, run.said(), self.arguments.checkpoint_interval)
        broken = self.files.broken + life.broken
        if code != 0:
            broken.append(f"exit code {code}: {run.last_line()}")
        if self.files.leftovers:
            broken.append(f"left {', '.join(self.files.leftovers)}")
        self.broken += [f"last life: {line}" for line in broken]


def line(kill: Kill) -> str:
    """A kill, for the table."""
    at = "-" if kill.resumed_at is None else kill.resumed_at
    came = f"exit code {kill.code}" if kill.came else f"ended before ({kill.code})"
    return (
        f"{kill.number:4d}  {kill.moment:22s} {came:18s} from {at:>6} saved {kill.newest:6d} lost {kill.lost:3d} {kill.seconds:6.1f} s  "
        f"{'in the midst of ' + kill.hit if kill.hit else ''}"
    ).rstrip()


def table(hunt: Hunt, seconds: float) -> tuple[list[str], dict]:
    """The figures of a hunt, to print and as JSON."""
    kills = [kill for kill in hunt.kills if kill.came]
    kinds = Counter(kill.moment.split()[0] for kill in kills)
    hits = Counter(Path(kill.hit).name.split("_")[0].removesuffix(".tmp").removesuffix(".safetensors") for kill in kills if kill.hit)
    lost = [kill.lost for kill in kills]
    figures = {
        "kills": len(kills), "kinds": dict(kinds), "in_a_write": sum(hits.values()), "files_hit": dict(hits),
        "before_anything": sum(not kill.begun for kill in kills), "lost_max": max(lost, default=0),
        "lost_mean": sum(lost) / max(1, len(lost)), "interval": hunt.arguments.checkpoint_interval, "starts": hunt.starts,
        "replayed": sum(kill.replayed for kill in kills), "seconds": seconds,
        "said_s_max": max((kill.said_s for kill in kills), default=0.0), "exit_s_max": max((kill.exit_s for kill in kills), default=0.0),
    }  # fmt: skip
    lines = [
        f"kills with {hunt.arguments.signal}: {len(kills)}: " + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()),
        f"in the midst of a write: {figures['in_a_write']}: " + ", ".join(f"{count} {name}" for name, count in hits.most_common()),
        f"before the run went on: {figures['before_anything']}; frames from a replay: {figures['replayed']}",
        f"iterations lost: {figures['lost_max']} at most, {figures['lost_mean']:.1f} on average; "
        f"checkpoints every {figures['interval']}",
        f"from the signal to its last line: {figures['said_s_max']:.2f} s at most; to its end {figures['exit_s_max']:.2f} s",
        f"processes: {hunt.starts}; {seconds:.0f} s in all",
    ]
    return lines, figures


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
    arguments, rest = tyro.cli(Arguments, prog="kill_test.py", return_unknown_args=True)
    if arguments.kills < 1:
        sys.exit(f"error: --kills {arguments.kills}: must be at least 1")
    if given(rest, "resume") or (arguments.alternate_ring and given(rest, "checkpoint-ring")):
        sys.exit("error: --resume, --checkpoint-ring: which life has them is decided here; leave them out")
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it says where a run was resumed
    # Of a job in the background Ctrl-C is ignored, and its children would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = (arguments.run_dir or Path(tempfile.mkdtemp(prefix="kill_test_"))).resolve()
    if arguments.run_dir and folder.exists():
        sys.exit(f"error: --run-dir {arguments.run_dir}: exists already; give another folder")
    flags = ["--env", arguments.env, "--preset", arguments.preset, "--seed", str(arguments.seed), *rest]
    flags += ["--checkpoint-interval", str(arguments.checkpoint_interval), "--log-interval", str(arguments.log_interval)]
    begin = monotonic()
    pace = control(flags, folder)
    print(
        f"untouched: {pace.start_s:.1f} s to start, {pace.iterations} iterations of {pace.iteration_s * 1e3:.0f} ms, "
        f"{pace.evaluation_s:.1f} s of evaluation", flush=True,
    )  # fmt: skip
    moments = random.Random(arguments.seed)
    hunt = Hunt(arguments, flags, folder, pace)
    for moment in draw(moments, arguments.kills, pace, arguments.checkpoint_interval):
        kill = hunt.kill(moment)
        print(line(kill), flush=True)
        if not kill.came:  # it ended before: any time will do
            print(line(hunt.kill(clock(moments, pace, 0))), flush=True)
    hunt.finish()
    broken = hunt.broken
    if not (hunt.run_dir / "summary.json").exists():
        broken.append("the run did not come to its end: there is no summary.json")
    else:
        # A stop saves, and then it may find the best games between two checkpoints of the other run.
        kept = "--no-checkpoint-ring" not in rest and not arguments.alternate_ring
        broken += compare(folder / "control", hunt.run_dir, frames=kept, metas=arguments.signal == "SIGKILL")
        score = json.loads((hunt.run_dir / "eval.json").read_bytes())["mean"]
        least = arguments.least_score if arguments.least_score is not None else SCORES.get((arguments.env, arguments.preset))
        print(f"score {score:.2f}")
        if least is not None and score < least:
            broken.append(f"the score is {score:.2f}, and must be at least {least:g}")
    lines, figures = table(hunt, monotonic() - begin)
    print("\n".join(lines))
    if arguments.json:
        report = {"flags": flags, "signal": arguments.signal, "pace": asdict(pace), "figures": figures, "broken": broken}
        arguments.json.write_text(json.dumps(report | {"lives": [asdict(kill) for kill in hunt.kills]}, indent=1) + "\n")
    if broken:
        print("\n".join(f"broken: {text}" for text in broken))
        sys.exit(f"{len(broken)} broken promises; the runs are in {folder}")
    print("every promise kept: the run is the same as one that was never killed")
    if not arguments.run_dir:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
