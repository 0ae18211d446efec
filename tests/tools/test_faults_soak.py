"""tools/faults/soak.py as a command: it samples a real run, stops it and judges, and fails where the run did not last."""

import csv
import json
import sys
from pathlib import Path

import pytest

from tests.conftest import TINY
from tests.tools.faults_support import SMALL, soak, tool
from tests.tools.faults_support import run as runs

NOT_SMALL = ("env_steps", "eval_max_steps", "checkpoint_interval")


def test_a_short_soak_samples_the_run_stops_it_and_judges(tmp_path):
    out = tmp_path / "out"
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items() if name not in NOT_SMALL]
    done = tool("soak", *SMALL, *flags, "--checkpoint-interval=10", "--minutes", "0.25", "--every", "0.5", "--out", str(out))
    summary = json.loads((out / "summary.json").read_text())
    assert summary["exit_code"] == 143, done.stdout + done.stderr
    assert "stopped by SIGTERM at iteration" in summary["last_line"]
    with open(out / "samples.csv") as file:
        sampled = list(csv.DictReader(file))
    assert len(sampled) == summary["samples"] > 20
    last = {name: float(value) for name, value in sampled[-1].items()}
    assert 100 < last["rss_mb"] < 2000
    assert 3 <= last["fds"] < 30
    assert 2 <= last["threads"] < 30
    assert 1 < last["cpu_s"] < 60
    # What the run itself wrote, of its last moments a little more.
    written, _ = runs.rows_of((out / "run" / "metrics.jsonl").read_bytes())
    found = next(row for row in written if row["iteration"] == last["iteration"])
    assert (found["env_steps"], found["updates"]) == (last["env_steps"], last["updates"])
    assert 0 < last["metrics_bytes"] <= runs.size_of(out / "run" / "metrics.jsonl")
    assert last["checkpoints_bytes"] > 1e5
    assert last["tensorboard_bytes"] > 1000
    # In so short a time memory and CPU time may look like anything: but files and threads do not.
    named = {line[6:].partition(":")[0]: line.startswith("ok") for line in summary["verdicts"]}
    assert named["stopped by SIGTERM"]
    assert named["open files"]
    assert named["threads"]
    assert summary["kept"] == all(named.values()) == (done.returncode == 0)


def test_a_soak_whose_run_ends_by_itself_fails_and_says_how(tmp_path):
    done = tool("soak", "--env", "NoSuch-v0", "--out", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "FAIL  stopped by SIGTERM: exit code 1 (143)" in done.stdout
    assert "FAIL  samples: " in done.stdout
    assert "--env NoSuch-v0" in json.loads((tmp_path / "out" / "summary.json").read_text())["last_line"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--out", "."], "error: --out .: File exists; give a folder that does not exist"),
        (["--out", "new", "--run-dir", "x"], "error: --run-dir: the run is a new one and goes to --out; leave it out"),
        (["--out", "new", "--minutes", "0"], "error: --minutes, --every: must be greater than 0"),
    ],
)
def test_the_soak_refuses_what_it_cannot_do(arguments, says, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(soak, "Run", None)  # what is refused starts nothing
    monkeypatch.setattr(sys, "argv", ["soak.py", *arguments])
    with pytest.raises(SystemExit) as left:
        soak.main()
    assert left.value.code == says
    assert not Path("new").exists()
