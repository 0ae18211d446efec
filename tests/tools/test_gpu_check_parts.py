"""The parts of tools/profile/gpu_check.py at work: what makes them fail, and the full ring that nobody played."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

# Last, since trace.py there has the name of a module of Python's own.
sys.path.append(str(Path(__file__).parents[2] / "tools" / "profile"))

from checks import capture, emulators, parity, speed, train, trainers
from checks.clock import Clock
from checks.compare import Deviation
from checks.job import Job, Record

from speedyzero import ring as replay
from speedyzero.envs import describe
from speedyzero.refresh import sweep
from speedyzero_kernels import dispatch, support


@pytest.fixture
def record(tmp_path):
    return Record(tmp_path / "part.json")


def job_of(config, out, seconds: float = 1e9, cuda: bool | None = None) -> Job:
    """A job with that many seconds left; `cuda`: with the counts of a card all the same."""
    job = Job(config, describe(config.env), (), out, 0.0)
    fields = {name: getattr(job, name) for name in ("config", "spec", "arguments", "out", "device")}
    on_cuda = job.cuda if cuda is None else cuda
    return SimpleNamespace(**fields, cuda=on_cuda, left=lambda: seconds, pick=lambda card, toy: card if on_cuda else toy)


# parity


@pytest.fixture
def two_operations(monkeypatch):
    monkeypatch.setattr(parity, "MAKERS", {name: parity.MAKERS[name] for name in ("to_scalar", "root_prior")})


def test_a_kernel_that_is_off_fails_and_the_other_operations_are_compared_all_the_same(
    tiny_config, tmp_path, record, monkeypatch, two_operations
):
    right, asked = support.to_scalar_kernel, dispatch.runs_kernel
    monkeypatch.setattr(support, "to_scalar_kernel", lambda logits: right(logits) * 1.001)
    parity.run(job_of(tiny_config(), tmp_path), record)
    assert len(record.failures) == 1
    assert record.failures[0].startswith("to_scalar, out 0: ")
    assert not record.results["operations"]["to_scalar"]["out 0"]["passed"]
    assert all(one["passed"] for one in record.results["operations"]["root_prior"].values())
    assert dispatch.runs_kernel is asked


def test_an_operation_that_raises_is_one_line(tiny_config, tmp_path, record, monkeypatch, two_operations):
    def broken(logits):
        raise RuntimeError("misaligned address\nand a long story")

    monkeypatch.setattr(support, "to_scalar_kernel", broken)
    parity.run(job_of(tiny_config(), tmp_path), record)
    assert record.failures == ["to_scalar: RuntimeError: misaligned address"]
    assert "root_prior" in record.results["operations"]


def test_parity_that_runs_out_of_time_says_what_it_left_out(tiny_config, tmp_path, record, two_operations):
    parity.run(job_of(tiny_config(), tmp_path, seconds=0), record)
    assert record.failures == ["to_scalar and 1 more were not compared: out of time"]


@pytest.mark.parametrize(
    ("dtype", "relative", "passed"),
    [
        (torch.float32, 9e-5, True), (torch.float32, 2e-4, False), (torch.float64, 2e-9, False), (torch.bfloat16, 0.015, True),
        (torch.int64, 0.0, True), (torch.bool, 1e-12, False),
    ],
)  # fmt: skip
def test_each_dtype_has_a_bound_and_integers_have_none(dtype, relative, passed):
    assert parity.passes(dtype, Deviation(False, int(relative > 0), relative, relative)) is passed


# capture


def test_the_capture_is_judged_against_the_uncaptured_run_and_the_yardstick_is_not(tiny_config, tmp_path, record, monkeypatch):
    action, weight = torch.zeros(4, dtype=torch.int64), torch.ones(4)
    runs = iter([
        {"ring.action": action, "weight": weight}, {"ring.action": action, "weight": weight + 1e-4},
        {"ring.action": action + 1, "weight": weight + 1},
    ])  # fmt: skip
    asked = []
    monkeypatch.setattr(capture, "play", lambda job, graph: (asked.append(graph), (next(runs), {"train R 8": 20}))[1])
    capture.run(job_of(tiny_config(), tmp_path, cuda=True), record)
    assert asked == ["off", "on", "off"]
    assert record.failures == []
    assert record.results["captured"]["deviations"]["weight"]["largest"] == pytest.approx(1e-4, rel=1e-2)
    assert record.results["captured"]["bitwise"] == 1
    assert record.results["yardstick"]["beyond_the_bound"] == ["ring.action", "weight"]


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


# trainers


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
    index = sweep(ring, config.refresh_roots, config.frame_stack)
    assert index.unique().numel() == config.refresh_roots
    done = int(trainer.state.updates)
    assert trainers.once(trainer, "train", config.refresh_roots) > 0
    assert int(trainer.state.updates) == done + config.updates_per_iteration
    assert int(trainer.state.learner.skipped) == 0


def test_what_an_emulator_raises_comes_out_of_a_timed_iteration(tiny_config, monkeypatch):
    config = tiny_config()
    trainer = trainers.filled(config, describe(config.env))

    def burst():
        raise RuntimeError("burst")

    monkeypatch.setattr(trainer.state.emulators, "recv", burst)
    with pytest.raises(RuntimeError, match="burst"):
        trainers.once(trainer, "train", 16)


# speed


@pytest.mark.parametrize(
    ("growth", "failures"),
    [
        ({"rss": 2**20, "allocated": 0, "reserved": 0}, []),
        ({"rss": 2**26, "allocated": 0, "reserved": 0}, ["memory: rss changed by 67108864 bytes over 1000 iterations of training"]),
        ({"rss": 0, "allocated": 512, "reserved": 0}, ["memory: allocated changed by 512 bytes over 1000 iterations of training"]),
        ({"rss": 0, "allocated": 0, "reserved": -2**21}, ["memory: reserved changed by -2097152 bytes over 1000 iterations of training"]),
    ],
)
def test_memory_that_changes_fails(tiny_config, tmp_path, record, monkeypatch, growth, failures):
    held = iter([dict.fromkeys(growth, 2**30), {name: 2**30 + more for name, more in growth.items()}])
    monkeypatch.setattr(speed, "memory", lambda device: next(held))
    monkeypatch.setattr("checks.clock.once", lambda trainer, phase, roots: 0.01)
    clock = Clock(None, captures=True)
    clock.calls = {("train", 512): [1.0, 1.0, 0.5], ("train", 64): [1.0, 1.0, 0.5, 0.5], ("sweep", 8): [1.0]}
    speed.watch_memory(job_of(tiny_config(), tmp_path, cuda=True), record, clock)
    assert record.failures == failures
    assert record.results["memory"]["growth"] == growth
    assert len(clock.calls["train", 64]) == 1004


# emulators


def test_a_closed_gate_leaves_the_turn_out_and_an_open_one_times_it(tiny_config, tmp_path):
    config = tiny_config()
    trainer = trainers.filled(config, describe(config.env))
    gate, before = emulators.Gate(trainer.state.emulators), trainer.state.emulators.transitions
    frames = trainer.state.emulators.frames.clone()
    gate.open = False
    for _ in range(3):
        trainers.once(trainer, "train", 16)
    assert trainer.state.emulators.transitions == before
    assert torch.equal(trainer.state.emulators.frames, frames)
    assert gate.send_s == gate.recv_s == []
    gate.open = True
    trainers.once(trainer, "train", 16)
    assert not torch.equal(trainer.state.emulators.frames, frames)
    assert len(gate.send_s) == len(gate.recv_s) == 1


def test_pairs_differ_by_a_turn_that_nothing_hides_and_the_order_changes(monkeypatch):
    gate = SimpleNamespace(open=True, send_s=[9.0], recv_s=[9.0])
    order = []

    def once(trainer, phase, roots):
        order.append(gate.open)
        if gate.open:
            gate.send_s.append(0.001)
            gate.recv_s.append(0.002)
        return 0.015 if gate.open else 0.01

    monkeypatch.setattr(emulators, "once", once)
    found = emulators.pairs(None, gate, 8, most=4, left=lambda: 1.0)
    assert order == [False, True, True, False, False, True, True, False]
    assert found["differences_ms"] == pytest.approx([5.0] * 4)
    assert (found["send_in_place_ms"], found["recv_in_place_ms"]) == pytest.approx((1.0, 2.0))
    assert gate.open
    assert emulators.pairs(None, gate, 8, most=40, left=lambda: 0.0)["pairs"] == 3


def test_a_card_is_measured_with_many_lanes_too(tiny_config, tmp_path, record, monkeypatch):
    monkeypatch.setattr(emulators, "MANY", 8)
    config = tiny_config(start_transitions=80, ring_positions=96, env_steps=400)
    job = job_of(config, tmp_path, cuda=True)
    job.pick = lambda card, toy: 3
    emulators.run(job, record)
    assert set(record.results) == {"lanes_4", "lanes_8"}
    assert sum("a turn takes" in line for line in record.lines) == 4
    monkeypatch.setattr(emulators, "MANY", 64)
    emulators.run(job, record)
    assert "64 lanes: not measured, these settings do not go with as many" in record.lines[-1]


# train


def row(iteration: int, steps: int, updates: int) -> dict:
    return {"iteration": iteration, "env_steps": steps, "updates": updates, "wall_s": 0.0, "losses/loss": 1.0}


ROWS = [row(10, 80, 0), row(20, 160, 10), row(30, 240, 20)]


class FakeLeg:
    """A process that ends as it is told, while it writes a row."""

    codes: list[int]

    def __init__(self, job, run_dir, flags, name):
        run_dir.mkdir(exist_ok=True)
        self.begin, self.flags, self.log = 0.0, flags, Path(f"{name}.log")
        self.process = SimpleNamespace(returncode=self.codes.pop(0))
        with (run_dir / "metrics.jsonl").open("a") as file:
            for line in ROWS if name == "first" else [row(40, 320, 30)]:
                file.write(json.dumps(line) + "\n")
            file.write('{"iteration": 50, "env_' if name == "resumed" else "")

    def wait(self, over):
        return ROWS

    def stop(self, limit):
        return 0.5

    def last_line(self):
        return "error: something"


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        ([0], "train: the run was complete before it could be stopped; give more --env-steps"),
        ([70], "train: exit code 70 after SIGTERM, not 143 (error: something); see first.log"),
        ([143, 1], "train: exit code 1 after the resume, not 143 or 0 (error: something); see resumed.log"),
    ],
)
def test_a_run_that_does_not_end_as_it_should_fails(tiny_config, tmp_path, record, monkeypatch, codes, said):
    monkeypatch.setattr(FakeLeg, "codes", list(codes), raising=False)
    monkeypatch.setattr(train, "Leg", FakeLeg)
    train.run(job_of(tiny_config(), tmp_path, seconds=10.0), record)
    assert record.failures[0].startswith(said)
