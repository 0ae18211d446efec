"""All that only a GPU can tell of the trainer, in one command and under ten minutes.

    python -m tools.profile.gpu_check OUT_DIR                                   # Pong-v5, preset efficientzero, on the CUDA device
    python -m tools.profile.gpu_check OUT_DIR --preset speedyzero --lanes 64    # any flag of python -m speedyzero
    python -m tools.profile.gpu_check OUT_DIR --parts facts,speed --budget 300
    python -m tools.profile.gpu_check OUT_DIR --device cpu                      # the same path at toy size, in a minute or two

    facts      the machine, the versions, and the ceilings that every floor is taken from
    parity     every kernel against its reference at the sizes of the run
    capture    captured iterations against uncaptured ones, every tensor of the state
    speed      ms of every phase and R, the projected time of the recipe, stages against their floors, memory
    idle       the device's idle share of replayed iterations, launches beside the graphs
    emulators  what a turn costs, and how much of it is hidden
    train      a run from the command line, stopped, resumed, ended

checks/ has a file for each. A part is a process with a share of the time, so that a crash, a lost device or a hang ends that part alone;
the time that a part leaves goes to the later ones. OUT_DIR gets PART.json as soon as there is something to say, PART.log, and
summary.json with everything; trace.json.gz and replay.json.gz are Chrome traces, stages.json is for roofline --measured, run/ is the
training run. The exit code is the number of parts that failed, 130 or 143 if a signal ended the check. kernels_gpu.sh runs the test suite
and the benchmark of the kernels; this looks at them only as the trainer uses them.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
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
from tools.profile.checks import NAMES
from tools.profile.checks.job import write_job
from tools.profile.roofline import read_config

PART = (sys.executable, "-m", "tools.profile.checks")
"""Command of a part, before its name."""
WEIGHTS = {"facts": 25, "parity": 75, "capture": 75, "speed": 185, "idle": 60, "emulators": 65, "train": 95}
"""Shares of the budget: a part gets its share of what is left, among the parts that are still to come."""
ASKED_TO_END = 0.8
"""Share of a part's time after which it should have all it needs; the rest is for starting, writing, and a last long step."""
STACK_S, KILLED_S = 0.5, 10.0
"""Seconds in which a part that hangs writes its stack, and in which a killed process must be gone."""
WIDTH, TAIL = 120, 15
"""Columns of the table, and lines of a failed part's log in the summary."""


@dataclass
class Arguments:
    """Check on a GPU what a CPU cannot. Takes the flags of `python -m speedyzero` as well."""

    out_dir: Annotated[Path, tyro.conf.Positional]
    """Folder for all that is written; it must be new or empty."""
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
    status: str = "not run"
    """"passed", "FAILED", or "not run"."""
    seconds: float = 0.0
    exit_code: int | None = None
    failures: list[str] = dataclasses.field(default_factory=list)
    lines: list[str] = dataclasses.field(default_factory=list)
    results: dict = dataclasses.field(default_factory=dict)
    log_tail: list[str] = dataclasses.field(default_factory=list)


class Ended(Exception):
    """A signal asked to stop."""


def chosen(parts: str) -> list[str]:
    """The parts to run, in order. Raises ConfigError."""
    wanted = {name.strip() for name in parts.split(",") if name.strip()}
    if not wanted or wanted - set(NAMES):
        raise ConfigError(f"--parts {parts}: choose from {','.join(NAMES)}")
    return [name for name in NAMES if name in wanted]


def read(arguments: Arguments, rest: list[str]) -> tuple[Config, list[str]]:
    """The config to check, and the flags of python -m speedyzero that make it. Raises ConfigError or EnvError."""
    for name in ("run-dir", "resume", "graph", "dry-run"):
        if given([word.replace("_", "-") for word in rest], name):
            raise ConfigError(f"--{name}: is set by the parts of a check; leave it out")
    if not 0 < arguments.budget < float("inf"):
        raise ConfigError(f"--budget {arguments.budget:g}: must be greater than 0")
    device = pick_device(arguments.device).type
    preset = arguments.preset or ("efficientzero" if device == "cuda" else "smoke")
    env = arguments.env or ("Pong-v5" if device == "cuda" else "Catch-v0")
    flags = ["--device", device, "--env", env, *rest]
    config, _ = read_config(preset, flags, "gpu_check")
    return config, ["--preset", preset, *flags]


