"""Many games and seeds as one command: `python -m speedyzero.suite --games atari26 --seeds 3 --out suites/x -- FLAGS`.

Each run is a process of its own (`python -m speedyzero FLAGS`), one on each device at a time. The same command goes on with a suite that
was interrupted: complete runs stay, those begun are resumed. At the end come the statistics of the human-normalised scores.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
import tyro
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from speedyzero.aggregate import STATISTICS
from speedyzero.config import ConfigError
from speedyzero.envs import EnvError, describe
from speedyzero.processor import usable_cores
from speedyzero.published import EFFICIENTZERO
from speedyzero.report import aggregate_rows, number, shares_by_game
from speedyzero.run.directory import Lock
from speedyzero.run.files import write_json
from speedyzero.run.record import Recorded, RunError, clock, read
from speedyzero.scores import ATARI_100K

ATARI26 = "atari26"
OURS = ("--env", "--seed", "--run-dir", "--resume", "--dry-run", "--help")
"""Flags of a run that the suite gives, or that make no sense in one."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STUCK = 70
"""Exit code of a run whose iteration hung: it is resumed."""
MOST_TRIES = 3
POLL_S = 0.5
PLAIN_WIDTH = 140
"""Columns of the tables where there is no terminal."""
TAIL = 1 << 16
"""Bytes at the end of metrics.jsonl in which the last row is looked for."""


