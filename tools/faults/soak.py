"""Watch a long run from outside: does it leak memory, files or threads, and does an iteration cost the same at its end?

    python -m tools.faults.soak --minutes 60 --env Pong-v5 --out soak

Samples the process every --every seconds, stops it by SIGTERM after --minutes, and writes samples.csv, summary.json and the run itself to
--out. Drift counts once the ring is full, since its memory is touched as it fills: hence the small default of --ring-positions.
Takes the flags of `python -m speedyzero`. Exits with 1 if a bound of trend.py is broken or the run ended in another way.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import tyro

from tools.faults.run import Run, given, rows_of, size_of
from tools.faults.trend import MB, Sample, figures, settled, verdicts, write_csv

DEFAULTS = {"env-steps": "10000000", "ring-positions": "2000", "log-interval": "5", "checkpoint-interval": "250", "device": "cpu"}
"""Flags of the run unless others are given: it must not end by itself, and its ring fill early."""
START_S, STOP_S = 300.0, 60.0
"""Longest time to the first row, and to save and end after SIGTERM."""
NO_ROW = {"iteration": 0, "env_steps": 0, "updates": 0}


@dataclass
class Arguments:
    """Watch a long run from outside. Takes the flags of `python -m speedyzero` as well."""

    out: Path
    """Folder for samples.csv, summary.json and the run; must not exist."""
    minutes: float = 60.0
    """How long the run goes on after its first row."""
    every: float = 10.0
    """Seconds between two samples."""
    env: str = "Pong-v5"
    """Environment."""
    preset: str = "cpu"
    """Preset of the run."""


def look(run: Run, run_dir: Path) -> Sample | None:
    """A sample of a run; None if it ended."""
    here, metrics = Path(f"/proc/{run.process.pid}"), run_dir / "metrics.jsonl"
    try:
        status = dict(line.split(":", 1) for line in (here / "status").read_text().splitlines())
        times = (here / "stat").read_text().rpartition(")")[2].split()
        fds = len(os.listdir(here / "fd"))
    except OSError:
        return None
    if "VmRSS" not in status:  # a zombie: it ended, and nobody has waited for it yet
        return None
    rows, _ = rows_of(metrics.read_bytes() if metrics.exists() else b"")
    row = rows[-1] if rows else NO_ROW
    return Sample(
        seconds=round(monotonic() - run.started, 2),
        rss_mb=int(status["VmRSS"].split()[0]) * 1024 / MB,
        fds=fds,
        threads=int(status["Threads"]),
        cpu_s=(int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK"),
        **{name: row[name] for name in NO_ROW},
        metrics_bytes=size_of(metrics),
        tensorboard_bytes=size_of(run_dir / "tensorboard"),
        checkpoints_bytes=size_of(run_dir / "checkpoints"),
    )


def watch(run: Run, run_dir: Path, seconds: float, every: float, path: Path) -> list[Sample]:
    """Samples of a run until `seconds` after its first row or until it ends; also written to `path`."""
    samples: list[Sample] = []
    end = None
    while (left := (end or run.started + START_S) - monotonic()) > 0:
        try:
            run.process.wait(min(every, left))
            break
        except subprocess.TimeoutExpired:
            pass
        if sample := look(run, run_dir):
            samples.append(sample)
            write_csv(path, samples)
            if end is None and sample.iteration > 0:
                end = monotonic() + seconds
    return samples


def main() -> None:
    arguments, rest = tyro.cli(Arguments, prog="soak", return_unknown_args=True)
    if given(rest, "run-dir") or given(rest, "resume"):
        sys.exit("error: --run-dir: the run is a new one and goes to --out; leave it out")
    if arguments.minutes <= 0 or arguments.every <= 0:
        sys.exit("error: --minutes, --every: must be greater than 0")
    out = arguments.out.resolve()
    try:
        out.mkdir(parents=True)
    except OSError as error:
        sys.exit(f"error: --out {arguments.out}: {error.strerror}; give a folder that does not exist")
    run_dir = out / "run"
    flags = ["--env", arguments.env, "--preset", arguments.preset, "--run-dir", str(run_dir), *rest]
    flags += [word for name, value in DEFAULTS.items() if not given(rest, name) for word in (f"--{name}", value)]
    print("python -m speedyzero " + " ".join(flags), flush=True)
    run, found = Run(flags, out / "output.txt"), {}
    try:
        samples = watch(run, run_dir, 60 * arguments.minutes, arguments.every, out / "samples.csv")
        asked, begin = run.process.poll() is None, monotonic()
        if asked:
            run.process.send_signal(signal.SIGTERM)
            run.process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        pass  # its exit code will be that of a SIGKILL
    finally:
        run.end()
    code, stop_s = run.process.returncode, monotonic() - begin
    kept = asked and code == 128 + signal.SIGTERM
    lines = [f"{'ok  ' if kept else 'FAIL'}  stopped by SIGTERM: exit code {code} (143) after {stop_s:.1f} s: {run.last_line()}"]
    try:
        config = json.loads((run_dir / "config.json").read_text())
        found = figures(settled(samples, config["ring_positions"]), config["log_interval"])
    except (OSError, ValueError) as error:
        lines.append(f"FAIL  samples: {error}")
        kept = False
    else:
        judged = verdicts(found)
        kept = kept and all(verdict.kept for verdict in judged)
        lines += map(str, judged)
    print("\n".join([*(f"{name}: {value:.4g}" for name, value in found.items()), *lines]))
    summary = {"flags": flags, "samples": len(samples), "exit_code": code, "stop_s": stop_s, "last_line": run.last_line()}
    (out / "summary.json").write_text(json.dumps(summary | {"figures": found, "kept": kept, "verdicts": lines}, indent=1) + "\n")
    sys.exit(0 if kept else 1)


if __name__ == "__main__":
    main()
