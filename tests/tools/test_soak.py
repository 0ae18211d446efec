"""tools/faults/soak: figures of made-up samples by hand, which drift breaks which bound, and a short real run."""

import csv
import json
import subprocess
import sys

import pytest

from tests.conftest import TINY
from tools.faults import soak
from tools.faults.run import environment, rows_of, size_of


def samples(count: int = 101, **change) -> list[soak.Sample]:
    """An hour of a run that does not drift, one every 36 s; `change` maps a column to what is added to it, by the share of the hour."""
    made = []
    for number in range(count):
        part = number / (count - 1)
        fair = {
            "seconds": 3600 * part, "rss_mb": 700.0, "fds": 4, "threads": 7, "cpu_s": 40.0 * number, "iteration": 100 * number,
            "env_steps": 800 * number, "updates": 100 * number, "metrics_bytes": 18_000 * number, "tensorboard_bytes": 12_000 * number,
            "checkpoints_bytes": 6_000_000,
        }  # fmt: skip
        made.append(fair | {name: fair[name] + more(part) for name, more in change.items()})
    return made


def test_figures_of_made_up_samples_are_those_worked_out_by_hand():
    """Of samples 10 to 100: the fifths are 10 to 27 and 83 to 100."""
    found = soak.figures(samples(rss_mb=lambda part: 4 * part, fds=lambda part: 2 * (0.5 < part < 0.52)), 0, 5)
    assert found == pytest.approx({
        "hours": 0.9, "iterations": 9000, "rss_mb_per_hour": 4, "rss_mb_first": 700.74, "rss_mb_last": 703.66,
        "fds_first": 4, "fds_last": 4, "fds_least": 4, "fds_most": 6, "threads_least": 7, "threads_most": 7,
        "checkpoints_mb_first": 6, "checkpoints_mb_last": 6, "cpu_s_per_iteration_first": 0.4, "cpu_s_per_iteration_last": 0.4,
        "metrics_bytes_per_row_first": 900, "metrics_bytes_per_row_last": 900,
        "tensorboard_bytes_per_row_first": 600, "tensorboard_bytes_per_row_last": 600,
    })  # fmt: skip


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({}, []),
        ({"rss_mb": lambda part: 9 * part}, []),
        ({"rss_mb": lambda part: 11 * part}, ["memory, trend"]),
        ({"rss_mb": lambda part: 15 * (part > 0.8) - 60 * (0.5 < part < 0.75)}, ["memory, last fifth"]),
        ({"fds": lambda part: 3 * (int(100 * part) % 7 == 1)}, []),
        ({"fds": lambda part: int(part > 0.6)}, ["open files"]),
        ({"fds": lambda part: 5 * (0.4 < part < 0.42)}, ["open files"]),
        ({"threads": lambda part: int(0.4 < part < 0.42)}, ["threads"]),
        ({"cpu_s": lambda part: 400 * part**2}, ["CPU time of an iteration"]),
        ({"cpu_s": lambda part: -400 * part**2}, ["CPU time of an iteration"]),
    ],
)
def test_a_drift_breaks_its_bound_and_no_other(change, broken):
    assert [name for name, (kept, _) in soak.verdicts(soak.figures(samples(**change), 0, 5)).items() if not kept] == broken


def test_samples_count_once_the_ring_is_full_and_a_checkpoint_saved():
    assert soak.figures(samples(), 20_000, 5)["iterations"] == 7500
    late = samples(updates=lambda part: -100 * round(100 * part) + (part >= 0.4), checkpoints_bytes=lambda part: -6_000_000 * (part < 0.3))
    assert soak.figures(late, 0, 5)["iterations"] == 6000
    with pytest.raises(ValueError, match="9 samples after the warm-up, ten are needed"):
        soak.figures(samples(), 92 * 800, 5)


@pytest.mark.slow
def test_a_short_soak_samples_the_run_stops_it_and_judges(tmp_path):
    out = tmp_path / "out"
    kept = {name: value for name, value in TINY.items() if name not in ("env_steps", "eval_max_steps", "checkpoint_interval")}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in kept.items()]
    command = [
        sys.executable, "-m", "tools.faults.soak", "--preset", "smoke", "--env", "Catch-v0", *flags, "--checkpoint-interval=10",
        "--minutes", "0.25", "--every", "0.5", "--out", str(out),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    summary = json.loads((out / "summary.json").read_text())
    with open(out / "samples.csv") as file:
        last = {name: float(value) for name, value in list(csv.DictReader(file))[-1].items()}
    assert 100 < last["rss_mb"] < 2000
    assert 3 <= last["fds"] < 30
    assert last["cpu_s"] > 1
    rows, _ = rows_of((out / "run" / "metrics.jsonl").read_bytes())
    found = next(row for row in rows if row["iteration"] == last["iteration"])
    assert (found["env_steps"], found["updates"]) == (last["env_steps"], last["updates"])
    assert 0 < last["metrics_bytes"] <= size_of(out / "run" / "metrics.jsonl")
    # In so short a time memory and CPU time may look like anything, but files and threads may not.
    verdicts = {line[6:].partition(":")[0]: line.startswith("ok") for line in summary["verdicts"]}
    assert all(verdicts[name] for name in ("stopped by SIGTERM", "open files", "threads")), done.stdout + done.stderr
    assert summary["kept"] == all(verdicts.values()) == (done.returncode == 0)