@dataclass
class Run:
    """One run of the suite. state: waiting, running, done or failed."""

    env: str
    seed: int
    folder: Path
    state: str = "waiting"
    tries: int = 0
    why: str = ""
    """Of a failed run, the last line that it printed."""

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def log(self) -> Path:
        """What its processes printed."""
        return self.folder.with_name(self.folder.name + ".log")

    @property
    def complete(self) -> bool:
        return (self.folder / "summary.json").exists()

    def command(self, flags: Sequence[str]) -> list[str]:
        """The command line that starts it, or goes on with it if it was begun."""
        program = [sys.executable, "-m", "speedyzero"]
        if (self.folder / "config.json").exists():
            return [*program, "--resume", "--run-dir", str(self.folder)]
        return [*program, "--env", self.env, "--seed", str(self.seed), "--run-dir", str(self.folder), *flags]

    def progress(self) -> float:
        """Share of the environment steps that were taken, by the last row of its metrics; 0 before the first."""
        try:
            total = json.loads((self.folder / "config.json").read_text())["env_steps"]
            with open(self.folder / "metrics.jsonl", "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
                last = file.read().rpartition(b"\n")[0].rpartition(b"\n")[2]
            return min(1.0, json.loads(last)["env_steps"] / total)
        except (OSError, ValueError, KeyError):
            return 0.0


class Slot(NamedTuple):
    """Where one process at a time runs. name: for the table. environment: variables that its process gets on top of ours."""

    name: str
    environment: dict[str, str]

    @property
    def on_cpu(self) -> bool:
        return not self.environment["CUDA_VISIBLE_DEVICES"]


def slots_for(jobs: int | None, flags: Sequence[str]) -> list[Slot]:
    """One slot for each CUDA device, or `jobs` on the CPU; None: 1.

    Raises:
        ConfigError: jobs below 1, or given where there are CUDA devices.
    """
    if jobs is not None and jobs < 1:
        raise ConfigError(f"--jobs {jobs}: must be greater than 0")
    devices = 0 if value_of(flags, "--device") == "cpu" else torch.cuda.device_count()
    if devices == 0:
        return [Slot(f"job {number}", {"CUDA_VISIBLE_DEVICES": ""}) for number in range(jobs or 1)]
    if jobs is not None:
        raise ConfigError(f"--jobs {jobs}: one process runs on each of the {devices} CUDA devices; leave it out, or add -- --device cpu")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else list(map(str, range(devices)))
    return [Slot(f"GPU {name}", {"CUDA_VISIBLE_DEVICES": name}) for name in names[:devices]]


def value_of(flags: Sequence[str], name: str) -> str | None:
    """The value of a flag among `flags`, as `--device cpu` or `--device=cpu`; None if it is not there."""
    for flag, following in itertools.pairwise([*flags, ""]):
        if flag.partition("=")[0] == name:
            return flag.partition("=")[2] if "=" in flag else following
    return None


class Suite:
    """The runs of a suite and the processes that do them.

    say: gets a line about each start and end.
    """

    def __init__(self, runs: Sequence[Run], slots: Sequence[Slot], flags: Sequence[str], say: Callable[[str], None]):
        self.runs, self.slots, self.flags, self.say = runs, slots, flags, say
        for run in runs:
            if run.complete:
                run.state = "done"
        self.queue = deque(run for run in runs if run.state == "waiting")
        self.working: dict[int, tuple[Run, subprocess.Popen[bytes]]] = {}
        """By slot."""
        self.stopped_by: signal.Signals | None = None

    def stop(self, number: int, _: FrameType | None = None) -> None:
        """Start no further run, and ask those at work to save and end; a handler of signals."""
        if number == signal.SIGHUP == self.stopped_by:
            return  # of a closed terminal come two, and a second request would end the runs unsaved
        self.stopped_by = signal.Signals(number)
        self.queue.clear()
        for _, process in self.working.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    def step(self) -> bool:
        """Collect the processes that ended and start others in their slots; returns whether any is at work."""
        for slot, (run, process) in list(self.working.items()):
            if (code := process.poll()) is not None:
                del self.working[slot]
                self._ended(run, code)
        for slot in range(len(self.slots)):
            if slot not in self.working and self.queue:
                self._start(self.queue.popleft(), slot)
        return bool(self.working)

    def _start(self, run: Run, slot: int) -> None:
        run.state, run.tries = "running", run.tries + 1
        verb = "is resumed" if (run.folder / "config.json").exists() else "starts"
        self.say(f"{run.name} {verb} on {self.slots[slot].name}")
        with open(run.log, "ab") as log:
            # A session of its own: Ctrl-C reaches the suite alone, which then asks each run to save.
            process = subprocess.Popen(
                run.command(self.flags), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, **self.slots[slot].environment},
            )  # fmt: skip
        self.working[slot] = run, process

    def _ended(self, run: Run, code: int) -> None:
        if run.complete and code == 0:
            run.state = "done"
            self.say(f"{run.name} is complete")
        elif self.stopped_by is not None:
            run.state = "waiting"
        elif code == STUCK and run.tries < MOST_TRIES:
            run.state = "waiting"
            self.queue.appendleft(run)
            self.say(f"{run.name} was stuck and is resumed")
        else:
            run.state, run.why = "failed", last_line(run.log) or f"exit code {code}"
            self.say(f"{run.name} failed: {run.why}; see {run.log}")


def last_line(path: Path) -> str:
    """The last line of a text that is not empty; "" if there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def live_table(suite: Suite, began: float) -> Group:
    """A row a game, a cell a seed, below a line about all of them."""
    seeds = sorted({run.seed for run in suite.runs})
    done = sum(run.state == "done" for run in suite.runs)
    table = Table("game")
    for seed in seeds:
        table.add_column(f"seed {seed}", justify="right")
    for env in dict.fromkeys(run.env for run in suite.runs):
        table.add_row(env, *(cell(run) for run in suite.runs if run.env == env))
    return Group(Text(f"{done} of {len(suite.runs)} runs complete, {clock(time.monotonic() - began)} at work", no_wrap=True), table)


def cell(run: Run) -> str:
    """A run in the live table, with rich's colours."""
    if run.state == "done":
        try:
            return f"[green]{number(read(run.folder).evaluation['mean'])}"
        except (RunError, TypeError):
            return "[green]complete"
    if run.state == "failed":
        return "[red]failed"
    share = run.progress()
    return f"[yellow]{share:.0%}" if run.state == "running" else f"[dim]{share:.0%}" if share else "[dim]-"


