"""Whole runs: the same seed gives the same run, a resumed run is the run that was not stopped, and what a run leaves behind."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from speedyzero.envs import describe
from speedyzero.evaluate import evaluate_run
from speedyzero.loop import RECENT_GAMES, Trainer, train
from speedyzero.run import checkpoint, resume
from speedyzero.run.guard import Interrupt
from tests.runs import resumed, save

CPU = torch.device("cpu")


def rows(run_dir):
    """The rows of metrics.jsonl without what depends on the clock."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "wall_s" and not k.startswith("time/")} for line in lines]


def finish(trainer):
    while (phase := trainer.phase()) is not None:
        trainer.step(phase)
    return trainer


def new(config):
    trainer = Trainer(config, describe(config.env, frame_size=config.frame_size, gray=config.gray), CPU)
    trainer.start()
    return trainer


def everything(trainer):
    """All tensors of a run's state, and the emulators' buffers."""
    names = ("frames", "reward", "done", "first", "actions")
    return {**trainer.state.tensors(), **{name: getattr(trainer.state.emulators, name) for name in names}}


def assert_same(mine, theirs):
    for (name, a), b in zip(everything(mine).items(), everything(theirs).values(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(mine.state.generator.get_state(), theirs.state.generator.get_state())
    assert mine.metrics() == theirs.metrics()


GUMBEL = {"search": "gumbel", "refresh": "sampled", "optimizer": "clipped-lars"}


@pytest.mark.parametrize("settings", [{}, {**GUMBEL, "lanes": 3}])
def test_the_same_seed_gives_the_same_metrics_bit_for_bit_and_another_gives_others(tiny_config, tmp_path, settings):
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert train(tiny_config(run_dir=tmp_path / name, seed=seed, **settings), describe("Catch-v0"), CPU) is None
        runs.append((rows(tmp_path / name), checkpoint.load(checkpoint.latest(tmp_path / name / "checkpoints"))[0]))
    (a, weights), (b, same), (c, _) = runs
    assert a == b != c
    assert len(a) > 5
    assert all(torch.equal(weights[name], same[name]) for name in weights if name.startswith("network."))


@pytest.mark.parametrize(
    ("env", "settings"),
    [
        ("Catch-v0", {}),
        ("Catch-v0", GUMBEL),
        ("CartPole-v1", {}),
        ("Breakout-v5", {"start_transitions": 90, "ring_positions": 100, "env_steps": 100, "frame_size": 64, "gray": True}),
    ],
)
def test_a_run_stopped_at_any_iteration_and_resumed_is_the_run_that_was_not_stopped(tiny_config, tmp_path, env, settings):
    config = tiny_config(env=env, **settings)
    whole = finish(new(config))
    last = whole.iterations
    for stop in (1, last // 3, last // 2, last - 2) if settings == {} and env == "Catch-v0" else (last // 2,):
        stopped = new(config)
        while stopped.iterations < stop:
            stopped.step(stopped.phase())
        for ring in (True, False):
            path = save(stopped, tmp_path / f"{stop}{ring}", ring)
            after = finish(resumed(config, path, ring))
            assert after.iterations == last
            # metrics() drains the averages, so every comparison needs a fresh one
            assert_same(after, resumed(config, save(whole, tmp_path / f"whole{stop}{ring}", ring), ring))


def test_a_run_leaves_config_metrics_events_checkpoints_evaluation_and_summary(tiny_config):
    config = tiny_config()
    assert train(config, describe(config.env), CPU) is None
    run_dir = config.run_dir
    assert {p.name for p in run_dir.iterdir()} == {
        "config.json", "metrics.jsonl", "tensorboard", "checkpoints", "eval.json", "evaluations", "summary.json", "lock"
    }
    assert any(p.name.startswith("events.out.tfevents") for p in (run_dir / "tensorboard").iterdir())
    for row in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()):
        assert {"env_steps", "updates", "wall_s", "iteration"} <= set(row)
    last = rows(run_dir)[-1]
    assert {"losses/value_loss", "charts/episodic_return", "search/priority_age", "train/value_abs_max"} <= set(last)
    result = json.loads((run_dir / "eval.json").read_text())
    assert len(result["scores"]) == result["episodes"] == config.eval_episodes
    assert set(result["scores"]) <= {-1.0, 1.0}
    assert result["human_normalised"] is None
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["env_steps"] >= config.env_steps
    assert summary["updates"] >= config.total_updates
    assert (run_dir / summary["checkpoint"]).exists()
    assert summary["eval"]["mean"] == result["mean"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_saves_and_a_resumed_run_ends_with_the_same_rows(tiny_config, tmp_path, monkeypatch, number):
    spec = describe("Catch-v0")
    before = signal.signal(number, signal.default_int_handler)  # nohup may have it ignored
    train(tiny_config(run_dir=tmp_path / "whole"), spec, CPU)

    config = tiny_config(run_dir=tmp_path / "stopped", env_steps=160)
    step = Trainer.step
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", lambda self, phase: (step(self, phase), self.iterations == 33 and os.kill(os.getpid(), number)))
        assert train(config, spec, CPU) == number
    assert signal.signal(number, before) == signal.default_int_handler
    assert not (config.run_dir / "summary.json").exists()
    assert train(dataclasses.replace(config, resume=True), spec, CPU) is None
    assert rows(tmp_path / "stopped") == rows(tmp_path / "whole")


def test_a_signal_that_is_ignored_as_under_nohup_asks_for_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interrupt.requested is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_closed_terminal_asks_once_as_the_shell_and_the_kernel_both_send_the_signal():
    before = signal.signal(signal.SIGHUP, signal.default_int_handler)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)
            assert interrupt.requested == signal.SIGHUP
        assert signal.getsignal(signal.SIGHUP) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_checkpoint_of_another_environment_or_network_is_refused(tiny_config, tmp_path):
    path = save(new(tiny_config()), tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match="checkpoint of Catch-v0, not of --env CartPole-v1"):
        resume.restore(Trainer(tiny_config(env="CartPole-v1"), describe("CartPole-v1"), CPU), path)
    with pytest.raises(checkpoint.CheckpointError, match="another network or ring"):
        resume.restore(Trainer(tiny_config(channels=8), describe("Catch-v0"), CPU), path)
    with pytest.raises(checkpoint.CheckpointError, match="another network or ring"):
        resume.restore(Trainer(tiny_config(lanes=2), describe("Catch-v0"), CPU), path)


def test_the_installed_program_trains_and_evaluates(tmp_path):
    run_dir = tmp_path / "run"
    base = [sys.executable, "-m", "speedyzero", "--env", "Catch-v0", "--preset", "smoke", "--run-dir", str(run_dir)]
    done = subprocess.run(base, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "over 2 episodes" in done.stdout
    again = [sys.executable, "-m", "speedyzero.evaluate", str(run_dir), "--episodes", "3"]
    done = subprocess.run(again, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((run_dir / "eval.json").read_text())["episodes"] == 3


def test_every_iteration_has_one_row_however_often_a_finished_run_is_resumed(tiny_config):
    config = tiny_config(log_interval=1)
    spec = describe("Catch-v0")
    assert train(config, spec, CPU) is None
    path = config.run_dir / "metrics.jsonl"
    before = path.read_bytes()
    rows = [json.loads(line) for line in before.splitlines()]
    assert [row["iteration"] for row in rows] == list(range(1, len(rows) + 1))
    assert "losses/loss" in rows[-1]
    assert train(dataclasses.replace(config, resume=True), spec, CPU) is None
    assert path.read_bytes() == before


def test_skipped_updates_and_the_order_of_the_last_games_outlive_a_checkpoint(tiny_config, tmp_path):
    trainer = new(tiny_config())
    trainer.state.learner.skipped.fill_(3)
    trainer.state.learner.skipped_in_a_row.fill_(2)
    trainer.episodes = 2
    trainer.recent.extend([(1.0, 10), (4.0, 30)])
    other = resumed(tiny_config(), save(trainer, tmp_path))
    assert list(other.recent) == [(1.0, 10), (4.0, 30)]
    assert other.state.learner.skipped_in_a_row == 2
    row, names = other.metrics(), ("train/skipped_updates", "charts/episodes", "charts/episodic_return", "charts/episodic_length")
    assert [row[name] for name in names] == [3, 2, 2.5, 20.0]


def test_the_best_games_so_far_are_those_of_a_full_window_and_outlive_a_checkpoint(tiny_config, tmp_path):
    trainer = new(tiny_config())
    trainer.recent.extend([(1.0, 5)] * (RECENT_GAMES - 1))
    assert not trainer.improved()
    trainer.recent.append((33.0, 5))
    assert trainer.improved()
    assert trainer.best == (RECENT_GAMES - 1 + 33.0) / RECENT_GAMES
    assert not trainer.improved()
    other = resumed(tiny_config(), save(trainer, tmp_path))
    assert other.best == trainer.best
    assert not other.improved()
    other.recent.append((0.5, 5))
    assert not other.improved()
    other.recent.append((2.5, 5))
    assert other.improved()


def test_a_run_keeps_the_checkpoint_of_its_best_games_and_it_can_be_evaluated(tiny_config, capsys):
    config = tiny_config(env_steps=600, checkpoint_interval=10, keep=1)
    spec = describe(config.env)
    assert train(config, spec, CPU) is None
    checkpoints = config.run_dir / "checkpoints"
    meta = checkpoint.read_meta(checkpoints / "best.safetensors")
    last = checkpoint.read_meta(checkpoint.latest(checkpoints))
    assert last["best"] == meta["best"] is not None
    assert meta["env_steps"] >= 9 * RECENT_GAMES  # a game of Catch takes nine steps
    result, _ = evaluate_run(config.run_dir, 2, "cpu", None, "best")
    assert (result["checkpoint"], result["env_steps"]) == ("best.safetensors", meta["env_steps"])
    with pytest.raises(checkpoint.CheckpointError, match="does not exist"):
        evaluate_run(config.run_dir, 2, "cpu", None, str(config.run_dir / "nothing"))
