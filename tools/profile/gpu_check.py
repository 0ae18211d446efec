"""All that only a GPU can tell of the trainer, in one command and under ten minutes.

    python3 -m tools.profile.gpu_check OUT_DIR                                   # Pong-v5, preset efficientzero, on the CUDA device
    python3 -m tools.profile.gpu_check OUT_DIR --preset speedyzero --lanes 64    # any flag of python -m speedyzero
    python3 -m tools.profile.gpu_check OUT_DIR --parts facts,speed --budget 300
    python3 -m tools.profile.gpu_check OUT_DIR --device cpu                      # the same path at toy size, in a minute or two

    facts      the machine, the versions, and the ceilings that every floor is taken from
    overlap    whether the device works while the host does, and what the emulators' turn costs, in either form of capture
    parity     every kernel against its reference at the sizes of the run
    capture    captured iterations against uncaptured ones, every tensor of the state
    speed      ms of every phase and R, the projected time of the recipe, stages against their floors, memory
    idle       the device's idle share of replayed iterations, launches beside the graphs
    train      a run from the command line, stopped by SIGTERM, resumed, ended

Each part runs in a process of its own with a share of --budget that is its to the end: a crash or a hang fails or ends that part alone.
OUT_DIR gets three files, written again after every part, so that they come back from a lease even if the check does not end:
summary.txt and summary.json, and gpu_check.tar.gz with all else. The exit code is the number of parts that failed, 75 if none did and
some ran out of time, 130 or 143 if a signal ended the check.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Annotated, Literal

import tyro

from speedyzero.config import Config, ConfigError, pick_device
from speedyzero.envs import EnvError
from speedyzero.run.files import write_json
from tools.faults.run import environment as with_checkout
from tools.faults.run import given
from tools.profile.bring_home import archive
from tools.profile.checks import NAMES
from tools.profile.checks.job import write_job
from tools.profile.settings import read_config

PART = (sys.executable, "-m", "tools.profile.checks")
"""Command of a part, before its name."""
WEIGHTS = {"facts": 25, "overlap": 90, "parity": 60, "capture": 75, "speed": 185, "idle": 60, "train": 95}
"""Shares of the budget: a part gets its share of what is left, among the parts that are still to come."""
ASKED_TO_END = 0.8
"""Share of a part's time after which it should have all it needs; the rest is for starting, writing, and a last long step."""
STACK_S, KILLED_S = 0.5, 10.0
"""Seconds in which a part that hangs writes its stack, and in which a killed process must be gone."""
WIDTH, TAIL = 120, 15
"""Columns of the table, and lines of a failed part's log in the summary."""
PASSED, FAILED, OUT_OF_TIME, NOT_RUN = "passed", "FAILED", "out of time", "not run"
LATE = 75
"""Exit code of a check of which nothing failed and something ran out of time."""


@dataclass
class Arguments:
    """Check on a GPU what a CPU cannot. Takes the flags of `python -m speedyzero` as well."""

    out_dir: Annotated[Path, tyro.conf.Positional]
    """Folder for the three files that are written; it must be new or empty."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to check; auto: cuda if there is one. On a CPU everything is of toy size."""
    env: str | None = None
    """EnvPool id; default: Pong-v5 on CUDA, Catch-v0 on a CPU."""
    preset: Literal["efficientzero", "speedyzero", "cpu", "smoke"] | None = None
    """Preset to take the settings from; default: efficientzero on CUDA, smoke on a CPU."""
    parts: str = ",".join(NAMES)
    """Which parts, separated by commas; they run in the order of the default."""
    budget: float = 580.0
    """Seconds for everything."""


