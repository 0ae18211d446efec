"""tools/faults/kill_test: moments come when they should, every fault of a run is found, and a real run survives its kills."""

import contextlib
import dataclasses
import json
import random
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from speedyzero.config import preset_config, resolve
from speedyzero.envs import describe
from speedyzero.loop import train
from speedyzero.run import checkpoint
from speedyzero.run.frames import FrameStore
from tests.conftest import TINY
from tools.faults import invariants, kill_schedule
from tools.faults.invariants import Files, Life
from tools.faults.kill_schedule import Moment, Pace, Watch
from tools.faults.run import Run, environment


def kill_test(*flags: str) -> dict[str, str]:
    """The figures of a kill test that found no fault."""
    command = [sys.executable, "-m", "tools.faults.kill_test", "--preset", "smoke", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)


@pytest.mark.slow
def test_a_run_that_is_killed_several_times_ends_as_one_that_was_not():
    figures = kill_test("--kills", "4", "--checkpoint-interval", "10")
    assert int(figures["iterations lost, most"]) < 20
    # On a busy machine a kill that was meant for the end may find that the process has just ended, complete.
    assert int(figures["kills"]) >= 2


@pytest.mark.slow
def test_a_run_that_is_asked_to_stop_loses_nothing():
    figures = kill_test("--kills", "2", "--signal", "SIGUSR1", "--seed", "3", "--checkpoint-interval", "30", "--alternate-ring")
    assert (figures["signal"], figures["iterations lost, most"]) == ("SIGUSR1", "0")


@pytest.mark.slow
def test_ranks_that_are_killed_end_as_those_that_were_not():
    figures = kill_test("--kills", "3", "--ranks", "2", "--seed", "2", "--checkpoint-interval", "20")
    assert int(figures["iterations lost, most"]) < 40
    assert int(figures["kills"]) >= 2


@pytest.mark.slow
def test_a_rank_that_outlives_torchrun_is_found_and_one_that_has_only_started_ends_by_itself(tmp_path):
    run = Run(["--preset", "smoke", "--run-dir", str(tmp_path / "run")], tmp_path / "said", ["--standalone", "--nproc-per-node=2"])
    try:
        while len(ranks := run.pids()) < 2:
            assert run.process.poll() is None, run.said()
            time.sleep(0.01)
        run.strike(signal.SIGKILL)
        assert run.process.wait() == -signal.SIGKILL
        assert set(run.wait_gone(0.0)) <= set(ranks.values())
        assert run.wait_gone(120.0) == []
    finally:
        run.end()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("seed", range(3))
def test_ranks_and_torchrun_are_hit_with_every_signal(seed):
    drawn = kill_schedule.blows(random.Random(seed), 24, 3)
    assert [blow.rank is None for blow in drawn].count(False) == 12
    assert {blow.rank for blow in drawn} == {None, 0, 1, 2}
    assert all(blow.signal == signal.SIGKILL for blow in drawn if blow.rank is not None)
    assert sorted(blow.signal.name for blow in drawn if blow.rank is None) == ["SIGINT"] * 3 + ["SIGKILL"] * 6 + ["SIGTERM"] * 3


@pytest.mark.parametrize("seed", range(3))
def test_moments_are_of_every_kind_and_spread_over_the_run(seed):
    drawn = kill_schedule.draw(random.Random(seed), 50, Pace(1000, start_s=3.0, iteration_s=0.1, evaluation_s=2.0), 25)
    assert drawn[0] == Moment("write", "config.json")
    kinds = [moment.kind for moment in drawn]
    assert kinds.count("write") > 16
    assert kinds.count("clock") > 8
    assert kinds.count("after") > 2
    assert all(kind in ("write", "evaluation") for kind in kinds[45:])
    targets = [moment.iteration for moment in drawn if moment.pattern == "checkpoint_*"]
    assert targets == sorted(targets)
    assert targets[-1] > 700
    assert all(0 <= moment.delay <= {"clock": 8.0, "evaluation": 2.0}.get(moment.kind, 0.005) for moment in drawn)


