"""Watch a long run from outside: does it leak memory, files or threads, and does an iteration cost the same at its end?

    python -m tools.faults.soak --minutes 60 --env Pong-v5 --out soak

Samples the process every --every seconds, stops it by SIGTERM after --minutes, and writes samples.csv, summary.json and the run itself to
--out. Drift counts once the ring is full, since its memory is touched as it fills: hence the small default of --ring-positions.
Takes the flags of `python -m speedyzero`. Exits with 1 if a bound below is broken or the run ended in another way.
"""

import csv
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import numpy as np
import tyro

from speedyzero.run.files import write_json
from tools.faults.run import Run, given, rows_of, size_of, with_defaults

DEFAULTS = {
    "env": "Pong-v5", "preset": "cpu", "env-steps": 10_000_000, "ring-positions": 2000, "log-interval": 5, "checkpoint-interval": 250,
    "device": "cpu",
}  # fmt: skip
"""Flags of the run unless others are given: it must not end by itself, and its ring fill early."""
START_S, STOP_S = 300.0, 60.0
"""Longest time to the first row, and to save and end after SIGTERM."""
MB = 1e6
RSS_MB_PER_HOUR = 10.0
"""Trend of the resident memory that counts as a leak."""
RSS_GROWTH = 1.02
"""Most resident memory at the end, relative to that at the beginning."""
TIME_GROWTH = 1.10
"""Most change of the CPU time of an iteration between beginning and end, either way."""
WRITING = 4
"""Files that may be open for a moment while something is written: a checkpoint, its folder, a row of metrics, an event."""

Sample = dict[str, float]
"""One look at a run from outside: `seconds` since its start, `cpu_s` of all threads so far, and what else `look` names."""


