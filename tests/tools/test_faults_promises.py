"""tools/faults/promises.py: every broken promise is told, in the files, in what a run says, in how it ends and beside an untouched run."""

import dataclasses
import json
import shutil
import signal
import zlib
from pathlib import Path

import pytest
import torch

from speedyzero.config import preset_config, resolve
from speedyzero.envs import describe
from speedyzero.loop import train
from speedyzero.run import checkpoint
from tests.conftest import TINY
from tests.tools.faults_support import promises

Files, Life = promises.Files, promises.Life


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
