"""tools/profile/gpu_check: the complete path at toy size on a CPU, its arithmetic by hand, and a driver that outlives its parts."""

import fcntl
import json
import math
import os
import subprocess
import sys
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
from tools.profile import gpu_check, roofline
from tools.profile.checks import NAMES, capture, emulators, idle, parity, projection, stages, train, trainers
from tools.profile.checks.clock import Clock
from tools.profile.checks.compare import Deviation, deviation
from tools.profile.checks.job import Job, Record, read_job
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
            command = [sys.executable, "-m", "tools.profile.gpu_check", str(out), "--device", "cpu", *TINY, "--budget", "3000"]
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(), cwd=folder)
            printed.write_text(done.stdout)
            assert done.returncode == 0, done.stdout + done.stderr
    return printed.read_text(), out, json.loads((out / "summary.json").read_text())


def results(checked, part: str) -> dict:
    return checked[2]["parts"][part]["results"]


def test_every_part_passes_and_its_numbers_are_in_the_summary(checked):
    text, out, summary = checked
    assert summary["failed"] == []
    assert list(summary["parts"]) == sorted(NAMES)
    assert all(f"{name:10s} passed" in text for name in NAMES)
    found = results(checked, "train")
    assert found == json.loads((out / "train.json").read_text())["results"]
    assert found["first"]["exit_code"] == 143
    assert 0 < found["first"]["updates"] < found["resumed"]["updates"]
    found = results(checked, "capture")["repeatability"]
    assert found["bitwise"] == found["tensors"] > 100
    assert summary["config"]["channels"] == 4
    with pytest.raises(ConfigError, match=rf"^OUT_DIR {out}: is not empty"):
        gpu_check.prepare(out, read_job(out, 0.0).config, [])


def test_parity_compares_every_operation_with_its_kernel_in_the_interpreter(checked):
    found = results(checked, "parity")
    assert found["kernels"] == "interpreted"
    assert set(found["operations"]) == set(MAKERS)
    assert all(one["passed"] for tensors in found["operations"].values() for one in tensors.values())
    # Were the reference compared with itself, nothing would differ at all.
    assert sum(not one["bitwise"] for tensors in found["operations"].values() for one in tensors.values()) > 10
    assert {"state weights", "state momentum", "out 0"} <= set(found["operations"]["sgd_step"])


def test_the_projection_covers_the_recipe_at_the_floor_of_the_measured_ceilings(checked):
    out = checked[1]
    found, job = results(checked, "speed"), read_job(out, 0.0)
    recipe = roofline.recipe(job.config)
    measured = {(row["phase"], row["roots"]): row["ms_median"] for row in found["phases"]}
    assert set(measured) == set(recipe)
    parts = {(part["phase"], part["roots"]): part for part in found["projection"]["parts"]}
    most = [results(checked, "facts")["ceilings"][name] / 1e12 for name in ("flops_a_second", "bytes_a_second")]
    model = roofline.Model(job.config, job.spec, roofline.Arguments().depth)
    for key, iterations in recipe.items():
        assert parts[key]["seconds"] == pytest.approx(iterations * measured[key] / 1e3)
        floor = sum(work.seconds(*most) for work in model.iteration(*key))
        assert parts[key]["floor_seconds"] == pytest.approx(iterations * floor)
    assert found["projection"]["measured"]


def test_the_stages_are_those_of_the_trainer_and_roofline_reads_them(checked):
    _, out, _ = checked
    found, facts = results(checked, "speed")["stages"], roofline.read_trace(out / "stages.json")
    assert set(found["measured"]) == {*STAGES, *PARTS}
    assert facts["roots"] == found["roots"] == 8
    assert found["measured_seconds"] == pytest.approx(sum(row["cpu_self"] for row in facts["stages"].values()))
    most = [results(checked, "facts")["ceilings"][name] / 1e12 for name in ("flops_a_second", "bytes_a_second")]
    job = read_job(out, 0.0)
    works = roofline.Model(job.config, job.spec, roofline.Arguments().depth).iteration("train", 8)
    assert found["floor_seconds"] == pytest.approx(sum(work.seconds(*most) for work in works))
    assert sum(found["floors"].values()) == pytest.approx(found["floor_seconds"])


def test_bad_flags_are_refused(tmp_path):
    arguments = gpu_check.Arguments(tmp_path, device="cpu")
    for rest in (["--run_dir", "elsewhere"], ["--resume"], ["--graph=off"]):
        with pytest.raises(ConfigError, match="is set by the parts of a check"):
            gpu_check.read(arguments, rest)
    with pytest.raises(ConfigError, match="--parts facts,tea: choose from facts,parity"):
        gpu_check.chosen("facts,tea")
    assert gpu_check.chosen("train, facts") == ["facts", "train"]


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


