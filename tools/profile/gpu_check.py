"""All that only a GPU can tell of the trainer, in one command and under ten minutes.

    python tools/profile/gpu_check.py OUT_DIR                                   # Pong-v5, preset efficientzero, on the CUDA device
    python tools/profile/gpu_check.py OUT_DIR --preset speedyzero --lanes 64    # any flag of python -m speedyzero
    python tools/profile/gpu_check.py OUT_DIR --parts facts,speed --budget 300
    python tools/profile/gpu_check.py OUT_DIR --device cpu                      # the same path at toy size, in a minute or two

    facts      the machine, the versions, and the ceilings that every floor is taken from
    parity     every kernel against its reference at the sizes of the run
    capture    captured iterations against uncaptured ones, every tensor of the state
    speed      ms of every phase and R, the projected time of the recipe, stages against their floors, memory
    idle       the device's idle share of replayed iterations, launches beside the graphs
    emulators  what a turn costs, and how much of it is hidden
    train      a run from the command line, stopped, resumed, ended

checks/ has a file for each. A part is a process of its own with a share of the time, so that a crash, a lost device or a hang takes down
that part alone; what a part does not use is the later parts'. OUT_DIR gets PART.json as soon as there is anything to say, PART.log, and
summary.json with everything; trace.json.gz and replay.json.gz are Chrome traces, stages.json is for roofline.py --measured, run/ is the
training run. It must not hold another check's files. The exit code is the number of parts that failed, 130 or 143 if a signal ended it.

tools/profile/kernels_gpu.sh is the other command for a GPU: it runs the test suite of the kernels natively, many shapes and edge cases,
with the benchmark against PyTorch's own operations. This one looks at the trainer, and at kernels only as it uses them. No package needs
to be installed from here, and nothing needs a network.
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

# This checkout and no other, whatever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))

import tyro
from checks import NAMES
from checks.job import JOB, write_job
from roofline import read_config

from speedyzero.config import Config, ConfigError, pick_device
from speedyzero.envs import EnvError
from speedyzero.run.files import write_json

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PART = HERE / "gpu_check_part.py"
WEIGHTS = {"facts": 25, "parity": 75, "capture": 75, "speed": 185, "idle": 60, "emulators": 65, "train": 95}
"""How the budget is split: a part gets its share of what is left, among the parts that are still to come."""
ASKED_TO_END = 0.8
"""Share of a part's time after which it should have all it needs; the rest is for starting, writing, and a last step that takes long."""
STACK_S = 0.5
"""Seconds in which a part that is about to be ended writes where it is."""
KILLED_S = 10.0
"""Seconds in which a killed process must be gone."""
MOST_FAILURES = 100
"""Greatest exit code for failures: those from 126 on belong to the shell and to signals."""
WIDTH = 120
"""Of the table; the rows of the parts' own tables stay below it."""
TAIL = 15
"""Lines of a failed part's log in the summary; the last of them in the table."""
TAKEN = {
    "run_dir": "runs go to OUT_DIR/run", "resume": "a check starts anew", "graph": "parts run with and without", "dry_run": "parts do run",
}  # fmt: skip
"""Flags of python -m speedyzero that are not for the user of a check to set, and why."""


@dataclass
class Arguments:
    """Check on a GPU what a CPU cannot. Takes the flags of `python -m speedyzero` as well."""

    out_dir: Annotated[Path, tyro.conf.Positional]
    """Folder for all that is written; made if it is not there."""
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
    """What became of a part."""

    part: str
    status: str
    """"passed", "FAILED", or "not run"."""
    seconds: float
    exit_code: int | None
    failures: list[str]
    lines: list[str]
    results: dict
    log_tail: list[str]


def chosen(parts: str) -> list[str]:
    """The parts to run, in order. Raises ConfigError."""
    wanted = [name.strip() for name in parts.split(",") if name.strip()]
    for name in wanted:
        if name not in NAMES:
            raise ConfigError(f"--parts {parts}: there is no part {name!r}; choose from {','.join(NAMES)}")
    if not wanted:
        raise ConfigError(f"--parts {parts!r}: names no part; choose from {','.join(NAMES)}")
    return [name for name in NAMES if name in wanted]


def read(arguments: Arguments, rest: list[str]) -> tuple[Config, list[str]]:
    """The config to check, and the flags of python -m speedyzero that make it. Raises ConfigError or EnvError."""
    for argument in rest:
        name = argument.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
        if argument.startswith("--") and name in TAKEN:
            raise ConfigError(f"{argument.partition('=')[0]}: is not for a check ({TAKEN[name]}); leave it out")
    if not 0 < arguments.budget < float("inf"):
        raise ConfigError(f"--budget {arguments.budget:g}: must be greater than 0")
    device = pick_device(arguments.device).type
    preset = arguments.preset or ("efficientzero" if device == "cuda" else "smoke")
    env = arguments.env or ("Pong-v5" if device == "cuda" else "Catch-v0")
    flags = ["--device", device, "--env", env, *rest]
    config, _ = read_config(preset, flags, "gpu_check.py")
    return config, ["--preset", preset, *flags]


def prepare(out: Path, config: Config, flags: list[str]) -> None:
    """Make the folder and leave the job there. Raises ConfigError."""
    written = {JOB, "summary.json", "stages.json", "run", *(f"{name}.{kind}" for name in NAMES for kind in ("json", "log"))}
    try:
        out.mkdir(parents=True, exist_ok=True)
        if found := sorted(written & {path.name for path in out.iterdir()}):
            raise ConfigError(f"OUT_DIR {out}: holds the results of another check ({found[0]}); give another folder")
        write_job(out, config, flags)
    except OSError as error:
        raise ConfigError(f"OUT_DIR {out}: cannot be written ({error.strerror}); give another folder") from None