@dataclass
class Outcome:
    """The result of a part."""

    part: str
    status: str = NOT_RUN
    seconds: float = 0.0
    exit_code: int | None = None
    failures: list[str] = dataclasses.field(default_factory=list)
    unfinished: list[str] = dataclasses.field(default_factory=list)
    lines: list[str] = dataclasses.field(default_factory=list)
    results: dict = dataclasses.field(default_factory=dict)
    log_tail: list[str] = dataclasses.field(default_factory=list)

    def text(self) -> str:
        """This part's block of the table."""
        lines = [f"{self.part:10s} {self.status:11s} {self.seconds:6.1f} s"]
        for line in self.lines:
            lines += textwrap.wrap(f"  {line}", WIDTH, subsequent_indent=6 * " ") or [""]
        lines += [f"  {FAILED}: {failure}" for failure in self.failures] + [f"  {OUT_OF_TIME}: {line}" for line in self.unfinished]
        if self.log_tail:
            lines.append(f"  log: {self.part}.log, which ends: {self.log_tail[-1].strip()[:200]}")
        return "\n".join(lines) + "\n"


class Ended(Exception):
    """A signal asked to stop."""


def chosen(parts: str) -> list[str]:
    """The parts to run, in order. Raises ConfigError."""
    wanted = {name.strip() for name in parts.split(",") if name.strip()}
    if not wanted or wanted - set(NAMES):
        raise ConfigError(f"--parts {parts}: choose from {','.join(NAMES)}")
    return [name for name in NAMES if name in wanted]


def read(arguments: Arguments, rest: list[str]) -> tuple[Config, list[str]]:
    """The config to check, and the flags of python -m speedyzero that make it; makes OUT_DIR. Raises ConfigError or EnvError."""
    for name in ("run-dir", "resume", "graph", "dry-run"):
        if given([word.replace("_", "-") for word in rest], name):
            raise ConfigError(f"--{name}: is set by the parts of a check; leave it out")
    if not 0 < arguments.budget < float("inf"):
        raise ConfigError(f"--budget {arguments.budget:g}: must be greater than 0")
    device = pick_device(arguments.device).type
    preset = arguments.preset or ("efficientzero" if device == "cuda" else "smoke")
    flags = ["--device", device, "--env", arguments.env or ("Pong-v5" if device == "cuda" else "Catch-v0"), *rest]
    config, _ = read_config(preset, flags, "gpu_check")
    out = arguments.out_dir
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise ConfigError(f"OUT_DIR {out}: is not empty; give another folder")
    except OSError as error:
        raise ConfigError(f"OUT_DIR {out}: cannot be written ({error.strerror}); give another folder") from None
    return config, ["--preset", preset, *flags]


def environment(part: str, device: str) -> dict[str, str]:
    """Of a part's process: this checkout first, and Triton's interpreter only for kernels without a GPU."""
    env = with_checkout() | {"PYTHONFAULTHANDLER": "1"}
    env.pop("TRITON_INTERPRET", None)
    return env | ({"TRITON_INTERPRET": "1"} if part == "parity" and device == "cpu" else {})