def clock_with(calls: list[float], captures: bool, phase: str = "train") -> Clock:
    clock = Clock(SimpleNamespace(config=SimpleNamespace(lanes=8, updates_per_iteration=2)), captures)
    clock.calls[phase, 64] = calls
    return clock


def test_the_first_run_and_the_capture_are_told_apart_from_what_is_to_come():
    row = clock_with([9.0, 1.5, 0.5, 0.4, 0.6], captures=True).row(("train", 64))
    assert row == {
        "phase": "train", "roots": 64, "iterations": 3, "ms_median": 500, "ms_p95": 600, "ms_least": 400, "iterations_a_second": 2,
        "env_steps_a_second": 16, "updates_a_second": 4, "first_run_s": 9.0, "capture_s": 1.0,
    }  # fmt: skip
    uncaptured = clock_with([9.0, 0.25, 0.5, 0.4], captures=False, phase="sweep").row(("sweep", 64))
    assert (uncaptured["ms_median"], uncaptured["capture_s"]) == (400, None)
    assert uncaptured["env_steps_a_second"] is uncaptured["updates_a_second"] is None


def test_what_was_not_measured_lies_between_its_neighbours_and_says_so():
    points = {8: 3.0, 16: 5.0, 64: 6.0}
    found = {roots: projection.estimate(points, roots) for roots in (16, 12, 32, 128)}
    assert found == {16: (5.0, "measured"), 12: (4.0, "interpolated"), 32: (5.0 + 16 / 48, "interpolated"), 128: (6.0, "as R 64")}
    assert projection.estimate({}, 64) == (None, "not measured")


def test_the_projection_adds_up_by_hand():
    recipe = {("collect", 0): 10, ("train", 8): 100, ("train", 16): 200, ("learn", 16): 50}
    floors = {("collect", 0): 0.0, ("train", 8): 1.0, ("train", 16): 2.0, ("learn", 16): 1.5}
    parts = projection.project(recipe, {("collect", 0): 1.0, ("train", 16): 4.0}, floors)
    assert [(part.phase, part.roots, part.ms, part.source) for part in parts] == [
        ("collect", 0, 1.0, "measured"), ("learn", 16, 4.0, "train, measured"), ("train", 8, 4.0, "as R 16"),
        ("train", 16, 4.0, "measured"),
    ]  # fmt: skip
    whole = projection.total(parts, snapshots=10, snapshot_ms=20.0, snapshot_floor_ms=1.0)
    assert whole["seconds"] == pytest.approx(0.01 + 0.2 + 0.4 + 0.8 + 0.2)
    assert whole["floor_seconds"] == pytest.approx(0.1 + 0.4 + 0.075 + 0.01)
    assert whole["floor_share"] == pytest.approx(0.585 / 1.61)
    assert (whole["measured"], whole["complete"]) == (False, True)
    missing = projection.total(projection.project({("sweep", 8): 4}, {}, {("sweep", 8): 1.0}), 0, 0.0, 0.0)
    assert (missing["complete"], missing["seconds"], missing["floor_share"]) == (False, 0.0, None)


def test_the_gaps_are_seconds_above_the_floor_not_shares():
    assert stages.gaps({"a": 5.0, "b": 100.0, "c": 1.0}, {"a": 1.0, "b": 98.0}) == [("a", 4.0), ("b", 2.0), ("c", 1.0)]


def event(category: str, name: str, at: float, duration: float, correlation: int) -> dict:
    return {"ph": "X", "cat": category, "name": name, "ts": at, "dur": duration, "args": {"correlation": correlation}}


REPLAYS = [
    event("cuda_runtime", "cudaGraphLaunch", 0, 5, 1), event("cuda_runtime", "cudaLaunchKernel", 6, 1, 2),
    event("cuda_driver", "cuLaunchKernelEx", 8, 1, 3), event("cuda_runtime", "cudaMemcpyAsync", 9, 1, 4),
    event("cuda_runtime", "cudaStreamSynchronize", 10, 1, 5), event("cuda_runtime", "cudaGraphLaunch", 500, 5, 6),
    event("kernel", "gemm", 100, 200, 1), event("kernel", "conv", 250, 100, 1), event("gpu_memcpy", "Memcpy HtoD", 400, 50, 6),
    event("kernel", "fill", 20, 10, 2), event("kernel", "philox", 40, 10, 3), event("gpu_memset", "Memset", 600, 30, 6),
    event("gpu_user_annotation", "5 learn", 0, 1000, 9), event("cpu_op", "aten::add", 0, 1000, 9),
]  # fmt: skip


