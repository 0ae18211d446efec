"""tools/inspect/overfit.py: its verdicts of losses between their bounds, and what it says of a tiny run, of which it changes nothing."""

import pytest

from tests.tools.conftest import contents
from tools.inspect import findings, overfit
from tools.inspect.loss_floors import Bounds


@pytest.mark.parametrize(
    ("limit", "by_batch", "running", "said"),
    [
        (Bounds(1.0, 3.0), 1.1, 1.1, "fits, 95%"), (Bounds(1.0, 3.0), 1.8, 1.8, "fits in part, 60%"),
        (Bounds(1.0, 3.0), 2.9, 2.9, "does NOT fit, 5%"), (Bounds(1.0, 3.0), 1.1, 2.9, "only 5% by the running"),
        (Bounds(1.0, 1.0), 1.01, 1.01, "nothing to learn"), (Bounds(1.0, 1.0), 1.2, 1.2, "does NOT fit"),
    ],
)  # fmt: skip
def test_verdict_of_a_fit(limit, by_batch, running, said):
    assert said in overfit.verdict(limit, by_batch, running)


def test_overfit_fits_and_changes_nothing(run, call):
    before = contents(run)
    code, printed = call(overfit, run, "--updates", 120, "--batch", 6, "--fresh", "--no-augment", "--lr", 0.3)
    assert code == 0
    assert contents(run) == before
    assert "120 updates of 6 positions, sgd, lr 0.3, augment False, a new network" in printed
    table = {line.split()[0]: line for line in printed.splitlines() if line.split() and line.split()[0] in findings.LOSSES}
    assert "  fits" in table["policy_loss"]
    start, end = (float(table["value_loss"].split()[column]) for column in (3, 4))
    assert end < 1.1 * float(table["value_loss"].split()[1]) < start


def test_overfit_says_so_if_nothing_is_learned(run, call):
    _, printed = call(overfit, run, "--updates", 3, "--lr", 1e-9, "--fresh")
    assert printed.count("does NOT fit") >= 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--batch", "5000"], "--batch 5000: only "), (["--batch", "1"], "--batch 1: must be"), (["--lr", "-1"], "--lr -1.0: must be")],
)
def test_bad_arguments_are_one_line(run, call, arguments, said):
    message, printed = call(overfit, run, *arguments)
    assert message.startswith(f"error: {said}")
    assert "\n" not in message
    assert printed == ""
