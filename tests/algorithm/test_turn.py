"""The emulators' turn: taken by another thread it is the same; what fails in it is raised after the iteration, and can be tried again."""

import threading

import pytest
import torch

from speedyzero import state as states
from speedyzero.envs import EnvError, describe
from speedyzero.graph import Turn
from speedyzero.loop import train

CPU = torch.device("cpu")


class ThreadTurn(Turn):
    """As on CUDA: one callback that sends and receives, run by a thread that is not ours, between `begin` and `end`."""

    def begin(self):
        self.taker = threading.Thread(target=self._take)
        self.taker.start()

    def _take(self):
        self.attempt(self.emulators.send)
        self.attempt(self.emulators.recv)

    def end(self):
        self.taker.join()


class EarlyTurn(Turn):
    """Emulators as fast as can be: their buffers hold the step before anything else of the iteration is done."""

    def begin(self):
        self.attempt(self.emulators.send)
        self.attempt(self.emulators.recv)

    def end(self):
        pass


class LateTurn(Turn):
    """As `--graph split` at its slowest: what comes after the actions is all done before the emulators hear of them."""

    def begin(self):
        pass

    def end(self):
        self.attempt(self.emulators.send)
        self.attempt(self.emulators.recv)


class Failing:
    """An emulators' verb that fails at its n-th call."""

    def __init__(self, verb, at, error):
        self.verb, self.at, self.error, self.calls = verb, at, error, 0

    def __call__(self):
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return self.verb()


def scores(run_dir):
    return (run_dir / "eval.json").read_text()


def without_times(run_dir):
    return [line.split('"wall_s"')[0] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_whoever_takes_the_turn_and_however_long_it_takes_the_run_is_the_same(tiny_config, tmp_path, monkeypatch):
    ends = []
    for turn in (Turn, ThreadTurn, EarlyTurn, LateTurn):
        monkeypatch.setattr(states, "Turn", turn)
        config = tiny_config(env="CartPole-v1", run_dir=tmp_path / turn.__name__)
        assert train(config, describe(config.env), CPU) is None
        ends.append((without_times(config.run_dir), scores(config.run_dir)))
    assert all(end == ends[0] for end in ends)


@pytest.mark.parametrize(("turn", "verb", "at"), [(Turn, "send", 7), (Turn, "recv", 30), (ThreadTurn, "recv", 1)])
def test_a_failed_step_is_saved_before_it_and_tried_again_by_the_resumed_run(tiny_config, tmp_path, monkeypatch, turn, verb, at):
    """At step 1 nothing was played yet, at 7 it is the random start, at 30 training. The resumed run ends as one that never failed."""
    whole = tiny_config(run_dir=tmp_path / "whole")
    assert train(whole, describe("Catch-v0"), CPU) is None
    monkeypatch.setattr(states, "Turn", turn)
    allocate = states.allocate

    def allocate_failing(*arguments):
        state = allocate(*arguments)
        failing = Failing(getattr(state.emulators, verb), at, RuntimeError("the emulator burst"))
        monkeypatch.setattr(state.emulators, verb, failing)
        return state

    config = tiny_config(run_dir=tmp_path / "broken")
    with monkeypatch.context() as patched:
        patched.setattr("speedyzero.loop.allocate", allocate_failing)
        with pytest.raises(EnvError, match=r"^the emulator burst; saved: .* --resume --run-dir .*broken$") as raised:
            train(config, describe("Catch-v0"), CPU)
    assert isinstance(raised.value.__cause__, RuntimeError)
    assert train(tiny_config(run_dir=config.run_dir, resume=True), describe("Catch-v0"), CPU) is None
    assert scores(config.run_dir) == scores(whole.run_dir)
    assert without_times(config.run_dir)[-1] == without_times(whole.run_dir)[-1]


def test_after_a_failure_the_emulators_are_left_alone_until_it_was_raised():
    calls = []

    class Emulators:
        def send(self):
            raise RuntimeError("first")

        def recv(self):
            calls.append("recv")

        def withdraw(self):
            calls.append("withdraw")

    turn = Turn(Emulators())
    turn.begin()
    turn.end()
    assert calls == []
    with pytest.raises(RuntimeError, match=r"^first$"):
        turn.check()
    assert calls == ["withdraw"]
    turn.check()  # raised once