def run_part(part: str, work: Path, limit: float, device: str) -> Outcome:
    """Run a part to its end or to its limit; what it has written counts either way."""
    begin, ended = monotonic(), True
    command = [*PART, part, str(work), str(begin + ASKED_TO_END * limit)]
    with (work / f"{part}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment(part, device), start_new_session=True)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            ended = False
            process.send_signal(signal.SIGUSR2)  # its stack goes to the log
            sleep(STACK_S)
        finally:  # the processes that it started are of its session, and may have outlived it
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(KILLED_S)  # a driver may hold on to it; the other parts must not wait
    late = "" if ended else f"ended after {limit:.0f} s, its share of the budget"
    return outcome(part, work, monotonic() - begin, process.returncode if ended else None, late)


def outcome(part: str, work: Path, seconds: float, code: int | None, ended: str = "") -> Outcome:
    """What a part wrote, and how it fared. `ended`: why the driver ended it, "" if it did not."""
    path, log = work / f"{part}.json", work / f"{part}.log"
    written = json.loads(path.read_text()) if path.exists() else {"lines": [], "failures": [], "unfinished": [], "results": {}}
    failures, unfinished = written["failures"], written["unfinished"]
    if ended:
        unfinished.append(f"{part}: {ended}")
    elif code < 0:
        failures.append(f"{part}: was killed by {signal.Signals(-code).name}")
    elif code > 1 or (code == 1 and not failures):
        failures.append(f"{part}: exit code {code}")
    tail = log.read_text(errors="replace").splitlines()[-TAIL:] if (failures or ended) and log.exists() else []
    status = FAILED if failures else OUT_OF_TIME if unfinished else PASSED
    return Outcome(part, status, seconds, code, failures, unfinished, written["lines"], written["results"], tail)


class Check:
    """One check: its outcomes so far, and the files in `out`; `work` is the parts' folder."""

    def __init__(self, out: Path, work: Path, config: Config, flags: list[str], parts: list[str], budget: float):
        self.out, self.work, self.config, self.flags, self.parts, self.budget = out, work, config, flags, parts, budget
        self.begin = monotonic()
        self.found: list[Outcome] = []
        self.ended_by: signal.Signals | None = None
        write_job(work, config, flags)

    def run(self) -> int:
        """Run the parts, printing each as it ends; returns the exit code."""

        def stop(number: int, _: object) -> None:
            self.ended_by = signal.Signals(number)
            raise Ended

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        part_begin = self.begin
        try:
            for at, part in enumerate(self.parts):
                part_begin = monotonic()
                share = WEIGHTS[part] / sum(WEIGHTS[name] for name in self.parts[at:])
                limit = share * (self.budget - (part_begin - self.begin))
                print(f"{part} ... at most {limit:.0f} s", flush=True)
                self.note(run_part(part, self.work, limit, self.config.device))
        except Ended:
            for part in self.parts[len(self.found) : len(self.found) + 1]:  # none, if the last one had just ended
                self.note(outcome(part, self.work, monotonic() - part_begin, None, f"ended by {self.ended_by.name}"))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        for part in self.parts[len(self.found) :]:
            self.note(Outcome(part))
        if self.ended_by:
            return 128 + self.ended_by
        statuses = [one.status for one in self.found]
        return statuses.count(FAILED) or (LATE if OUT_OF_TIME in statuses else 0)

    def note(self, one: Outcome) -> None:
        """Add an outcome, print it, and write the files."""
        self.found.append(one)
        print(one.text(), flush=True)
        left_out = archive(self.work, self.out / "gpu_check.tar.gz")
        (self.out / "summary.txt").write_text("\n".join(part.text() for part in self.found))
        write_json(self.out / "summary.json", {
            "env": self.config.env, "preset": self.config.preset, "device": self.config.device, "flags": self.flags,
            "config": self.config.to_json(), "seconds": monotonic() - self.begin, "ended_by": self.ended_by and self.ended_by.name,
            "too_large_for_the_archive": left_out, "status": {part.part: part.status for part in self.found},
            "parts": {part.part: dataclasses.asdict(part) for part in self.found},
        })  # fmt: skip


def main() -> None:
    begin = monotonic()
    arguments, rest = tyro.cli(Arguments, prog="gpu_check", return_unknown_args=True)
    arguments.out_dir = arguments.out_dir.absolute()
    try:
        parts = chosen(arguments.parts)
        config, flags = read(arguments, rest)
    except (ConfigError, EnvError) as error:
        sys.exit(f"error: {error}")
    print(f"{config.env}, preset {config.preset}, on {config.device}" + (", at toy size" if config.device == "cpu" else "")
          + f": {len(parts)} parts in at most {arguments.budget:.0f} s, results in {arguments.out_dir}\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="gpu_check_", ignore_cleanup_errors=True) as work:
        check = Check(arguments.out_dir, Path(work), config, flags, parts, arguments.budget - (monotonic() - begin))
        code = check.run()
    print(f"{len(parts)} parts in {monotonic() - begin:.0f} s: " + ", ".join(f"{one.part} {one.status}" for one in check.found))
    print("\n".join(f"  {line}" for one in check.found for line in (*one.failures, *one.unfinished)))
    sys.exit(code)


if __name__ == "__main__":
    main()
