"""A long run watched from outside: does it leak memory, files or threads, and does an iteration cost the same at its end?

    python tools/faults/soak.py --minutes 60 --env Pong-v5 --out soak

Samples the process every --every seconds, stops it by SIGTERM after --minutes, and writes samples.csv, summary.json and the run itself to
--out. Drift is counted once the ring is full, since its memory is touched as it fills: hence the small --ring-positions unless another is
given. Takes the flags of `python -m speedyzero`. Exits with 1 if a bound of drift.py is broken or the run ended otherwise than asked.
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

sys.path.insert(0, str(Path(__file__).parent))
from drift import MB, Sample, figures, settled, verdicts, write_csv
from run import Run, given, rows_of, size_of

DEFAULTS = {"env-steps": "10000000", "ring-positions": "2000", "log-interval": "5", "checkpoint-interval": "250", "device": "cpu"}
"""Flags of the run unless others are given: it must not end by itself, and its ring be full early."""

START_S = 300.0
"""How long the run may take to its first row."""
PATIENCE_S = 60.0
"""How long the run may take to save and end after SIGTERM."""


@dataclass
class Arguments:
    """A long run watched from outside. Takes the flags of `python -m speedyzero` as well."""

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


def last_row(path: Path) -> dict:
    """The last whole row of a metrics.jsonl; counts of 0 if there is none yet."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 65_536))
            text = file.read()
    except OSError:
        text = b""
    # The first line may begin in the middle, and then is no row.
    rows, _ = rows_of(text)
    return rows[-1] if rows else {"iteration": 0, "env_steps": 0, "updates": 0}


def look(run: Run, run_dir: Path) -> Sample | None:
    """A sample of a run; None if it ended."""
    here = Path(f"/proc/{run.process.pid}")
    try:
        status = dict(line.split(":", 1) for line in (here / "status").read_text().splitlines())
        times = (here / "stat").read_text().rpartition(")")[2].split()
        fds = len(os.listdir(here / "fd"))
    except OSError:
        return None
    if "VmRSS" not in status:  # it ended, and we have not asked how
        return None
    row = last_row(run_dir / "metrics.jsonl")
    return Sample(
        seconds=round(monotonic() - run.started, 2),
        rss_mb=int(status["VmRSS"].split()[0]) * 1024 / MB,
        fds=fds,
        threads=int(status["Threads"]),
        cpu_s=(int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK"),
        iteration=row["iteration"],
        env_steps=row["env_steps"],
        updates=row["updates"],
        metrics_bytes=size_of(run_dir / "metrics.jsonl"),
        tensorboard_bytes=size_of(run_dir / "tensorboard"),
        checkpoints_bytes=size_of(run_dir / "checkpoints"),
    )


def watch(run: Run, run_dir: Path, seconds: float, every: float, path: Path) -> list[Sample]:
    """Samples of a run until so many seconds after its first row or until it ends; written to `path` as they come."""
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


def stop(run: Run) -> tuple[int | None, float]:
    """Ask a run to end; its exit code, None if it had to be killed, and the seconds that it took."""
    begin = monotonic()
    run.process.send_signal(signal.SIGTERM)
    try:
        return run.process.wait(PATIENCE_S), monotonic() - begin
    except subprocess.TimeoutExpired:
        return None, monotonic() - begin


def main() -> None:
    arguments, rest = tyro.cli(Arguments, prog="soak.py", return_unknown_args=True)
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
    for name, value in DEFAULTS.items():
        if not given(rest, name):
            flags += [f"--{name}", value]
    print("python -m speedyzero " + " ".join(flags), flush=True)
    run = Run(flags, out / "output.txt")
    try:
        samples = watch(run, run_dir, 60 * arguments.minutes, arguments.every, out / "samples.csv")
        ended_early = run.process.poll() is not None
        code, stopping = (run.process.returncode, 0.0) if ended_early else stop(run)
    finally:
        run.end()
    summary = {"flags": flags, "samples": len(samples), "exit_code": code, "stop_s": stopping, "last_line": run.last_line()}
    lines, kept = [], code == 128 + signal.SIGTERM and not ended_early
    lines.append(f"{'ok  ' if kept else 'FAIL'}  stopped by SIGTERM: exit code {code} (143) after {stopping:.1f} s: {run.last_line()}")
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
        summary |= {"figures": found}
        print(f"{found['hours'] * 60:.0f} minutes, {found['iterations']:.0f} iterations after the warm-up")
        for name in ("metrics_bytes_per_row", "tensorboard_bytes_per_row", "checkpoints_mb"):
            print(f"{name}: {found[name + '_first']:.1f} in the first fifth, {found[name + '_last']:.1f} in the last")
    summary |= {"kept": kept, "verdicts": lines}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print("\n".join(lines))
    sys.exit(0 if kept else 1)


if __name__ == "__main__":
    main()