def say(console: Console, line: str) -> None:
    """Print a line of any text, above the live table if there is one."""
    console.print(Text(line), soft_wrap=True)  # not with markup=False, which would go for the table as well


def work(suite: Suite, console: Console) -> None:
    """Do the runs until all are complete or failed, or a signal asks to stop."""
    began = time.monotonic()
    # The runs have sessions of their own: without a handler a closed terminal would end the suite, and they would go on unattended.
    # nohup ignores SIGHUP, and it stays so.
    wanted = [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    handlers = {number: signal.signal(number, suite.stop) for number in wanted}
    live = Live(console=console, refresh_per_second=1) if console.is_terminal else None
    try:
        if live is not None:
            live.start()
        while suite.step():
            if live is not None:
                live.update(live_table(suite, began))
            time.sleep(POLL_S)
        if live is not None:
            live.update(live_table(suite, began))
    finally:
        if live is not None:
            live.stop()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def results(runs: Sequence[Recorded]) -> dict[str, Any]:
    """What `results.json` holds: by game the evaluations' means, and the statistics over the games that have a human-normalised score."""
    shares = shares_by_game(runs)
    games = {}
    for env in sorted({run.env for run in runs}):
        means = [run.evaluation["mean"] for run in runs if run.env == env and run.evaluation]
        games[env] = {"scores": means, "mean": sum(means) / len(means) if means else None, "human_normalised": shares.get(env, [])}
    return {"games": games, "aggregates": aggregate_rows(shares) if shares else []}


def print_results(found: dict[str, Any], console: Console) -> None:
    """Two tables: by game, and over all of them, beside what others published."""
    table = Table(title="score of the evaluation, mean over seeds", title_justify="left")
    for name in ("game", "seeds", "score", "human-normalised", EFFICIENTZERO.name):
        table.add_column(name, justify="left" if name == "game" else "right")
    for env, game in found["games"].items():
        share = game["human_normalised"]
        theirs = EFFICIENTZERO.games.get(env)
        table.add_row(
            env, str(len(game["scores"])), "" if game["mean"] is None else number(game["mean"]),
            f"{sum(share) / len(share):.3f}" if share else "", "" if theirs is None else number(theirs),
        )  # fmt: skip
    console.print(table)
    if not found["aggregates"]:
        console.print("no human-normalised scores: no game of Atari-100k was played to its end, without a limit's cut", soft_wrap=True)
        return
    table = Table(title="human-normalised, 95 % intervals by stratified bootstrap (rliable's definitions)", title_justify="left")
    table.add_column("", no_wrap=True)
    for name in ("games", "seeds", *STATISTICS):
        table.add_column(name, justify="right")
    for row in found["aggregates"]:
        if any(row["cells"]):
            table.add_row(row["name"], str(row["games"]), row["seeds"], *row["cells"])
    console.print(table)
    for row in found["aggregates"][1:]:
        console.print(f"{row['name']}: {row['note']}", highlight=False, soft_wrap=True)
    if len(found["games"]) < len(ATARI_100K):
        console.print(f"{len(found['games'])} of the {len(ATARI_100K)} games: the statistics of others are over all of them")


@dataclass
class Arguments:
    """Train and evaluate many games and seeds, one process a device. Flags of the runs come after `--`."""

    out: Path
    """Folder of the suite; the same command goes on with one that was interrupted."""
    games: tuple[str, ...] = (ATARI26,)
    """EnvPool ids, or atari26 for the games of Atari-100k."""
    seeds: int = 3
    """Runs of each game, with the seeds 0 to SEEDS - 1."""
    jobs: int | None = None
    """On a CPU: processes at a time; default: 1. With CUDA there is one for each device."""


@dataclass
class Plan:
    """A suite as it was first asked for: `suite.json`. A later command may add games and seeds."""

    flags: list[str]
    threads: int | None = None
    """PyTorch's threads of every run, where several share a CPU."""

    @property
    def run_flags(self) -> list[str]:
        return [*self.flags, *([] if self.threads is None else ["--threads", str(self.threads)])]


def plan_for(out: Path, flags: list[str], jobs: int) -> Plan:
    """The plan in `out`, or a new one. jobs: processes on the CPU at a time, 1 with CUDA.

    Raises:
        ConfigError: the suite there was made with other flags, or its file cannot be read.
    """
    path = out / "suite.json"
    if path.exists():
        try:
            saved = Plan(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{path}: cannot be read ({error}); give another --out") from None
        if saved.flags != flags:
            raise ConfigError(f"--out {out}: its runs were made with '-- {' '.join(saved.flags)}'; give the same, or another --out")
        return saved
    threads = max(1, usable_cores() // jobs) if jobs > 1 and value_of(flags, "--threads") is None else None
    return Plan(flags, threads)


def prepared(arguments: Arguments, flags: list[str]) -> tuple[list[Run], list[Slot]]:
    """The runs and where they run.

    Raises:
        ConfigError, EnvError: one line.
    """
    if arguments.seeds < 1:
        raise ConfigError(f"--seeds {arguments.seeds}: must be greater than 0")
    if given := next((flag for flag in flags if flag.partition("=")[0] in OURS), None):
        raise ConfigError(f"-- {given}: the suite gives it to each run itself; leave it out")
    games = dict.fromkeys(game for asked in arguments.games for game in (ATARI_100K if asked == ATARI26 else (asked,)))
    for env in games:
        try:
            describe(env)
        except EnvError as error:
            raise EnvError(str(error).replace("--env ", "--games ", 1)) from error
    runs = [
        Run(env, seed, arguments.out / f"{env.replace('/', '_')}_seed{seed}") for seed in range(arguments.seeds) for env in games
    ]  # every game once before a second seed
    return runs, slots_for(arguments.jobs, flags)


def main() -> None:
    given = sys.argv[1:]
    split = given.index("--") if "--" in given else len(given)
    arguments, flags = tyro.cli(Arguments, prog="python -m speedyzero.suite", args=given[:split]), given[split + 1 :]
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    try:
        runs, slots = prepared(arguments, flags)
        plan = plan_for(arguments.out, flags, len(slots) if slots[0].on_cpu else 1)
        arguments.out.mkdir(parents=True, exist_ok=True)
        try:
            lock = Lock(arguments.out)
        except ConfigError:
            raise ConfigError(f"--out {arguments.out}: another suite is at work there; wait for it, or give another folder") from None
        write_json(arguments.out / "suite.json", vars(plan))
        suite = Suite(runs, slots, plan.run_flags, partial(say, console))
        work(suite, console)
        found = results([read(run.folder) for run in runs if run.state == "done"])
        write_json(arguments.out / "results.json", found)
        lock.release()
    except (ConfigError, EnvError, RunError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: --out {arguments.out}: {error.strerror or error} ({error.filename}); make it writable or make room")
    if suite.stopped_by is not None:
        left = sum(run.state != "done" for run in runs)
        console.print(f"stopped by {suite.stopped_by.name}, saved; {left} of {len(runs)} runs are left: the same command goes on")
        sys.exit(128 + suite.stopped_by)
    if found["games"]:
        print_results(found, console)
        folders = f"{arguments.out}/*_seed*/"
        console.print(f"report: python -m speedyzero.report {folders} --out {arguments.out / 'report.html'}", markup=False, soft_wrap=True)
    failed = [run for run in runs if run.state == "failed"]
    for run in failed:
        console.print(f"failed: {run.name}: {run.why}; see {run.log}", markup=False, soft_wrap=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
