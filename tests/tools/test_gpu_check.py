"""tools/profile/gpu_check: the complete path at toy size on a CPU, its arithmetic by hand, and a driver that outlives its parts."""

import fcntl
import json
import math
import os
import random
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from speedyzero import ring as replay
from speedyzero.config import ConfigError
from speedyzero.envs import describe
from speedyzero.stages import PARTS, STAGES
from speedyzero_kernels import dispatch, support
from tools.faults.run import environment
from tools.profile import gpu_check
from tools.profile.bring_home import archive
from tools.profile.checks import NAMES, capture, idle, overlap, parity, speed, train, trainers
from tools.profile.checks.compare import Deviation, deviation
from tools.profile.checks.job import Job, Record
from tools.profile.operations import MAKERS

TINY = [
    "--channels", "4", "--stem-channels", "4", "--head-channels", "2", "--head-hidden", "8", "--lstm", "8", "--support", "5",
    "--projection", "8", "--unroll", "2", "--n-step", "2", "--simulations", "3", "--batch-size", "4", "--refresh-roots", "16",
    "--lanes", "4",
]  # fmt: skip


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """All parts on a CPU: the output, the folder, and the summary. Done once, by whichever of xdist's workers comes first."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "gpu_check"
    folder.mkdir(exist_ok=True)
    out, printed = folder / "new" / "out", folder / "printed"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.exists():
            # More time than it takes: other work on the machine must not matter.
            command = [sys.executable, "-m", "tools.profile.gpu_check", str(out), "--device", "cpu", *TINY, "--budget", "9000"]
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(), cwd=folder)
            printed.write_text(done.stdout)
            assert done.returncode == 0, done.stdout + done.stderr
    return printed.read_text(), out, json.loads((out / "summary.json").read_text())


@pytest.mark.slow
def test_every_part_passes_and_three_files_come_back(checked):
    text, out, summary = checked
    assert summary["status"] == dict.fromkeys(NAMES, "passed")
    assert all(f"{name:10s} passed" in text for name in NAMES)
    assert {path.name for path in out.iterdir()} == {"summary.json", "summary.txt", "gpu_check.tar.gz"}
    assert all(block.strip() in text for block in (out / "summary.txt").read_text().split("\n\n"))
    with tarfile.open(out / "gpu_check.tar.gz") as tar:
        files = {"trace.json.gz", "train.log", "run/metrics.jsonl", *(f"{name}.json" for name in NAMES)}
        assert files <= set(tar.getnames())
    results = {name: part["results"] for name, part in summary["parts"].items()}
    assert results["train"]["first"]["exit_code"] == 143
    assert 0 < results["train"]["first"]["updates"] < results["train"]["resumed"]["updates"]
    assert results["capture"]["repeatability"]["bitwise"] == results["capture"]["repeatability"]["tensors"] > 100
    found = results["parity"]["operations"]
    assert set(found) == set(MAKERS)
    assert all(one["passed"] for tensors in found.values() for one in tensors.values())
    # Were the reference compared with itself, nothing would differ at all.
    assert sum(not one["bitwise"] for tensors in found.values() for one in tensors.values()) > 10
    assert set(results["speed"]["stages"]["measured"]) == {*STAGES, *PARTS}
    rows, measured = results["speed"]["projection"]["rows"], results["speed"]["phases"]
    assert {(row["phase"], row["roots"]) for row in rows} == {(row["phase"], row["roots"]) for row in measured}
    assert all(row["source"] == "measured" and row["floor_s"] >= 0 for row in rows)
    with pytest.raises(ConfigError, match=rf"^OUT_DIR {out}: is not empty"):
        gpu_check.read(gpu_check.Arguments(out, device="cpu"), [])


def test_bad_flags_are_refused(tmp_path):
    arguments = gpu_check.Arguments(tmp_path, device="cpu")
    for rest in (["--run_dir", "elsewhere"], ["--graph=off"]):
        with pytest.raises(ConfigError, match="is set by the parts of a check"):
            gpu_check.read(arguments, rest)
    with pytest.raises(ConfigError, match="--parts facts,tea: choose from facts,overlap"):
        gpu_check.chosen("facts,tea")
    assert gpu_check.chosen("train, facts") == ["facts", "train"]


def test_an_archive_stays_within_its_limit_whatever_compresses_and_says_what_is_left_out(tmp_path):
    folder, target = tmp_path / "work", tmp_path / "all.tar.gz"
    (folder / "run").mkdir(parents=True)
    for name, size in {"run/small": 100, "middle": 2 * 2**20, "large": 3 * 2**20}.items():
        (folder / name).write_bytes(random.Random(name).randbytes(size))
    assert archive(folder, target, limit=4 * 2**20) == ["large"]
    assert target.stat().st_size <= 4 * 2**20
    with tarfile.open(target) as tar:
        assert tar.getnames() == ["run/small", "middle"]
        assert len(tar.extractfile("middle").read()) == 2 * 2**20


# The arithmetic


@pytest.fixture
def record(tmp_path):
    return Record(tmp_path / "part.json")


def test_a_deviation_is_the_greatest_difference_and_its_share_of_the_number_and_the_typical_size():
    got = deviation(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0]))
    # rms of 3 and 4 is sqrt(12.5)
    assert (got.bitwise, got.differ, got.largest) == (False, 1, 0.5)
    assert got.relative == pytest.approx(0.5 / (4 + math.sqrt(12.5)))
    assert got.within(0.1)
    assert not got.within(0.06)


@pytest.mark.parametrize(
    ("got", "expected", "bitwise", "differ", "largest"),
    [
        ([1.0, math.nan, math.inf], [1.0, math.nan, math.inf], True, 0, 0.0),
        ([math.nan, 1.0], [1.0, 1.0], False, 1, math.inf),
        ([1.0], [math.inf], False, 1, math.inf),
    ],
)
def test_what_is_not_finite_equals_only_itself(got, expected, bitwise, differ, largest):
    found = deviation(torch.tensor(got), torch.tensor(expected))
    assert (found.bitwise, found.differ, found.largest) == (bitwise, differ, largest)
    assert found.relative == largest


def test_the_first_run_and_the_capture_are_told_apart_from_what_is_to_come():
    clock = speed.Clock(SimpleNamespace(config=SimpleNamespace(lanes=8, updates_per_iteration=2)), captures=True)
    clock.calls["train", 64] = [9.0, 1.5, 0.5, 0.4, 0.6]
    assert clock.row(("train", 64)) == {
        "phase": "train", "roots": 64, "iterations": 3, "ms_median": 500, "ms_p95": 600, "env_steps_a_second": 16, "updates_a_second": 4,
        "first_run_s": 9.0, "capture_s": 1.0,
    }  # fmt: skip


def test_what_was_not_measured_lies_between_its_neighbours_and_says_so_and_the_projection_adds_up():
    measured = {("train", 8): 3.0, ("train", 16): 5.0, ("train", 64): 6.0, ("collect", 0): 1.0}
    found = {roots: speed.estimate(measured, "train", roots) for roots in (16, 12, 32, 128)}
    assert found == {16: (5.0, "measured"), 12: (4.0, "interpolated"), 32: (5.0 + 16 / 48, "interpolated"), 128: (6.0, "as R 64")}
    assert speed.estimate(measured, "learn", 16) == (5.0, "train, measured")
    assert speed.estimate(measured, "sweep", 16) == (None, "not measured")
    recipe, floors = {("learn", 16): 50, ("sweep", 8): 4, ("collect", 0): 10}, {("learn", 16): 1.5, ("sweep", 8): 1, ("collect", 0): 0}
    found = [(row["phase"], row["spent_s"], row["floor_s"]) for row in speed.project(recipe, measured, floors)]
    assert found == [("collect", 0.01, 0), ("sweep", 0, 0.004), ("learn", 0.25, 0.075)]


def test_the_idle_share_and_what_is_launched_beside_the_graphs(record):
    calls = [("cudaGraphLaunch", 2), ("cudaLaunchKernel", 1), ("cuLaunchKernelEx", 1), ("cudaMemcpyAsync", 1), ("cudaStreamSynchronize", 1)]
    host = [{"ph": "X", "cat": "cuda_runtime", "name": name} for name, times in calls for _ in range(times)]
    work = [(20, 10), (40, 10), (100, 200), (250, 100), (400, 50), (600, 30)]
    events = host + [{"ph": "X", "cat": "kernel", "name": "k", "ts": at, "dur": duration} for at, duration in work]
    idle.tell(record, events, watched_s=500e-6, unwatched_s=400e-6, iterations=2)
    found = record.results["idle"]
    # 10 + 10 + 250 (100 to 350) + 50 + 30 us in two iterations
    assert found["busy_ms"] == pytest.approx(0.175)
    assert found["idle_share_watched"] == pytest.approx(0.65)
    assert found["idle_share_unwatched"] == pytest.approx(1 - 175 / 400)
    assert (found["device_work"], found["graph_launches"]) == (3, 1)
    assert found["other_launches"] == {"cudaLaunchKernel": 0.5, "cuLaunchKernelEx": 0.5, "cudaMemcpyAsync": 0.5}
    assert record.failures == []
    assert any("idle: 56.2 %" in line for line in record.lines)
    idle.tell(record, host + events, watched_s=500e-6, unwatched_s=1e-6, iterations=2)
    assert not any("-1" in line for line in record.lines)


def test_the_probe_says_which_form_overlaps(record):
    overlap.tell_probe(record, {"alone": 10e-3, "on": 14.9e-3, "split_alone": 10.2e-3, "split": 10.3e-3})
    assert "--graph on: a host that sleeps 5 ms DOES NOT overlap 10.00 ms of kernels" in record.lines[0]
    assert "--graph split: a host that sleeps 5 ms overlaps 10.20 ms" in record.lines[1]


def row(iteration: int, steps: int, updates: int, wall: float = 0.0, loss: float | None = 1.0) -> dict:
    return {"iteration": iteration, "env_steps": steps, "updates": updates, "wall_s": wall, "losses/loss": loss}


def test_rates_are_those_of_the_rows_that_learned():
    rows = [row(10, 80, 0, 100.0), row(20, 160, 10, 110.0), row(30, 240, 30, 114.0)]
    assert train.rates(rows) == {"env_steps_a_second": 20.0, "updates_a_second": 5.0}
    assert train.rates(rows[:2]) == {"env_steps_a_second": None, "updates_a_second": None}


ROWS = [row(10, 80, 0), row(20, 160, 10), row(30, 240, 20)]


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ([*ROWS, row(40, 320, 30)], None),
        ([*ROWS[:2], row(25, 200, 15), row(40, 320, 30)], "rows that were logged before the stop are gone or changed"),
        ([*ROWS, row(40, 320, 19)], "counters went backwards, from iteration 30 to 40"),
        ([*ROWS, row(40, 320, 30, loss=None)], "losses that are not finite in 1 rows, the first at iteration 40"),
    ],
)
def test_a_resumed_run_that_lost_something_or_learned_nonsense_is_found_out(after, said):
    found = train.faults(ROWS, after)
    assert [fault[: len(said or "")] for fault in found] == ([said] if said else [])


def test_a_kernel_that_is_off_or_raises_fails_one_for_which_no_time_is_left_does_not(tiny_config, tmp_path, record, monkeypatch):
    config = tiny_config()
    monkeypatch.setattr(parity, "MAKERS", {name: parity.MAKERS[name] for name in ("to_scalar", "root_prior")})
    right, asked = support.to_scalar_kernel, dispatch.runs_kernel
    monkeypatch.setattr(support, "to_scalar_kernel", lambda logits: right(logits) * 1.001)
    job = Job(config, describe(config.env), (), tmp_path, math.inf)
    parity.run(job, record)
    assert record.failures[0].startswith("to_scalar, out 0: ")
    assert len(record.failures) == 1
    assert all(one["passed"] for one in record.results["operations"]["root_prior"].values())
    assert dispatch.runs_kernel is asked
    monkeypatch.setattr(support, "to_scalar_kernel", None)
    parity.run(job, record)
    assert record.failures[1].startswith("to_scalar: TypeError: ")
    assert not parity.passes(torch.float32, Deviation(False, 1, 2e-4, 2e-4))
    assert not parity.passes(torch.bool, Deviation(False, 1, 1e-12, 1e-12))
    parity.run(Job(config, describe(config.env), (), tmp_path, 0.0), late := Record(tmp_path / "late.json"))
    assert (late.failures, late.unfinished) == ([], ["to_scalar and 1 more were not compared"])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"ring.action": torch.tensor([0, 0, 2])}, "captured against uncaptured: 1 actions differ"),
        ({"weight": torch.tensor([1.0, 1.0, 1.1])}, "captured against uncaptured: 1 tensors are beyond the bound of 0.001, the worst w"),
    ],
)
def test_a_captured_run_that_decides_or_computes_something_else_fails(record, changed, said):
    eager = {"ring.action": torch.zeros(3, dtype=torch.int64), "weight": torch.ones(3)}
    capture.compare(record, "captured", "captured against uncaptured", eager | changed, eager)
    assert len(record.failures) == 1
    assert record.failures[0].startswith(said)


@pytest.mark.parametrize("positions", [400, 96])
def test_a_filled_ring_repeats_what_was_played_and_all_of_it_can_be_learned_from(tiny_config, positions):
    config = tiny_config(ring_positions=positions, refresh_roots=16)
    trainer = trainers.start(config, describe(config.env))
    while trainer.phase() in ("collect", "sweep"):
        trainers.step(trainer)
    ring, played = trainer.state.ring, trainer.slots
    before = {name: field.clone() for name, field in replay.tensors(ring).items()}
    trainers.fill(trainer)
    assert trainer.slots == int(ring.head) == max(played, config.slots)
    assert trainer.roots() == config.refresh_roots
    source = torch.arange(ring.slots) % played
    for name, field in replay.tensors(ring).items():
        if field.dim() >= 2:
            assert torch.equal(field, before[name][:, source]), name
    assert ring.first[:, torch.arange(played, ring.slots, played)].all()
    assert replay.eligible(ring, config).sum() > 0.5 * (~ring.done).sum()
    done = int(trainer.state.updates)
    trainers.once(trainer, "train", config.refresh_roots)
    assert int(trainer.state.updates) == done + config.updates_per_iteration
    assert int(trainer.state.learner.skipped) == 0


# A driver and parts that do what it must survive

PARTS_THAT = """
import json, os, signal, subprocess, sys, time
part, out, deadline = sys.argv[1], sys.argv[2], float(sys.argv[3])
def write(failures, unfinished=()):
    results = {"left": deadline - time.monotonic()}
    json.dump({"lines": ["found by " + part], "failures": failures, "unfinished": list(unfinished), "results": results},
              open(f"{out}/{part}.json", "w"))