@pytest.fixture
def sleeper():
    """A process that does nothing, as a run."""
    process = subprocess.Popen(["sleep", "60"])
    yield SimpleNamespace(process=process, started=time.monotonic(), said=lambda: "")
    process.kill()
    process.wait()


CHECKPOINTS = [f"checkpoint_{i:09d}.safetensors" for i in (10, 20, 30)]


@pytest.mark.parametrize(
    ("moment", "there"),
    [
        (Moment("write", "checkpoint_*", 20), [*CHECKPOINTS[:2], CHECKPOINTS[2] + ".tmp"]),
        (Moment("after", "checkpoint_*"), CHECKPOINTS[:1]),
        (Moment("write", "frames_*"), CHECKPOINTS[:2]),  # a later checkpoint stands in for a write that does not come
    ],
    ids=str,
)
def test_a_moment_comes_while_its_file_is_there(sleeper, tmp_path, moment, there):
    steps = [step for name in CHECKPOINTS for step in (
        lambda aside=tmp_path / f"{name}.tmp": aside.write_bytes(b"half"),
        lambda aside=tmp_path / f"{name}.tmp", path=tmp_path / name: aside.rename(path),
    )]  # fmt: skip
    with contextlib.closing(Watch(tmp_path)) as watch:

        def appeared(seconds: float):  # the next step is taken whenever somebody looks: none is missed, and none comes too early
            if steps:
                steps.pop(0)()
            yield from watch.appeared(seconds)

        assert kill_schedule.wait(sleeper, SimpleNamespace(appeared=appeared), moment, 0, 20, 30.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == there


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """The directory of a run that came to its end, for reading only."""
    run_dir = tmp_path_factory.mktemp("faults") / "run"
    settings = {"device": "cpu"} | TINY | {"checkpoint_interval": 10}
    spec = describe("Catch-v0")
    config = dataclasses.replace(preset_config("cpu"), env="Catch-v0", run_dir=run_dir, **settings)
    assert train(resolve(config, image=spec.image, atari=False), spec, torch.device("cpu")) is None
    return run_dir


@pytest.fixture
def copied(complete, tmp_path):
    """A copy of it, to damage."""
    return Path(shutil.copytree(complete, tmp_path / "copy"))


def test_a_complete_run_and_what_a_kill_may_leave_are_no_faults(complete, copied):
    files = invariants.inspect(complete)
    assert (files.broken, files.leftovers, files.complete) == ([], [], True)
    assert checkpoint.path_of(complete / "checkpoints", files.newest) == checkpoint.latest(complete / "checkpoints")
    (copied / "summary.json").unlink()
    (copied / "checkpoints" / "checkpoint_000000999.safetensors.tmp").write_bytes(b"half")
    with open(copied / "metrics.jsonl", "ab") as file:
        file.write(b'{"env_steps": 12, "upd')
    files = invariants.inspect(copied)
    assert (files.broken, files.complete) == ([], False)
    assert files.leftovers == ["checkpoints/checkpoint_000000999.safetensors.tmp"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 8
    path.unlink()  # best.safetensors may be the same file
    path.write_bytes(data)


def lines_of(run_dir: Path, change) -> None:
    """Change the lines of metrics.jsonl."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    change(lines)
    (run_dir / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))


def set_last(run_dir: Path, name: str, value) -> None:
    lines_of(run_dir, lambda lines: lines.append(json.dumps(json.loads(lines.pop()) | {name: value})))


FAULTS = {
    "damaged checkpoint": (lambda d: flip(checkpoint.latest(d / "checkpoints")), "is damaged"),
    "another's iteration": (
        lambda d: shutil.copy(checkpoint.latest(d / "checkpoints"), d / "checkpoints/checkpoint_000009999.safetensors"), "holds iteration",
    ),
    "put aside": (lambda d: (d / "checkpoints/checkpoint_000000001.safetensors.damaged").write_bytes(b""), "unknown file"),
    "torn json": (lambda d: (d / "eval.json").write_text('{"mean": '), "eval.json: Expecting value"),
    "torn row": (lambda d: lines_of(d, lambda lines: lines.insert(3, lines[3][:50])), "metrics.jsonl: line 4"),
    "clock back": (lambda d: set_last(d, "wall_s", 0.0), "metrics.jsonl: counts or time fall"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_no_kill_may_leave_is_a_fault(copied, fault):
    damage, says = FAULTS[fault]
    damage(copied)
    (broken,) = invariants.inspect(copied).broken
    assert says in broken


def rows(*iterations: int) -> list[dict]:
    return [{"iteration": i, "env_steps": 8 * i, "updates": i, "wall_s": float(i)} for i in iterations]


BEFORE, LATER = Files(newest=50, rows=rows(40, 50, 60)), Files(newest=75, rows=rows(40, 50, 60, 70, 80))
SAID = "resumed /x at iteration 50: 400 steps, 50 updates\nenv_steps 480/900\n"


def test_a_life_that_resumes_where_the_last_one_saved_breaks_nothing():
    assert invariants.follow(BEFORE, LATER, SAID, 25) == Life(begun=True, resumed_at=50, last_line="env_steps 480/900")
    assert invariants.follow(BEFORE, BEFORE, "", 25) == Life()  # killed before it printed anything
    said = SAID + "stopped by SIGTERM at iteration 61 and saved; go on with --resume --run-dir /x\n"
    stopped = invariants.follow(BEFORE, BEFORE, said, 25)
    assert (stopped.stopped_by, stopped.stopped_at) == ("SIGTERM", 61)


@pytest.mark.parametrize(
    ("after", "said", "says"),
    [
        (LATER, SAID.replace("iteration 50", "iteration 25"), "resumed at iteration 25, though 50 was saved"),
        (Files(newest=25, rows=rows(40, 50, 60)), SAID, "the newest checkpoint is of iteration 25, and was of 50"),
        (Files(newest=50, rows=rows(40, 50, 60, 100)), SAID, "iteration 100 is logged and 50 saved"),
        (LATER, SAID + 2 * "stopped by SIGINT, nothing is lost; go on with --resume\n", "2 lines say that it stopped"),
        (LATER, "/x/checkpoint_1 is damaged (cut); trying the one before\n" + SAID, "it said: /x/checkpoint_1 is damaged"),
    ],
)
def test_a_life_that_breaks_a_promise_is_told(after, said, says):
    (broken,) = invariants.follow(BEFORE, after, said, 25).broken
    assert says in broken


DONE = Life(begun=True, resumed_at=50, stopped_at=61, stopped_by="SIGTERM", last_line="stopped by SIGTERM")
STOPPED = Files(newest=61, rows=rows(50, 60))


@pytest.mark.parametrize(
    ("number", "code", "life", "after", "faults"),
    [
        (15, 143, DONE, STOPPED, []),
        (15, -15, Life(), BEFORE, []),
        (9, 0, Life(begun=True), Files(complete=True), []),
        (15, -15, DONE, STOPPED, ["did not handle SIGTERM"]),
        (15, 143, dataclasses.replace(DONE, stopped_by="SIGINT"), STOPPED, ["exit code 143, but it said: stopped by SIGTERM"]),
        (15, 143, DONE, dataclasses.replace(STOPPED, newest=60), ["stopped at iteration 61, saved is 60"]),
        (15, 143, DONE, Files(newest=61, rows=rows(60, 62)), ["iteration 62 was logged, and 61 saved"]),
        (15, 143, DONE, dataclasses.replace(STOPPED, leftovers=["a.tmp"]), ["left a.tmp"]),
        (9, 0, Life(), BEFORE, ["exit code 0: it said nothing"]),
    ],
)
def test_an_end_keeps_its_promises_or_is_told(number, code, life, after, faults):
    assert invariants.end(signal.Signals(number), code, life, after) == faults


NAMED = "error: rank 1 ended or is stuck, and so all end; go on with --resume"


@pytest.mark.parametrize(
    ("number", "rank", "code", "life", "after", "faults"),
    [
        (9, 1, None, Life(begun=True, missed=[NAMED]), BEFORE, []),
        (9, 1, None, Life(), BEFORE, []),
        (9, 1, 1, Life(last_line="x"), BEFORE, ["torchrun ended with 1: x"]),
        (9, 0, None, Life(missed=[NAMED]), BEFORE, [f"rank 0 was killed, and ranks said: {NAMED}"]),
        (9, 1, None, Life(missed=[NAMED, NAMED]), BEFORE, ["2 ranks said that rank 1 was killed"]),
        (15, None, 1, DONE, STOPPED, []),
        (9, None, -9, DONE, STOPPED, []),
        (9, None, -9, Life(), BEFORE, []),
        (9, None, -9, Life(begun=True), Files(complete=True), []),
        (9, None, -9, dataclasses.replace(DONE, stopped_by=None, last_line="x"), STOPPED, ["exit code 143, but it said: x"]),
        (15, None, 1, DONE, dataclasses.replace(STOPPED, newest=60), ["stopped at iteration 61, saved is 60"]),
        (2, None, 70, DONE, STOPPED, ["torchrun ended with 70", "exit code 130, but it said: stopped by SIGTERM"]),
        (15, None, 0, Life(), BEFORE, ["exit code 0: it said nothing"]),
    ],
)
def test_ranks_keep_their_promises_or_are_told(number, rank, code, life, after, faults):
    assert invariants.end_over_ranks(signal.Signals(number), rank, code, life, after) == faults


def rewrite(path: Path, change) -> None:
    """Save a checkpoint again after `change(tensors, meta)`, with good checksums."""
    tensors, meta = checkpoint.load(path)
    change(tensors, meta)
    checkpoint.save(path, tensors, meta)


def negate_weights(run_dir: Path) -> None:
    def change(tensors, meta):
        tensors["network.value_head.last.weight"] = -tensors["network.value_head.last.weight"]

    rewrite(checkpoint.latest(run_dir / "checkpoints"), change)


def change_pixel(run_dir: Path) -> None:
    """One pixel of the newest frame, packed as it should be."""

    def change(tensors, meta):
        data = bytearray(zlib.decompress(tensors["lane_00001"].numpy().tobytes()))
        data[-1] ^= 1
        tensors["lane_00001"] = torch.frombuffer(bytearray(zlib.compress(bytes(data), 1)), dtype=torch.uint8)

    rewrite(max(FrameStore(run_dir / "checkpoints" / "frames").pieces())[1], change)


def cut_events(run_dir: Path) -> None:
    for path in (run_dir / "tensorboard").iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DIFFERENCES = {
    "network": (negate_weights, "tensor network.value_head.last.weight: differs"),
    "best": (lambda d: rewrite(checkpoint.latest(d / "checkpoints"), lambda _, meta: meta.update(best=0.123)), "best is 0.123"),
    "frames": (change_pixel, "the frames of the ring differ"),
    "row": (lambda d: set_last(d, "losses/loss", 9.0), "the first that differs is row"),
    "summary": (lambda d: (d / "summary.json").write_text("{}"), "summary.json differs"),
    "events": (cut_events, "tensorboard shows"),
    "other end": (lambda d: checkpoint.latest(d / "checkpoints").unlink(), "the last checkpoints are"),
}


def test_two_runs_of_one_seed_are_the_same_but_for_the_clock(complete, copied):
    set_last(copied, "wall_s", 1e6)
    set_last(copied, "time/eta_s", 7.0)
    assert invariants.compare(complete, copied, frames=True) == []


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_any_difference_from_the_untouched_run_is_told(complete, copied, difference):
    damage, says = DIFFERENCES[difference]
    damage(copied)
    (broken,) = invariants.compare(complete, copied, frames=True)
    assert says in broken
