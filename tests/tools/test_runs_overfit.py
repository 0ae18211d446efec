"""tools/inspect/overfit.py: its verdicts of losses between their bounds, and what it says of a tiny run, of which it changes nothing."""

from functools import partial
from pathlib import Path

import pytest

from speedyzero.loop import Trainer
from tests.tools.diagnosis_support import call_tool, contents, trained_run
from tools.inspect import findings, overfit
from tools.inspect import loss_floors as bounds


@pytest.fixture(scope="module")
def trainer(tmp_path_factory) -> Trainer:
    return trained_run(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture
def run(trainer) -> Path:
    return trainer.config.run_dir


@pytest.fixture
def call(monkeypatch, capsys):
    return partial(call_tool, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("by_batch", "running", "said"),
    [(1.1, 1.1, "fits, 95%"), (1.8, 1.8, "fits in part, 60%"), (2.9, 2.9, "does NOT fit, 5%"), (1.1, 2.9, "only 5% by the running"),
     (2.2, 9.9, "does NOT fit, 40%")],
)
def test_verdict_of_a_fit(by_batch, running, said):
    assert said in overfit.verdict(bounds.Bounds(1.0, 3.0), by_batch, running)


def test_targets_that_are_alike_have_a_verdict_of_their_own():
    assert overfit.verdict(bounds.Bounds(1.0, 1.0), 1.01, 1.01).startswith("nothing to learn")
    assert overfit.verdict(bounds.Bounds(1.0, 1.0), 1.2, 1.2).startswith("does NOT fit")


def test_overfit_fits_and_changes_nothing(run, call):
    before = contents(run)
    code, printed = call(overfit, run, "--updates", 120, "--batch", 6, "--fresh", "--lr", 0.3)
    assert code == 0
    assert contents(run) == before
    assert "6 positions, 120 updates of 6, sgd, lr 0.3, amp False, augment False, a new network" in printed
    table = {line.split()[0]: line for line in printed.splitlines() if line.split() and line.split()[0] in findings.LOSSES}
    assert "  fits" in table["policy_loss"]
    start, end = (float(table["value_loss"].split()[column]) for column in (3, 4))
    assert end < 1.1 * float(table["value_loss"].split()[1]) < start


def test_overfit_says_so_if_nothing_is_learned(run, call):
    _, printed = call(overfit, run, "--updates", 3, "--lr", 1e-9, "--fresh", "--optimizer", "clipped-lars", "--amp", "True")
    assert "clipped-lars, lr 1e-09, amp True" in printed
    assert "policy_loss" in printed
    assert printed.count("does NOT fit") >= 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batch", "5000"], "--batch 5000: only "),
        (["--batch", "1"], "--batch 1: must be at least 2"),
        (["--lr", "-1"], "--lr -1.0: must be greater than 0"),
    ],
)
def test_bad_arguments_are_one_line(run, call, arguments, said):
    message, printed = call(overfit, run, *arguments)
    assert message.startswith(f"error: {said}")
    assert "\n" not in message
    assert printed == ""