def test_the_idle_share_and_what_is_launched_beside_the_graphs(record):
    idle.tell(record, REPLAYS, watched_s=1e-3, unwatched_s=400e-6, iterations=2)
    found = record.results["idle"]
    # 10 + 10 + 250 (100 to 350) + 50 + 30 of 1000 us, in two iterations
    assert found["busy_ms"] == pytest.approx(0.175)
    assert found["idle_share_watched"] == pytest.approx(0.65)
    assert found["idle_share_unwatched"] == pytest.approx(1 - 175 / 400)
    assert found["device_work"] == 3
    assert found["launches_an_iteration"] == {
        "graphs": {"cudaGraphLaunch": 1}, "others": {"cudaLaunchKernel": 0.5, "cuLaunchKernelEx": 0.5, "cudaMemcpyAsync": 0.5},
        "work": {"fill": 0.5, "philox": 0.5},
    }  # fmt: skip
    assert record.failures == []
    assert any("idle 56.2 %" in line for line in record.lines)


def test_the_hidden_share_by_hand():
    assert emulators.hidden_shares([0.0, 0.0, 0.0], 4.0) == (1.0, 1.0, 1.0)
    assert emulators.hidden_shares([4.0, 4.0, 4.0], 4.0) == (0.0, 0.0, 0.0)
    assert emulators.hidden_shares([0.0, 1.0, 2.0, 3.0, 4.0], 4.0) == (0.5, 0.25, 0.75)
    assert emulators.verdict(0.5, 0.25, 0.75) == "50 % of the turn is hidden, 25 to 75 % by the quartiles of the pairs"
    assert "lost in the noise" in emulators.verdict(0.5, -0.6, 0.75)


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
        (ROWS, "the resumed run logged no row"),
        ([*ROWS[:2], row(25, 200, 15), row(40, 320, 30)], "rows that were logged before the stop are gone or changed"),
        ([*ROWS, row(40, 320, 19)], "counters went backwards, from iteration 30 to 40"),
        ([*ROWS, row(40, 320, 30, loss=None)], "losses that are not finite in 1 rows, the first at iteration 40"),
    ],
)
def test_a_resumed_run_that_lost_something_or_learned_nonsense_is_found_out(after, said):
    found = train.faults(ROWS, after)
    assert [fault[: len(said or "")] for fault in found] == ([said] if said else [])


def job_of(config, out, seconds: float = 1e9, cuda: bool | None = None) -> Job:
    """A job with that many seconds left; `cuda`: with the counts of a card."""
    job = Job(config, describe(config.env), (), out, 0.0)
    fields = {name: getattr(job, name) for name in ("config", "spec", "arguments", "out", "device")}
    on_cuda = job.cuda if cuda is None else cuda
    return SimpleNamespace(**fields, cuda=on_cuda, left=lambda: seconds, pick=lambda card, toy: card if on_cuda else toy)


def test_a_kernel_that_is_off_or_raises_fails_and_the_other_operations_are_compared(tiny_config, tmp_path, record, monkeypatch):
    monkeypatch.setattr(parity, "MAKERS", {name: parity.MAKERS[name] for name in ("to_scalar", "root_prior")})
    right, asked = support.to_scalar_kernel, dispatch.runs_kernel
    monkeypatch.setattr(support, "to_scalar_kernel", lambda logits: right(logits) * 1.001)
    parity.run(job_of(tiny_config(), tmp_path), record)
    assert record.failures[0].startswith("to_scalar, out 0: ")
    assert len(record.failures) == 1
    assert all(one["passed"] for one in record.results["operations"]["root_prior"].values())
    assert dispatch.runs_kernel is asked
    monkeypatch.setattr(support, "to_scalar_kernel", None)
    parity.run(job_of(tiny_config(), tmp_path), record)
    assert record.failures[1].startswith("to_scalar: TypeError: ")
    assert not parity.passes(torch.float32, Deviation(False, 1, 2e-4, 2e-4))
    assert not parity.passes(torch.bool, Deviation(False, 1, 1e-12, 1e-12))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"ring.action": torch.tensor([0, 0, 2])}, "captured against uncaptured: 1 actions differ"),
        ({"weight": torch.tensor([1.0, 1.0, 1.1])}, "captured against uncaptured: 1 tensors are beyond the bound of 0.001, the worst w"),
    ],
)
def test_a_captured_run_that_decides_or_computes_something_else_fails(record, changed, said):
    eager = {"ring.action": torch.zeros(3, dtype=torch.int64), "weight": torch.ones(3)}
    capture.tell(record, "captured", "captured against uncaptured", capture.compare(eager | changed, eager), judged=True)
    assert len(record.failures) == 1
    assert record.failures[0].startswith(said)


