"""The tools that prove saving: kills come when they should, every broken promise is noticed, and a run keeps them all."""

import contextlib
import csv
import dataclasses
import json
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from speedyzero import checkpoint
from speedyzero.config import preset_config, resolve
from speedyzero.envs import describe
from speedyzero.loop import train
from tests.conftest import TINY

sys.path.insert(0, str(Path(__file__).parents[1] / "tools" / "faults"))

import drift
import kill_test
import moments
import promises
import run as runs
import soak
import watch as watches
from drift import Sample
from moments import Moment, Pace
from promises import Files, Life

TOOLS = Path(drift.__file__).parent
SMALL = ["--preset", "smoke", "--env", "Catch-v0"]


def tool(name: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(TOOLS / f"{name}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_a_run_that_is_killed_again_and_again_ends_as_one_that_was_not(tmp_path):
    done = tool("kill_test", *SMALL, "--kills", "4", "--checkpoint-interval", "10", "--json", str(tmp_path / "report.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["broken"] == []
    assert report["figures"]["kills"] == 4
    assert report["figures"]["lost_max"] < 20
    # A kill in the write of the summary may find that the process has just ended, complete.
    assert sum(life["came"] and life["code"] == -signal.SIGKILL for life in report["lives"]) >= 3
    assert "every promise kept" in done.stdout


def test_a_run_that_is_asked_to_stop_loses_nothing_and_says_so_with_its_exit_code(tmp_path):
    # Tests share their cores: the tool's own bound of 10 s is for a machine of one's own.
    flags = ["--kills", "2", "--signal", "SIGUSR1", "--seed", "3", "--checkpoint-interval", "30", "--alternate-ring", "--heed", "100"]
    done = tool("kill_test", *SMALL, *flags, "--json", str(tmp_path / "report.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["figures"]["lost_max"] == 0
    # The first is heeded for sure; the second, in an evaluation of a moment, may come when all is done.
    codes = [life["code"] for life in report["lives"] if life["came"]]
    assert codes[0] == 138
    assert set(codes[1:]) <= {138, -signal.SIGUSR1, 0}
    assert 0 < report["figures"]["said_s_max"] <= report["figures"]["exit_s_max"] <= 100


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--kills", "0"], "error: --kills 0: must be at least 1"),
        (["--resume"], "error: --resume, --checkpoint-ring: which life has them is decided here; leave them out"),
        (["--run-dir", "."], "error: --run-dir .: exists already; give another folder"),
    ],
)
def test_the_kill_test_refuses_what_it_cannot_do(arguments, says, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["kill_test.py", *arguments])
    with pytest.raises(SystemExit) as left:
        kill_test.main()
    assert left.value.code == says


PACE = Pace(start_s=3.0, iteration_s=0.1, iterations=1000, evaluation_s=2.0, write_s={"checkpoint_*": 0.04, "frames_*": 0.02})


@pytest.mark.parametrize("seed", range(5))
def test_moments_are_of_every_kind_and_spread_over_the_run(seed):
    drawn = moments.draw(random.Random(seed), 50, PACE, 25)
    assert drawn == moments.draw(random.Random(seed), 50, PACE, 25)
    assert drawn[0] == Moment("write", "config.json")
    kinds = [moment.kind for moment in drawn]
    assert kinds.count("write") == 25
    assert kinds.count("clock") + kinds.count("after") + kinds.count("evaluation") == 25
    assert kinds.count("clock") > 8
    assert kinds.count("after") > 3
    assert all(kind in ("write", "evaluation") for kind in kinds[45:])
    assert all(moment.pattern in ("eval.json", "summary.json") for moment in drawn[45:] if moment.kind == "write")
    targets = [moment.iteration for moment in drawn if moment.pattern == "checkpoint_*"]
    assert targets == sorted(targets)
    assert targets[-1] > 700
    # The number of a kill times 1000 / 45, less two intervals.
    assert {moment.iteration for moment in drawn[30:31]} <= {0, 616}
    for moment in drawn:
        longest = {"clock": 8.0, "after": 0.005, "evaluation": 2.0, "write": PACE.write_s.get(moment.pattern, 0.0)}[moment.kind]
        assert 0 <= moment.delay <= longest
    assert max(moment.delay for moment in drawn if moment.kind == "clock") > 4
    assert max(moment.delay for moment in drawn if moment.pattern == "checkpoint_*" and moment.kind == "write") > 0.02


@pytest.fixture
def sleeper(tmp_path):
    """A process that does nothing, as a run."""
    process = subprocess.Popen(["sleep", "60"])
    yield SimpleNamespace(process=process, started=time.monotonic(), said=lambda: "")
    process.kill()
    process.wait()


def write(path: Path) -> None:
    """As `replacing` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    time.sleep(0.05)  # a folder is watched from when it is seen
    path.with_name(path.name + ".tmp").write_bytes(b"half")
    time.sleep(0.05)
    path.with_name(path.name + ".tmp").rename(path)
    time.sleep(0.05)


def came_at(run, folder: Path, moment: Moment, names: list[str], reached: int = 0, limit: float = 5.0) -> list[str] | None:
    """The files that were there when the moment came, while these are written one by one; None if it did not come."""
    with contextlib.closing(watches.Watch(folder)) as watch:
        writer = threading.Thread(target=lambda: [write(folder / name) for name in names])
        run.started = time.monotonic()
        writer.start()
        came = moments.wait(run, watch, moment, reached, 20, limit)
        there = sorted(path.name for path in folder.rglob("*") if path.is_file())
        writer.join()
    return there if came else None


def test_a_moment_within_a_write_comes_while_the_file_is_aside(sleeper, tmp_path):
    names = [f"checkpoints/checkpoint_{i:09d}.safetensors" for i in (10, 20, 30)]
    there = came_at(sleeper, tmp_path, Moment("write", "checkpoint_*", 20), names)
    assert there == ["checkpoint_000000010.safetensors", "checkpoint_000000020.safetensors", "checkpoint_000000030.safetensors.tmp"]


def test_a_moment_after_a_checkpoint_comes_when_it_is_whole_and_not_of_another_file(sleeper, tmp_path):
    names = ["config.json", "checkpoints/frames/frames_000000000.safetensors", "checkpoints/checkpoint_000000010.safetensors"]
    there = came_at(sleeper, tmp_path, Moment("after", "checkpoint_*", 0, 0.001), names)
    assert there == ["checkpoint_000000010.safetensors", "config.json", "frames_000000000.safetensors"]


def test_for_a_write_that_does_not_come_a_later_checkpoint_will_do(sleeper, tmp_path):
    names = [f"checkpoints/checkpoint_{i:09d}.safetensors" for i in (10, 20, 30)]
    there = came_at(sleeper, tmp_path, Moment("write", "frames_*", 0), names)
    assert there == ["checkpoint_000000010.safetensors", "checkpoint_000000020.safetensors"]


def test_a_checkpoint_from_before_counts_as_reached(sleeper, tmp_path):
    assert came_at(sleeper, tmp_path, Moment("write", "frames_*", 5), ["frames_000000000.safetensors"], reached=5) is not None
    (tmp_path / "frames_000000000.safetensors").unlink()
    assert came_at(sleeper, tmp_path, Moment("write", "frames_*", 6), ["frames_000000000.safetensors"], reached=5, limit=0.5) is None


def test_a_moment_by_the_clock_comes_at_its_time_and_not_to_a_run_that_ended(sleeper, tmp_path):
    begin = time.monotonic()
    assert came_at(sleeper, tmp_path, Moment("clock", delay=0.4), []) == []
    assert 0.4 <= time.monotonic() - begin < 2
    sleeper.process.kill()
    sleeper.process.wait()
    assert came_at(sleeper, tmp_path, Moment("clock", delay=0.1), []) is None


def test_a_moment_in_the_evaluation_comes_once_it_was_said_to_begin(sleeper, tmp_path):
    lines = ["env_steps 3", "env_steps 4\nplaying 2 games\n"]
    sleeper.said = lambda: lines.pop(0) if len(lines) > 1 else lines[0]
    assert came_at(sleeper, tmp_path, Moment("evaluation"), []) == []
    lines[:] = ["displaying 2 games"]
    assert came_at(sleeper, tmp_path, Moment("evaluation"), [], limit=0.2) is None


def test_the_pace_is_that_of_the_files_as_they_appear(tmp_path):
    code = """
import pathlib, sys, time
time.sleep(0.5)
for name in ("config.json", "checkpoint_000000004.safetensors", "checkpoint_000000010.safetensors", "eval.json"):
    path = pathlib.Path(sys.argv[1], name)
    path.with_name(name + ".tmp").write_bytes(b"")
    time.sleep(0.2)
    path.with_name(name + ".tmp").rename(path)
    time.sleep(0.3)
"""
    with contextlib.closing(watches.Watch(tmp_path)) as watch:
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
        pace = moments.measured(SimpleNamespace(process=process, started=time.monotonic()), watch)
    assert pace.iterations == 10
    assert pace.write_s.keys() == {"config.json", "checkpoint_*", "eval.json"}
    assert all(0.15 < seconds < 0.4 for seconds in pace.write_s.values())
    assert 0.6 < pace.start_s < 2
    assert pace.iteration_s == pytest.approx(0.1, rel=0.3)
    assert pace.evaluation_s == pytest.approx(0.5, rel=0.3)


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
    """A copy of it that may be spoilt."""
    return Path(shutil.copytree(complete, tmp_path / "copy"))


def rewrite(path: Path, change) -> None:
    """Write a checkpoint anew after `change(tensors, meta)`, with good checksums."""
    tensors, meta = checkpoint.load(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors, meta)
    checkpoint.save(path, tensors, meta)


def test_a_whole_run_is_found_whole(complete):
    files = promises.inspect(complete)
    assert files.broken == []
    assert files.leftovers == []
    assert files.complete
    newest = checkpoint.latest(complete / "checkpoints")
    meta = checkpoint.read_meta(newest)
    assert (files.newest, files.counts) == (meta["iterations"], {"env_steps": meta["env_steps"], "updates": meta["updates"]})
    assert files.last_row == files.newest
    assert meta["slots"] > meta["config"]["ring_positions"] // meta["config"]["lanes"]  # the ring is full


def test_what_a_kill_may_leave_is_no_fault(copied):
    (copied / "summary.json").unlink()
    (copied / "checkpoints" / "checkpoint_000000999.safetensors.tmp").write_bytes(b"half")
    with open(copied / "metrics.jsonl", "ab") as file:
        file.write(b'{"env_steps": 12, "upd')
    files = promises.inspect(copied)
    assert files.broken == []
    assert files.leftovers == ["checkpoints/checkpoint_000000999.safetensors.tmp"]
    assert not files.complete
    assert promises.inspect(copied.with_name("nothing")) == Files()


def spoil_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 8
    path.unlink()  # best.safetensors may be the same file
    path.write_bytes(data)


def metrics(run_dir: Path, change) -> None:
    """Change the lines of metrics.jsonl."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    change(lines)
    (run_dir / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))


def set_in_last(name: str, value) -> object:
    def change(lines: list[str]) -> None:
        lines[-1] = json.dumps(json.loads(lines[-1]) | {name: value})

    return change


FAULTS = {
    "torn checkpoint": (lambda d: spoil_byte(checkpoint.latest(d / "checkpoints")), "is damaged"),
    "cut checkpoint": (lambda d: checkpoint.by_iteration(d / "checkpoints")[0].write_bytes(b"x" * 99), "is damaged"),
    "torn best": (lambda d: (d / "checkpoints/best.safetensors").write_bytes(b""), "best.safetensors is damaged"),
    "torn frames": (lambda d: spoil_byte(next((d / "checkpoints/frames").iterdir())), "is damaged"),
    "another's iteration": (
        lambda d: shutil.copy(checkpoint.latest(d / "checkpoints"), d / "checkpoints/checkpoint_000009999.safetensors"), "holds iteration",
    ),
    "put aside": (lambda d: (d / "checkpoints/checkpoint_000000001.safetensors.damaged").write_bytes(b""), "what is it?"),
    "torn json": (lambda d: (d / "eval.json").write_text('{"mean": '), "eval.json: Expecting value"),
    "torn row": (lambda d: metrics(d, lambda lines: lines.insert(3, lines[3][:50])), "metrics.jsonl: line 4"),
    "no row": (lambda d: metrics(d, lambda lines: lines.insert(3, "[]")), "line 4: not a row"),
    "row twice": (lambda d: metrics(d, lambda lines: lines.append(lines[-1])), "metrics.jsonl: iteration"),
    "clock back": (lambda d: metrics(d, set_in_last("wall_s", 0.0)), "wall_s falls to 0.0"),
    "steps back": (lambda d: metrics(d, set_in_last("env_steps", 3)), "env_steps falls to 3"),
    "updates back": (lambda d: metrics(d, set_in_last("updates", 0)), "updates falls to 0"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_no_kill_may_leave_is_a_fault(copied, fault):
    spoil, says = FAULTS[fault]
    spoil(copied)
    broken = promises.inspect(copied).broken
    assert len(broken) == 1
    assert says in broken[0]


def rows(*iterations: int) -> list[dict]:
    return [{"iteration": i, "env_steps": 8 * i, "updates": i, "wall_s": float(i)} for i in iterations]


BEFORE = Files(newest=50, counts={"env_steps": 400, "updates": 50}, rows=rows(40, 50, 60))
SAID = "resumed /x at iteration 50: 400 steps, 50 updates\nenv_steps 480/900\n"


def test_a_life_that_goes_on_where_the_last_one_saved_breaks_nothing():
    life = promises.follow(BEFORE, Files(newest=75, rows=rows(40, 50, 60, 70, 80)), SAID, 25)
    assert life == Life(begun=True, resumed_at=50, last_line="env_steps 480/900")
    # Killed before it said anything: the rows from before may still be there.
    assert promises.follow(BEFORE, BEFORE, "", 25) == Life()
    assert promises.follow(Files(), Files(newest=0, rows=rows(10, 20, 49)), "env_steps 8/900", 25).broken == []
    stopped = promises.follow(BEFORE, BEFORE, SAID + "stopped by SIGTERM at iteration 61 and saved; go on with --resume --run-dir /x\n", 25)
    assert (stopped.stopped_by, stopped.stopped_at) == ("SIGTERM", 61)
    stopped = promises.follow(BEFORE, BEFORE, "stopped by SIGINT, nothing is lost; go on with --resume --run-dir /x\n", 25)
    assert (stopped.stopped_by, stopped.stopped_at, stopped.begun) == ("SIGINT", None, False)
    assert promises.follow(BEFORE, BEFORE, "checkpoints/frames/x is missing; the frames come from replaying the emulators\n", 25).replayed


LATER = Files(newest=75, rows=rows(40, 50, 60, 70, 80))


@pytest.mark.parametrize(
    ("after", "said", "says"),
    [
        (LATER, SAID.replace("iteration 50: 400 steps, 50", "iteration 25: 200 steps, 25"), "resumed at iteration 25, though 50 was saved"),
        (LATER, SAID.replace("400 steps", "392 steps"), "resumed at 392 steps and 50 updates"),
        (LATER, SAID.replace("50 updates", "49 updates"), "resumed at 400 steps and 49 updates"),
        (Files(newest=75, rows=rows(50, 60, 70, 80)), SAID, "rows up to iteration 50 are not those from before"),
        (Files(newest=75, rows=[*rows(40, 50), rows(60)[0] | {"env_steps": 399}]), SAID, "iteration 60 has less than 400 steps"),
        (Files(newest=75, rows=[*rows(40, 50), rows(60)[0] | {"updates": 49}]), SAID, "iteration 60 has less than 400 steps"),
        (Files(newest=25, rows=rows(40, 50, 60)), SAID, "the newest checkpoint is of iteration 25, and was of 50"),
        (Files(newest=50, rows=rows(40, 50, 60, 100)), SAID, "iteration 100 is logged and 50 saved"),
        (LATER, "/x/checkpoint_1 is damaged (cut); trying the one before\n" + SAID, "it said: /x/checkpoint_1 is damaged"),
        (LATER, SAID + "/x/metrics.jsonl: dropped 2 unreadable or repeated rows\n", "it said: /x/metrics.jsonl: dropped 2"),
        (LATER, SAID + "the checkpoint was not written (No space left)\n", "it said: the checkpoint was not"),
    ],
)
def test_a_life_that_breaks_a_promise_is_told(after, said, says):
    broken = promises.follow(BEFORE, after, said, 25).broken
    assert len(broken) == 1
    assert says in broken[0]


DONE = Life(begun=True, resumed_at=50, stopped_at=61, stopped_by="SIGTERM", last_line="stopped by SIGTERM")
STOPPED = Files(newest=61, rows=rows(50, 60))


def test_an_end_that_keeps_its_promises_is_none_to_tell_of():
    term, kill = signal.SIGTERM, signal.SIGKILL
    assert promises.end(term, 143, DONE, STOPPED) == []
    assert promises.end(term, 143, Life(stopped_by="SIGTERM"), BEFORE) == []
    assert promises.end(term, -15, Life(), BEFORE) == []
    assert promises.end(term, 0, Life(begun=True), Files(complete=True)) == []
    assert promises.end(term, -15, Life(begun=True), Files(complete=True)) == []
    assert promises.end(kill, 0, Life(begun=True), Files(complete=True)) == []


@pytest.mark.parametrize(
    ("number", "code", "life", "after", "says"),
    [
        (15, -15, DONE, STOPPED, "did not heed SIGTERM"),
        (15, 143, dataclasses.replace(DONE, stopped_by="SIGINT"), STOPPED, "exit code 143, but it said: stopped by SIGTERM"),
        (15, 143, DONE, dataclasses.replace(STOPPED, newest=60), "stopped at iteration 61, saved is 60"),
        (15, 143, DONE, Files(newest=61, rows=rows(60, 62)), "iteration 62 was logged, and 61 saved"),
        (15, 143, DONE, dataclasses.replace(STOPPED, leftovers=["a.tmp"]), "left a.tmp"),
        (15, 1, Life(last_line="error: --run-dir"), BEFORE, "exit code 1: error: --run-dir"),
        (15, 138, DONE, STOPPED, "exit code 138: stopped by SIGTERM"),
        (15, 0, DONE, STOPPED, "exit code 0: stopped by SIGTERM"),
        (9, 1, Life(), Files(complete=True), "exit code 1: it said nothing"),
        (9, 0, Life(), BEFORE, "exit code 0: it said nothing"),
    ],
)
def test_an_end_that_breaks_a_promise_is_told(number, code, life, after, says):
    assert promises.end(signal.Signals(number), code, life, after) == [says]


def test_two_runs_of_one_seed_are_the_same_but_for_the_clock(complete, copied):
    metrics(copied, set_in_last("wall_s", 1e6))
    metrics(copied, set_in_last("time/eta_s", 7.0))
    assert promises.compare(complete, copied, frames=True) == []


def spoil_tensor(name: str, change):
    return lambda d: rewrite(checkpoint.latest(d / "checkpoints"), lambda tensors, meta: change(tensors, name))


def flip(tensors: dict, name: str) -> None:
    tensors[name].view(-1).view(torch.uint8)[0] ^= 1


def negate(tensors: dict, name: str) -> None:
    zero = tensors[name].view(-1)[(tensors[name] == 0).view(-1).nonzero()[0]]
    assert torch.equal(-zero, zero)
    tensors[name].view(-1)[(tensors[name] == 0).view(-1).nonzero()[0]] = -zero


def spoil_frames(run_dir: Path) -> None:
    """One pixel of the newest frame, packed as it should be."""
    _, path = max(promises.FrameStore(run_dir / "checkpoints" / "frames").pieces())

    def change(tensors, meta):
        data = bytearray(zlib.decompress(tensors["lane_00001"].numpy().tobytes()))
        data[-1] ^= 1
        tensors["lane_00001"] = torch.frombuffer(bytearray(zlib.compress(bytes(data), 1)), dtype=torch.uint8)

    rewrite(path, change)


def spoil_events(run_dir: Path) -> None:
    """The last row is in none of the files any more."""
    (path,) = (run_dir / "tensorboard").iterdir()
    path.write_bytes(path.read_bytes()[:-200])


def spoil_json(name: str, key: str, value) -> object:
    return lambda d: (d / name).write_text(json.dumps(json.loads((d / name).read_text()) | {key: value}))


DIFFERENCES = {
    "network": (spoil_tensor("network.value_head.last.weight", flip), "tensor network.value_head.last.weight: differs"),
    "momentum": (spoil_tensor("momentum.value_head.last.weight", flip), "tensor momentum.value_head.last.weight: differs"),
    "generator": (spoil_tensor("generator", flip), "tensor generator: differs"),
    "ring": (spoil_tensor("ring.action", flip), "tensor ring.action: differs"),
    "sign of a zero": (spoil_tensor("ring.reward", negate), "tensor ring.reward: differs"),
    "missing": (spoil_tensor("recent", lambda tensors, name: tensors.pop(name)), "tensor recent: in one of the two only"),
    "best": (lambda d: rewrite(checkpoint.latest(d / "checkpoints"), lambda _, meta: meta.update(best=0.123)), "best is 0.123"),
    "frames": (spoil_frames, "the frames of the ring differ"),
    "row": (lambda d: metrics(d, set_in_last("losses/loss", 9.0)), "the first that differs is row"),
    "row missing": (lambda d: metrics(d, lambda lines: lines.pop(4)), "rows, not"),
    "eval": (spoil_json("eval.json", "mean", 0.9), "eval.json differs"),
    "summary": (spoil_json("summary.json", "episodes", 1), "summary.json differs"),
    "frames gone": (lambda d: max(promises.FrameStore(d / "checkpoints" / "frames").pieces())[1].write_bytes(b""), "is damaged"),
    "events": (spoil_events, "tensorboard shows"),
    "other end": (lambda d: checkpoint.latest(d / "checkpoints").unlink(), "the last checkpoints are"),
}


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_whatever_differs_from_the_untouched_run_is_told(complete, copied, difference):
    spoil, says = DIFFERENCES[difference]
    spoil(copied)
    broken = promises.compare(complete, copied, frames=True)
    assert says in broken[0]
    # A row or an event that is gone is missed by whoever compares with rows or with events.
    assert len(broken) <= (2 if difference == "row missing" else 1)


def test_events_of_other_numbers_or_iterations_are_told(complete, copied, monkeypatch):
    events = promises._events(copied)
    other = [*events[:-1], dataclasses.replace(events[-1], value=events[-1].value + 1)]
    monkeypatch.setattr(promises, "_events", lambda run_dir: other)
    assert promises.compare(complete, copied, frames=False) == ["tensorboard shows other env_steps than metrics.jsonl"]
    other[-1] = dataclasses.replace(events[-1], step=events[-1].step + 1)
    assert promises.compare(complete, copied, frames=False) == [
        f"tensorboard shows {len(events)} rows of other iterations than the {len(events)} of metrics.jsonl"
    ]


def test_what_need_not_be_the_same_is_not_compared(complete, copied):
    spoil_frames(copied)
    DIFFERENCES["best"][0](copied)
    assert promises.compare(complete, copied, frames=False, metas=False) == []


def samples(count: int = 100, **change) -> list[Sample]:
    """An hour of a run that does not drift, one every 36 s; `change` maps a field to what is added to it, by the share of the hour."""
    made = []
    for number in range(count):
        part = number / (count - 1)
        fair = Sample(
            seconds=3600 * part, rss_mb=700.0, fds=4, threads=7, cpu_s=40.0 * number, iteration=100 * number,
            env_steps=800 * number, updates=100 * number, metrics_bytes=18_000 * number, tensorboard_bytes=12_000 * number,
            checkpoints_bytes=6_000_000,
        )  # fmt: skip
        made.append(dataclasses.replace(fair, **{name: getattr(fair, name) + more(part) for name, more in change.items()}))
    return made


def test_figures_of_made_up_samples_are_those_worked_out_by_hand():
    found = drift.figures(samples(rss_mb=lambda part: 4 * part, fds=lambda part: 2 * (0.1 < part < 0.11)), 5)
    assert found["hours"] == pytest.approx(1)
    assert found["iterations"] == 9900
    assert found["rss_mb_per_hour"] == pytest.approx(4)
    assert found["rss_mb_first"] == pytest.approx(700 + 4 * 10 / 99)
    assert found["rss_mb_last"] == pytest.approx(700 + 4 * 90 / 99)
    assert (found["fds_first"], found["fds_last"], found["fds_least"], found["fds_most"]) == (4, 4, 4, 6)
    assert found["cpu_s_per_iteration_first"] == pytest.approx(0.4)
    assert found["cpu_s_per_iteration_last"] == pytest.approx(0.4)
    assert found["metrics_bytes_per_row_last"] == pytest.approx(900)
    assert found["tensorboard_bytes_per_row_first"] == pytest.approx(600)
    assert found["checkpoints_mb_last"] == 6


def judged(**change) -> list[str]:
    """The names of the bounds that made-up samples break."""
    return [verdict.name for verdict in drift.verdicts(drift.figures(samples(**change), 5)) if not verdict.kept]


CPU = "CPU time of an iteration, last fifth by first"


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({}, []),
        ({"rss_mb": lambda part: 9 * part}, []),
        ({"rss_mb": lambda part: -50 * part}, []),
        ({"rss_mb": lambda part: 11 * part}, ["memory, trend"]),
        ({"rss_mb": lambda part: 30 * part}, ["memory, trend", "memory, last fifth by first"]),
        ({"rss_mb": lambda part: 15 * (part > 0.8) - 60 * (0.5 < part < 0.75)}, ["memory, last fifth by first"]),
        ({"fds": lambda part: 3 * (int(100 * part) % 7 == 1)}, []),
        ({"fds": lambda part: int(part > 0.6)}, ["open files"]),
        ({"fds": lambda part: 5 * (0.4 < part < 0.42)}, ["open files"]),
        ({"threads": lambda part: int(0.4 < part < 0.42)}, ["threads"]),
        ({"cpu_s": lambda part: 200 * part**2}, []),
        ({"cpu_s": lambda part: 400 * part**2}, [CPU]),
        ({"cpu_s": lambda part: -400 * part**2}, [CPU]),
    ],
)
def test_a_drift_breaks_its_bound_and_no_other(change, broken):
    assert judged(**change) == broken


def test_samples_count_once_the_ring_is_full_and_the_start_is_over():
    made = samples(101)  # one every 36 s, 800 steps each
    assert drift.settled(made, 4000) == made[10:]
    assert drift.settled(made, 20_000) == made[25:]
    late = [dataclasses.replace(sample, updates=0 if number < 40 else 1) for number, sample in enumerate(made)]
    assert drift.settled(late, 0) == made[40:] or drift.settled(late, 0)[0].iteration == 4000
    unsaved = [dataclasses.replace(sample, checkpoints_bytes=0 if number < 30 else 1) for number, sample in enumerate(made)]
    assert drift.settled(unsaved, 0)[0].iteration == 3000
    assert drift.settled([], 4000) == []
    with pytest.raises(ValueError, match="9 samples after the warm-up: ten are needed"):
        drift.figures(made[:9], 5)


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
def test_the_soak_refuses_what_it_cannot_do(arguments, says, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["soak.py", *arguments])
    with pytest.raises(SystemExit) as left:
        soak.main()
    assert left.value.code == says
    assert not Path("new").exists()


def test_what_a_run_says_is_kept_with_what_was_said_before_and_told_alone(tmp_path):
    (tmp_path / "output.txt").write_text("before\n")
    run = runs.Run(["--env", "NoSuch-v0"], tmp_path / "output.txt")
    assert run.process.wait(120) == 1
    assert run.last_line().startswith("error: --env NoSuch-v0")
    assert "before" not in run.said()
    assert (tmp_path / "output.txt").read_text() == "before\n" + run.said()
    run.end()


def test_a_torn_last_line_is_no_row_and_any_other_is_a_fault():
    good = b'{"iteration": 1, "env_steps": 8, "updates": 0}\n'
    assert runs.rows_of(b"") == ([], [])
    assert runs.rows_of(good + good[:-9]) == ([json.loads(good)], [])
    found, wrong = runs.rows_of(good[:-9] + b"\n" + good + b'{"iteration": 1.0, "env_steps": 8, "updates": 0}\n')
    assert found == [json.loads(good)]
    assert [line.partition(":")[0] for line in wrong] == ["line 1", "line 3"]
