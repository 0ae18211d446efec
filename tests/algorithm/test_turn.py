"""The emulators' turn: taken by another thread it is the same; what fails in it is raised after the iteration, and can be tried again."""

import threading

import pytest
import torch

from speedyzero import state as states
from speedyzero.envs import EnvError, describe
from speedyzero.graph import Turn
from speedyzero.loop import Trainer, train

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


class Failing:
    """An emulators' verb that fails at its n-th call."""

    def __init__(self, verb, at, error):
        self.verb, self.at, self.error, self.calls = verb, at, error, 0

    def __call__(self):
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return self.verb()


def final(run_dir):
    return (run_dir / "metrics.jsonl").read_text(), (run_dir / "eval.json").read_text()


def without_times(text):
    return [line.split('"wall_s"')[0] for line in text.splitlines()]


@pytest.mark.parametrize("env", ["Catch-v0", "CartPole-v1"])
def test_a_turn_taken_by_another_thread_is_the_same_turn(tiny_config, tmp_path, monkeypatch, env):
    config = tiny_config(env=env, run_dir=tmp_path / "inline")
    assert train(config, describe(env), CPU) is None
    monkeypatch.setattr(states, "Turn", ThreadTurn)
    threaded = tiny_config(env=env, run_dir=tmp_path / "threaded")
    assert train(threaded, describe(env), CPU) is None
    first, second = final(config.run_dir), final(threaded.run_dir)
    assert without_times(first[0]) == without_times(second[0])
    assert first[1] == second[1]


@pytest.mark.parametrize(("turn", "verb", "at"), [(Turn, "send", 7), (Turn, "recv", 30), (ThreadTurn, "send", 30), (ThreadTurn, "recv", 1)])
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
    assert final(config.run_dir)[1] == final(whole.run_dir)[1]
    assert without_times(final(config.run_dir)[0])[-1] == without_times(final(whole.run_dir)[0])[-1]


def test_an_iteration_whose_emulators_fail_still_does_all_else(tiny_config):
    trainer = Trainer(tiny_config(), describe("Catch-v0"), CPU)
    trainer.start()
    while trainer.phase() != "train":
        trainer.step(trainer.phase())
    trainer.state.emulators.recv = Failing(trainer.state.emulators.recv, 1, RuntimeError("burst"))
    before, updates = trainer.updates, int(trainer.state.updates)
    trainer.step("train")
    assert (trainer.updates, int(trainer.state.updates)) == (before + 2, updates + 2)
    with pytest.raises(RuntimeError, match=r"^burst$"):
        trainer.state.turn.check()
    trainer.state.turn.check()  # raised once


def test_after_a_failure_the_emulators_are_left_alone_until_it_was_raised(tiny_config):
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