@dataclass
class Arguments:
    """Watch a long run from outside. Takes the flags of `python -m speedyzero` as well."""

    out: Path
    """Folder for samples.csv, summary.json and the run; must not exist."""
    minutes: float = 60.0
    """How long the run goes on after its first row."""
    every: float = 10.0
    """Seconds between two samples."""


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
    return {
        "seconds": round(monotonic() - run.started, 2), "rss_mb": int(status["VmRSS"].split()[0]) * 1024 / MB, "fds": fds,
        "threads": int(status["Threads"]), "cpu_s": (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK"),
        **{name: rows[-1][name] if rows else 0 for name in ("iteration", "env_steps", "updates")},
        "metrics_bytes": size_of(metrics), "tensorboard_bytes": size_of(run_dir / "tensorboard"),
        "checkpoints_bytes": size_of(run_dir / "checkpoints"),
    }  # fmt: skip


def watch(run: Run, run_dir: Path, seconds: float, every: float, path: Path) -> list[Sample]:
    """Samples of a run until `seconds` after its first row or until it ends; also written to `path`."""
    samples: list[Sample] = []
    end = None
    with open(path, "w", newline="", buffering=1) as file:
        while (left := (end or run.started + START_S) - monotonic()) > 0:
            try:
                run.process.wait(min(every, left))
                break
            except subprocess.TimeoutExpired:
                pass
            if sample := look(run, run_dir):
                writer = csv.DictWriter(file, sample)
                if not samples:
                    writer.writeheader()
                writer.writerow(sample)
                samples.append(sample)
                if end is None and sample["iteration"] > 0:
                    end = monotonic() + seconds
    return samples


def figures(samples: list[Sample], ring: int, log_interval: int) -> dict[str, float]:
    """Numbers for the verdicts, `first` and `last` being fifths of the samples after the warm-up: the first tenth of the time, until the
    ring of that many positions is full and a checkpoint is saved. log_interval: iterations a row.

    Raises:
        ValueError: too few samples.
    """
    warm = 0.1 * samples[-1]["seconds"] if samples else 0.0
    samples = [
        one for one in samples
        if one["seconds"] >= warm and one["env_steps"] >= ring and one["updates"] > 0 and one["checkpoints_bytes"] > 0
    ]  # fmt: skip
    if len(samples) < 10:
        raise ValueError(f"{len(samples)} samples after the warm-up, ten are needed; run longer, or give a smaller --ring-positions")
    of, fifth = {name: np.array([one[name] for one in samples], float) for name in samples[0]}, len(samples) // 5
    hours = of["seconds"] / 3600
    found = {"hours": np.ptp(hours), "iterations": np.ptp(of["iteration"]), "rss_mb_per_hour": np.polyfit(hours, of["rss_mb"], 1)[0]}
    for name in ("fds", "threads"):
        found |= {f"{name}_least": of[name].min(), f"{name}_most": of[name].max()}
    for name, part in (("first", slice(None, fifth)), ("last", slice(-fifth, None))):
        steps = max(1, np.ptp(of["iteration"][part]))
        found |= {
            f"rss_mb_{name}": np.median(of["rss_mb"][part]), f"fds_{name}": of["fds"][part].min(),
            f"checkpoints_mb_{name}": np.median(of["checkpoints_bytes"][part]) / MB,
            f"cpu_s_per_iteration_{name}": np.ptp(of["cpu_s"][part]) / steps,
            f"metrics_bytes_per_row_{name}": np.ptp(of["metrics_bytes"][part]) / steps * log_interval,
            f"tensorboard_bytes_per_row_{name}": np.ptp(of["tensorboard_bytes"][part]) / steps * log_interval,
        }  # fmt: skip
    return {name: float(value) for name, value in found.items()}


def verdicts(found: dict[str, float]) -> dict[str, tuple[bool, str]]:
    """Each bound: whether the figures keep it, and what they are."""
    trend, begin, end = found["rss_mb_per_hour"], found["rss_mb_first"], found["rss_mb_last"]
    fds, threads = ([found[f"{name}_{part}"] for part in ("least", "most")] for name in ("fds", "threads"))
    first, last = found["cpu_s_per_iteration_first"], found["cpu_s_per_iteration_last"]
    return {
        "memory, trend": (trend < RSS_MB_PER_HOUR, f"{trend:+.1f} MB/h (below {RSS_MB_PER_HOUR:g})"),
        "memory, last fifth": (end <= RSS_GROWTH * begin, f"{end:.1f} MB after {begin:.1f} (at most {RSS_GROWTH:g} times)"),
        # A sample may see the file of a write: only a leak raises the least for good.
        "open files": (found["fds_first"] == found["fds_last"] and fds[1] <= fds[0] + WRITING,
                       f"least {found['fds_first']:g} in the first fifth, {found['fds_last']:g} in the last, most {fds[1]:g}"),
        "threads": (threads[0] == threads[1], f"{threads[0]:g} to {threads[1]:g} (constant)"),
        "CPU time of an iteration": (first <= TIME_GROWTH * last and last <= TIME_GROWTH * first,
                                     f"{last * 1e3:.1f} ms in the last fifth, {first * 1e3:.1f} in the first"),
    }  # fmt: skip


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
    flags = with_defaults(["--run-dir", str(out / "run"), *rest], DEFAULTS)
    print("python -m speedyzero " + " ".join(flags), flush=True)
    run, found = Run(flags, out / "output.txt"), {}
    try:
        samples = watch(run, out / "run", 60 * arguments.minutes, arguments.every, out / "samples.csv")
        asked, begin = run.process.poll() is None, monotonic()
        if asked:
            run.process.send_signal(signal.SIGTERM)
            run.process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        pass  # its exit code will be that of a SIGKILL
    finally:
        run.end()
    code = run.process.returncode
    stopped = f"exit code {code} (143) after {monotonic() - begin:.1f} s: {run.last_line()}"
    judged = {"stopped by SIGTERM": (asked and code == 128 + signal.SIGTERM, stopped)}
    try:
        config = json.loads((out / "run" / "config.json").read_text())
        found = figures(samples, config["ring_positions"], config["log_interval"])
        judged |= verdicts(found)
    except (OSError, ValueError) as error:
        judged["samples"] = False, str(error)
    lines = [f"{'ok  ' if fine else 'FAIL'}  {name}: {text}" for name, (fine, text) in judged.items()]
    print("\n".join([*(f"{name}: {value:.4g}" for name, value in found.items()), *lines]))
    kept = all(fine for fine, _ in judged.values())
    write_json(out / "summary.json", {"flags": flags, "samples": len(samples), "figures": found, "kept": kept, "verdicts": lines})
    sys.exit(0 if kept else 1)


if __name__ == "__main__":
    main()