@pytest.mark.parametrize("positions", [400, 96])
def test_a_filled_ring_repeats_what_was_played_and_all_of_it_can_be_learned_from(tiny_config, positions):
    config = tiny_config(ring_positions=positions, refresh_roots=16)
    trainer = trainers.started(config, describe(config.env))
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
    alive = (~ring.done).sum()
    assert replay.eligible(ring, config).sum() > 0.5 * alive
    done = int(trainer.state.updates)
    assert trainers.once(trainer, "train", config.refresh_roots) > 0
    assert int(trainer.state.updates) == done + config.updates_per_iteration
    assert int(trainer.state.learner.skipped) == 0


# A driver and parts that do what it must survive

PARTS_THAT = """
import json, os, signal, subprocess, sys, time
part, out, deadline = sys.argv[1], sys.argv[2], float(sys.argv[3])
def write(failures):
    results = {"left": deadline - time.monotonic()}
    json.dump({"lines": ["found by " + part], "failures": failures, "results": results}, open(f"{out}/{part}.json", "w"))
if part == "facts":
    write([])
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
if part == "emulators":
    sys.exit("error: three")
if part == "train":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open(f"{out}/left_behind", "w").write(str(child.pid))
    write([])
"""

pytestmark = pytest.mark.slow


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that ended and waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid: int) -> bool:
    for _ in range(1000):
        if is_alive(pid):
            time.sleep(0.05)
    return not is_alive(pid)


@pytest.fixture
def survived(tmp_path, monkeypatch, capsys):
    """What the driver makes of parts that crash, hang, fail and leave processes behind: outcomes by part, the summary, the table."""
    script = tmp_path / "part.py"
    script.write_text(PARTS_THAT)
    monkeypatch.setattr(gpu_check, "PART", (sys.executable, str(script)))
    monkeypatch.setattr(gpu_check, "WEIGHTS", dict.fromkeys(NAMES, 10) | {"capture": 2})
    config, flags = gpu_check.read(gpu_check.Arguments(tmp_path, device="cpu"), [])
    found, ended_by = gpu_check.check(tmp_path, config, flags, list(NAMES), 200.0)
    assert ended_by is None
    return {one.part: one for one in found}, json.loads((tmp_path / "summary.json").read_text()), capsys.readouterr().out


def test_a_part_that_crashes_hangs_or_fails_takes_no_other_down(survived, tmp_path):
    found, summary, text = survived
    assert {name: one.status for name, one in found.items()} == {
        "facts": "passed", "parity": "FAILED", "capture": "FAILED", "speed": "FAILED", "idle": "FAILED", "emulators": "FAILED",
        "train": "passed",
    }  # fmt: skip
    assert found["parity"].failures == ["parity: was killed by SIGSEGV"]
    assert found["parity"].lines == ["found by parity"]
    assert {"about to crash", "Fatal Python error: Segmentation fault"} <= set(found["parity"].log_tail)
    assert found["speed"].failures == ["one thing", "another"]
    assert found["idle"].failures == ["idle: exit code 1"]
    assert found["emulators"].failures == ["emulators: exit code 1"]
    assert found["emulators"].log_tail == ["error: three"]
    assert summary["failed"] == ["parity", "capture", "speed", "idle", "emulators"]
    assert summary["parts"]["parity"]["results"]["left"] > 0
    assert "log: idle.log, which ends: Traceback: no file was written" in text
    assert "  FAILED: another" in text
    assert gone(int((tmp_path / "left_behind").read_text()))


def test_a_part_that_hangs_is_ended_at_its_share_with_its_stack_in_the_log_and_its_processes(survived, tmp_path):
    hung = survived[0]["capture"]
    (failure,) = hung.failures
    assert failure.startswith("capture: ended after ")
    assert (hung.exit_code, hung.lines) == (None, ["found by capture"])
    assert "part.py" in (tmp_path / "capture.log").read_text()
    assert gone(int((tmp_path / "child").read_text()))
