"""What the host says of numbers that go bad, and how it stops a run that they have ruined."""

import json

import pytest
import torch

from speedyzero import learn
from speedyzero.__main__ import main
from speedyzero.batch import draw
from speedyzero.envs import describe
from speedyzero.loop import Trainer
from speedyzero.run import checkpoint
from speedyzero.run.health import Health, NonFiniteError
from speedyzero_kernels.support import transform

CPU = torch.device("cpu")
SETTINGS = {"augment": True, "shift": 1, "batch_size": 8}


def trained(config) -> Trainer:
    """A trainer that has learned a little."""
    trainer = Trainer(config, describe(config.env), CPU)
    trainer.start()
    while trainer.updates < 6:
        trainer.step(trainer.phase())
    return trainer


def missing(trainer: Trainer) -> None:
    trainer.state.ring.frames.fill_(torch.nan)
    trainer.state.ring.value.fill_(torch.nan)


def skip(trainer: Trainer, spoil, times: int) -> None:
    """Let updates be skipped, and nothing else be done."""
    state, before = trainer.state, int(trainer.state.learner.skipped_in_a_row)
    spoil(trainer)
    allowed = ~state.ring.done
    allowed[:, trainer.slots - trainer.config.window :] = False
    for _ in range(times):
        drawn, weights = draw(state.ring, allowed, trainer.config, state.updates, state.generator)
        state.learn_averages.add(learn.update(state.learner, state.ring, drawn, weights, state.updates, trainer.config, state.generator))
    assert state.learner.skipped_in_a_row == before + times


def test_updates_skipped_since_the_last_row_are_said_in_one_line_and_no_others(tiny_config):
    trainer, lines = Trainer(tiny_config(), describe("Catch-v0"), CPU), []
    trainer.state.learner.skipped.fill_(4)  # a run that went on: those were said before
    watch = Health(trainer.state, lines.append)
    why = "skipped since loss, gradient or statistics were not finite"
    for skipped, said in [(4, []), (5, [f"1 update was {why} (5 in all)"]), (5, []), (12, [f"7 updates were {why} (12 in all)"]), (12, [])]:
        trainer.state.learner.skipped.fill_(skipped)
        watch.check(trainer.metrics())
        assert lines == said
        lines.clear()


def test_the_run_stops_when_as_many_in_a_row_were_skipped_as_the_flag_says_and_not_before(tiny_config):
    trainer = trained(tiny_config(max_skipped=7, **SETTINGS))
    watch = Health(trainer.state, lambda line: None)
    skip(trainer, missing, 6)
    watch.check(trainer.metrics())
    skip(trainer, missing, 1)
    with pytest.raises(NonFiniteError) as stop:
        watch.check(trainer.metrics())
    line = str(stop.value)
    assert "\n" not in line
    assert line.startswith("the last 7 updates were skipped since loss, gradient or statistics were not finite (--max-skipped 7); ")
    assert f"--resume --run-dir {trainer.config.run_dir}" in line
    # No new one, no stop: a run that goes on takes its first updates before it is judged.
    Health(trainer.state, lambda line: None).check(trainer.metrics())


def test_values_near_the_end_of_the_support_are_said_once_and_again_only_after_they_fell_under_half(tiny_config):
    trainer, lines = Trainer(tiny_config(support=5), describe("Catch-v0"), CPU), []
    watch = Health(trainer.state, lines.append)
    # h(34.586...) = 5, by bisection; 90% of it is 31.13, half 17.29.
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if transform(torch.tensor(middle, dtype=torch.float64)) < 5 else (low, middle)
    assert low == pytest.approx(34.586, abs=1e-3)
    said = []
    for value in (0.9 * low - 0.01, 0.9 * low + 0.01, 34.0, 0.5 * low + 0.01, 34.0, float("nan"), 0.5 * low - 0.01, 31.0, 34.0, 34.0):
        watch.check({"train/skipped_updates": 0, "train/value_abs_max": value})
        said.append(len(lines))
    assert said == [0, 1, 1, 1, 1, 1, 1, 1, 2, 2]
    watch.check({"train/skipped_updates": 0})  # a row without: nothing was learned yet
    assert lines[0] == (
        "--support 5: a value of 31.14 was predicted, and the most it can express is 34.59; if returns are that large start a new "
        "run with more, if not with a lower --lr"
    )


def test_the_program_stops_an_exploded_run_with_one_line_and_a_checkpoint(tmp_path, capsys):
    run_dir = tmp_path / "run"
    small = ["--env", "Catch-v0", "--preset", "smoke", "--device", "cpu", "--run-dir", str(run_dir), "--log-interval", "5"]
    with pytest.raises(SystemExit) as end:
        main([*small, "--lr", "1e30", "--max-skipped", "3"])
    line = end.value.code
    assert line.startswith("error: the last ")
    assert "(--max-skipped 3)" in line
    assert "\n" not in line
    assert "updates were skipped since loss, gradient or statistics were not finite (" in capsys.readouterr().out
    row = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    saved, _ = checkpoint.load(checkpoint.latest(run_dir / "checkpoints"))
    assert saved["learner.skipped"] == row["train/skipped_updates"] >= saved["learner.skipped_in_a_row"] >= 3
    for name, tensor in saved.items():
        assert tensor.isfinite().all() or not name.startswith(("network.", "momentum.", "ring.priority", "averages.")), name
    # It goes on, and stops again: the weights are as they were.
    with pytest.raises(SystemExit) as end:
        main(["--resume", "--run-dir", str(run_dir)])
    assert "error: the last " in str(end.value.code)