def prepare(out: Path, config: Config, flags: list[str]) -> None:
    """Make the folder and leave the job there. Raises ConfigError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise ConfigError(f"OUT_DIR {out}: is not empty; give another folder")
        write_job(out, config, flags)
    except OSError as error:
        raise ConfigError(f"OUT_DIR {out}: cannot be written ({error.strerror}); give another folder") from None


def limit_of(parts: list[str], left: float) -> float:
    """Seconds for the first of `parts`, all of which share what is left."""
    return left * WEIGHTS[parts[0]] / sum(WEIGHTS[name] for name in parts)


def environment(part: str, device: str) -> dict[str, str]:
    """Of a part's process: this checkout first, and Triton's interpreter only for kernels without a GPU."""
    env = with_checkout() | {"PYTHONFAULTHANDLER": "1"}
    env.pop("TRITON_INTERPRET", None)
    return env | ({"TRITON_INTERPRET": "1"} if part == "parity" and device == "cpu" else {})


def run_part(part: str, out: Path, limit: float, device: str) -> Outcome:
    """Run a part to its end or to its limit; what it has written counts either way."""
    begin, ended = monotonic(), True
    command = [*PART, part, str(out), str(begin + ASKED_TO_END * limit)]
    with (out / f"{part}.log").open("w") as log:
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
    return outcome(part, out, monotonic() - begin, process.returncode if ended else None, late)


def outcome(part: str, out: Path, seconds: float, code: int | None, ended: str = "") -> Outcome:
    """What a part wrote, and why it failed if it did. `ended`: why the driver ended it, "" if it did not."""
    path, log = out / f"{part}.json", out / f"{part}.log"
    written = json.loads(path.read_text()) if path.exists() else {"lines": [], "failures": [], "results": {}}
    failures = written["failures"]
    if ended:
        failures.append(f"{part}: {ended}")
    elif code < 0:
        failures.append(f"{part}: was killed by {signal.Signals(-code).name}")
    elif code > 1 or (code == 1 and not failures):
        failures.append(f"{part}: exit code {code}")
    tail = log.read_text(errors="replace").splitlines()[-TAIL:] if failures and log.exists() else []
    status = "FAILED" if failures else "passed"
    return Outcome(part, status, seconds, code, failures, written["lines"], written["results"], tail)


def show(found: Outcome) -> None:
    """Print a part's block of the table."""
    lines = [f"{found.part:10s} {found.status:8s} {found.seconds:6.1f} s"]
    for line in found.lines:
        lines += textwrap.wrap(f"  {line}", WIDTH, subsequent_indent=6 * " ") or [""]
    lines += [f"  FAILED: {failure}" for failure in found.failures]
    if found.log_tail:
        lines.append(f"  log: {found.part}.log, which ends: {found.log_tail[-1].strip()[:200]}")
    print("\n".join(lines), end="\n\n", flush=True)


def check(out: Path, config: Config, flags: list[str], parts: list[str], budget: float) -> tuple[list[Outcome], signal.Signals | None]:
    """Run the parts, printing each as it ends; returns their outcomes and the signal that ended the check, if one did."""
    begin = part_begin = monotonic()
    found: list[Outcome] = []
    ended_by: signal.Signals | None = None

    def stop(number: int, _: object) -> None:
        nonlocal ended_by
        ended_by = signal.Signals(number)
        raise Ended

    def note(*outcomes: Outcome) -> None:
        """Add outcomes, and write everything to summary.json."""
        found.extend(outcomes)
        write_json(out / "summary.json", {
            "env": config.env, "preset": config.preset, "device": config.device, "flags": flags, "config": config.to_json(),
            "seconds": monotonic() - begin, "ended_by": ended_by.name if ended_by else None,
            "failed": [one.part for one in found if one.status == "FAILED"], "parts": {one.part: dataclasses.asdict(one) for one in found},
        })  # fmt: skip

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for at, part in enumerate(parts):
            part_begin = monotonic()
            limit = limit_of(parts[at:], budget - (part_begin - begin))
            print(f"{part} ... at most {limit:.0f} s", flush=True)
            note(run_part(part, out, limit, config.device))
            show(found[-1])
    except Ended:
        for part in parts[len(found) : len(found) + 1]:  # none, if the last one had just ended
            note(outcome(part, out, monotonic() - part_begin, None, f"ended by {ended_by.name}"))
            show(found[-1])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    note(*(Outcome(part) for part in parts[len(found):]))
    return found, ended_by


def main() -> None:
    begin = monotonic()
    arguments, rest = tyro.cli(Arguments, prog="gpu_check", return_unknown_args=True)
    out = arguments.out_dir.absolute()
    try:
        parts = chosen(arguments.parts)
        config, flags = read(arguments, rest)
        prepare(out, config, flags)
    except (ConfigError, EnvError) as error:
        sys.exit(f"error: {error}")
    print(f"{config.env}, preset {config.preset}, on {config.device}" + (", at toy size" if config.device == "cpu" else "")
          + f": {len(parts)} parts in at most {arguments.budget:.0f} s, results in {out}\n", flush=True)
    found, ended_by = check(out, config, flags, parts, arguments.budget - (monotonic() - begin))
    print(f"{len(parts)} parts in {monotonic() - begin:.0f} s: " + ", ".join(f"{one.part} {one.status}" for one in found))
    print("\n".join([*(f"  {failure}" for one in found for failure in one.failures), f"everything is in {out / 'summary.json'}"]))
    sys.exit(128 + ended_by if ended_by else sum(one.status == "FAILED" for one in found))


if __name__ == "__main__":
    main()
