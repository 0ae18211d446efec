"""status.json of prove.sh: how a call stands or ended, how far the run is, and what the GPU said meanwhile.

Exits with 0 if the trainer did as it should, else with the trainer's code and one line.
"""

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# This checkout and no other, whatever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))

import tyro
from recorded import COUNTS, RunError, read

GPU = (
    "name", "driver", "memory_total_mib", "memory_used_mib", "utilisation_percent", "sm_clock_mhz", "sm_clock_max_mhz", "power_w",
    "power_limit_w", "temperature_c",
)  # fmt: skip
"""What prove.sh asks nvidia-smi for, in its order."""
COMPLETE, STOPPED, KILLED = 0, 138, 137


@dataclass
class Arguments:
    """Write OUT_DIR/status.json."""

    out_dir: tyro.conf.Positional[Path]
    run_dir: tyro.conf.Positional[Path]
    limit: int
    """Seconds that the whole call may take."""
    gpu_at_start: str = ""
    """A line of nvidia-smi; empty where there is none."""
    gpu: str = ""
    """The newest such line."""
    exit_code: int | None = None
    """Of the trainer; without it, it runs."""
    seconds: int | None = None
    """From the trainer's start to its exit."""


def gpu_facts(line: str) -> dict[str, Any] | None:
    """A line of nvidia-smi by the names of GPU; numbers where they are, None for what the driver does not tell."""
    values = [value.strip() for value in line.split(",")]
    if len(values) != len(GPU):
        return None
    facts: dict[str, Any] = dict(zip(GPU, values, strict=True))
    for name in GPU[2:]:
        try:
            facts[name] = float(facts[name])
        except ValueError:
            facts[name] = None
    return facts


def counts(run_dir: Path) -> dict[str, int]:
    """How far --resume would go on from: the counts of the newest checkpoint; 0 where there is none."""
    if not any((run_dir / "checkpoints").glob("checkpoint_*.safetensors")):
        return dict.fromkeys(COUNTS, 0)
    from speedyzero.run import checkpoint  # late: PyTorch takes seconds

    meta = checkpoint.read_meta(checkpoint.latest(run_dir / "checkpoints"))
    return {"iteration": meta["iterations"], "env_steps": meta["env_steps"], "updates": meta["updates"]}


def how(exit_code: int | None, log: str) -> str:
    """How a call ended, in a word or two. SIGUSR1 gives 138 also where nobody was there yet to heed it: the log tells."""
    if exit_code is None:
        return "running"
    if exit_code == STOPPED:
        return "stopped" if re.search(r"^stopped by SIGUSR1", log, re.MULTILINE) else "stopped too early"
    return {COMPLETE: "complete", KILLED: "killed"}.get(exit_code, "failed")


def status(arguments: Arguments, command: list[str]) -> dict[str, Any]:
    """What status.json holds. Raises CheckpointError: the newest checkpoint is damaged."""
    log = (arguments.out_dir / "log.txt").read_text(errors="replace")
    resumed = re.search(r"^resumed .* at iteration (\d+):", log, re.MULTILINE)
    lines = log.strip().splitlines()
    try:
        config = read(arguments.out_dir).config
    except RunError:  # nothing to report yet
        config = {}
    at_start, newest = gpu_facts(arguments.gpu_at_start), gpu_facts(arguments.gpu)
    return {
        "ended": how(arguments.exit_code, log),
        "complete": (arguments.run_dir / "summary.json").exists(),
        "exit_code": arguments.exit_code,
        "seconds": arguments.seconds,
        "limit_s": arguments.limit,
        "resumed_from": int(resumed[1]) if resumed else None,
        **(dict.fromkeys(COUNTS) if arguments.exit_code is None else counts(arguments.run_dir)),
        "run_dir": str(arguments.run_dir),
        "command": command,
        "last_line": lines[-1] if lines else None,
        "gpu": at_start["name"] if at_start and config.get("device") == "cuda" else None,
        "nvidia_smi": {"at_start": at_start, "newest": newest},
    }


def main() -> None:
    split = sys.argv.index("--")
    arguments = tyro.cli(Arguments, prog="prove_status.py", args=sys.argv[1:split])
    found = status(arguments, sys.argv[split + 1 :])
    aside = arguments.out_dir / "status.json.tmp"
    aside.write_text(json.dumps(found, indent=2) + "\n")
    os.replace(aside, arguments.out_dir / "status.json")
    code, ended = arguments.exit_code, found["ended"]
    if ended in ("running", "complete", "stopped"):
        if code is not None:
            reached = f"{found['env_steps']} environment steps and {found['updates']} updates"
            print(f"{ended} at {reached}" + ("; the same command goes on" if ended == "stopped" else ""))
        return
    why = {
        "stopped too early": "the time was over before the trainer had begun; give more SECONDS",
        "killed": "the trainer was killed, and goes on from its last checkpoint; should it have been saving, give more --margin",
    }.get(ended, f"the trainer ended with exit code {code}: {found['last_line']}")
    print(f"error: {why} (see {arguments.out_dir / 'log.txt'})", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