if part == "parity":
    write([]); print("about to crash", flush=True); os.kill(os.getpid(), signal.SIGSEGV)
if part == "capture":
    import faulthandler; faulthandler.register(signal.SIGUSR2)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open(f"{out}/child", "w").write(str(child.pid))
    write([]); time.sleep(600)
if part == "speed":
    write(["one thing", "another"]); sys.exit(1)
if part == "idle":
    print("Traceback: no file was written"); sys.exit(1)
if part == "overlap":
    write([], ["split was not measured"])
if part in ("facts", "train"):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open(f"{out}/child", "w").write(str(child.pid))
    write([])
"""


def gone(pid: int) -> bool:
    """Whether a process ends soon; one that ended and waits to be reaped has."""
    for _ in range(1000):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
def test_a_part_that_crashes_hangs_or_fails_takes_no_other_down_and_late_is_not_failed(tmp_path, monkeypatch, capsys):
    script, out, work = (tmp_path / name for name in ("part.py", "out", "work"))
    script.write_text(PARTS_THAT)
    work.mkdir()
    monkeypatch.setattr(gpu_check, "PART", (sys.executable, str(script)))
    monkeypatch.setattr(gpu_check, "WEIGHTS", dict.fromkeys(NAMES, 10) | {"capture": 2})
    config, flags = gpu_check.read(gpu_check.Arguments(out, device="cpu"), [])
    check = gpu_check.Check(out, work, config, flags, list(NAMES), 200.0)
    assert check.run() == 3
    assert {one.part: one.status for one in check.found} == {
        "facts": "passed", "parity": "FAILED", "capture": "out of time", "overlap": "out of time", "speed": "FAILED", "idle": "FAILED",
        "train": "passed",
    }  # fmt: skip
    found, text = {one.part: one for one in check.found}, capsys.readouterr().out
    assert found["parity"].failures == ["parity: was killed by SIGSEGV"]
    assert {"about to crash", "Fatal Python error: Segmentation fault"} <= set(found["parity"].log_tail)
    assert found["speed"].failures == ["one thing", "another"]
    assert found["idle"].failures == ["idle: exit code 1"]
    assert "log: idle.log, which ends: Traceback: no file was written" in text
    assert "  FAILED: another" in text
    assert "  out of time: split was not measured" in text
    # The part that hung: ended at its share, its stack in the log; no process of any part is left.
    (late,) = found["capture"].unfinished
    assert late.startswith("capture: ended after ")
    assert (found["capture"].exit_code, found["capture"].failures, found["capture"].lines) == (None, [], ["found by capture"])
    assert "part.py" in (work / "capture.log").read_text()
    assert gone(int((work / "child").read_text()))
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"]["capture"] == "out of time"
    assert summary["parts"]["parity"]["results"]["left"] > 0
    late_only = gpu_check.Check(out, work, config, flags, ["overlap"], 200.0)
    assert late_only.run() == gpu_check.LATE