def limits(parts: list[str], left: float) -> float:
    """Seconds for the first of `parts`, all of which share what is left."""
    return left * WEIGHTS[parts[0]] / sum(WEIGHTS[name] for name in parts)


def environment(part: str, device: str) -> dict[str, str]:
    """Of a part's process: this checkout first, and Triton's interpreter where kernels are to run without a GPU, and only there."""
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONFAULTHANDLER": "1"}
    env.pop("TRITON_INTERPRET", None)
    return env | ({"TRITON_INTERPRET": "1"} if part == "parity" and device == "cpu" else {})


def kill(process: subprocess.Popen) -> None:
    """End a part and the processes it started: they are a session of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(KILLED_S)  # one that a driver holds on to may outlive even that, and must not hold up the others


def run_part(part: str, out: Path, limit: float, device: str) -> Outcome:
    """Run a part to its end or to its limit; what it has written counts either way."""
    begin = monotonic()
    command = [sys.executable, str(PART), part, str(out), str(begin + ASKED_TO_END * limit)]
    with (out / f"{part}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment(part, device), start_new_session=True)
        ended = True
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            ended = False
            process.send_signal(signal.SIGUSR2)  # its stack goes to the log
            sleep(STACK_S)
        finally:
            kill(process)  # a part that ended may have left a process of its own behind
    return outcome(part, out, monotonic() - begin, process.returncode if ended else None, limit)


def outcome(part: str, out: Path, seconds: float, code: int | None, limit: float) -> Outcome:
    """What a part left behind, and why it failed if it did; `code` is None for one that had to be ended."""
    path = out / f"{part}.json"
    written = json.loads(path.read_text()) if path.exists() else {"lines": [], "failures": [], "results": {}}
    failures = written["failures"]
    log = out / f"{part}.log"
    tail = log.read_text(errors="replace").splitlines()[-TAIL:] if log.exists() else []
    if code is None:
        failures.append(f"{part}: was ended after {limit:.0f} s, its share of the budget")
    elif code < 0:
        failures.append(f"{part}: was killed by {signal.Signals(-code).name}")
    elif code > 1 or (code == 1 and not failures):
        failures.append(f"{part}: exit code {code}")
    status = "FAILED" if failures else "passed"
    return Outcome(part, status, seconds, code, failures, written["lines"], written["results"], tail if failures else [])


def block(found: Outcome) -> list[str]:
    """A part in the table."""
    lines = [f"{found.part:10s} {found.status:8s} {found.seconds:6.1f} s"]
    for line in found.lines:
        # A table is narrower: only prose is wrapped.
        lines += textwrap.wrap(f"  {line}", WIDTH, subsequent_indent=6 * " ") if len(line) > WIDTH - 2 else [f"  {line}".rstrip()]
    for failure in found.failures:
        lines.append(f"  FAILED: {failure}")
    if found.log_tail:
        lines.append(f"  log: {found.part}.log, which ends: {found.log_tail[-1].strip()[:200]}")
    return [*lines, ""]


def summary(out: Path, config: Config, flags: list[str], found: list[Outcome], seconds: float, ended_by: str | None) -> None:
    """Write summary.json: everything, as far as it has come."""
    write_json(out / "summary.json", {
        "env": config.env, "preset": config.preset, "device": config.device, "flags": flags, "config": config.to_json(), "seconds": seconds,
        "ended_by": ended_by, "failed": [one.part for one in found if one.status == "FAILED"],
        "parts": {one.part: dataclasses.asdict(one) for one in found},
    })  # fmt: skip


class Ended(Exception):
    """A signal asked to stop."""


def check(out: Path, config: Config, flags: list[str], parts: list[str], budget: float) -> tuple[list[Outcome], signal.Signals | None]:
    """Run the parts, printing each as it ends; returns what became of them and the signal that ended it, if one did."""
    begin = part_begin = monotonic()
    found: list[Outcome] = []
    ended_by: signal.Signals | None = None

    def stop(number: int, _: object) -> None:
        nonlocal ended_by
        ended_by = signal.Signals(number)
        raise Ended

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for at, part in enumerate(parts):
            part_begin = monotonic()
            limit = limits(parts[at:], budget - (part_begin - begin))
            print(f"{part} ... at most {limit:.0f} s", flush=True)
            found.append(run_part(part, out, limit, config.device))
            summary(out, config, flags, found, monotonic() - begin, None)
            print("\n".join(block(found[-1])), flush=True)
    except Ended:
        for part in parts[len(found) : len(found) + 1]:  # none, if the last one had just ended
            found.append(outcome(part, out, monotonic() - part_begin, None, 0.0))
            found[-1].failures[-1] = f"{part}: ended by {ended_by.name}"
            print("\n".join(block(found[-1])), flush=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    found += [Outcome(part, "not run", 0.0, None, [], [], {}, []) for part in parts[len(found):]]
    summary(out, config, flags, found, monotonic() - begin, ended_by.name if ended_by else None)
    return found, ended_by


def main() -> None:
    begin = monotonic()
    arguments, rest = tyro.cli(Arguments, prog="gpu_check.py", return_unknown_args=True)
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
    failed = sum(one.status == "FAILED" for one in found)
    print(f"{len(parts)} parts in {monotonic() - begin:.0f} s: " + ", ".join(f"{one.part} {one.status}" for one in found))
    for one in found:
        for failure in one.failures:
            print(f"  {failure}")
    print(f"everything is in {out / 'summary.json'}")
    sys.exit(128 + ended_by if ended_by else min(failed, MOST_FAILURES))


if __name__ == "__main__":
    main()
