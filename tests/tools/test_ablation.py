"""The ablation: cells at the same number of samples, and what is read from their runs."""

import signal
import sys
from pathlib import Path

import pytest

from speedyzero.config import ConfigError
from speedyzero.run.record import Recorded, RunError
from tools.ablation import Arguments, Cell, Outcome, cells, figure, outcome, run_suite, table

OPTIONS = Arguments("Catch-v0", Path("out"))


def value(flags: list[str], name: str) -> str:
    return flags[flags.index(name) + 1]


def test_every_cell_learns_from_the_same_number_of_windows_and_differs_in_what_it_says():
    found = cells(OPTIONS)
    assert len(found) == len({cell.name for cell in found}) == 18
    flags = [cell.flags(OPTIONS) for cell in found]
    for name, windows in (("--updates-per-iteration", 16 * 32), ("--snapshot-interval", 2560)):
        assert {int(value(one, name)) * int(value(one, "--batch-size")) for one in flags} == {windows}
    for cell, one in zip(found, flags, strict=True):
        assert ("--no-priority-refresh" in one) == (not cell.refresh)
        assert ("--trust-clip" in one) == (cell.optimizer == "LARS")
        assert value(one, "--optimizer") == ("sgd" if cell.optimizer == "SGD" else "clipped-lars")


def test_rates_go_batch_by_batch():
    options = Arguments("Catch-v0", Path("out"), batches=(32, 128), optimizers=("SGD", "LARS"), rates=(1.0, 2.0, 3.0, 4.0))
    assert {(c.batch, c.optimizer): c.lr for c in cells(options)} == {
        (32, "SGD"): 1.0, (32, "LARS"): 2.0, (128, "SGD"): 3.0, (128, "LARS"): 4.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batches": (48,)}, "--batches 48"),
        ({"batches": (0,)}, "--batches 0"),
        ({"batches": ()}, "--batches: give"),
        ({"optimizers": ("Adam",)}, "--optimizers Adam"),
        ({"optimizers": ()}, "--optimizers: give"),
        ({"samples": 0}, "--samples 0"),
        ({"rates": (1.0, 2.0)}, "--rates: 2"),
        ({"rates": (float("nan"),)}, "--rates nan"),
        ({"seeds": 0}, "--seeds 0"),
    ],
)
def test_what_cannot_be_compared_is_named(change, said):
    options = Arguments("Catch-v0", Path("out"), **change)
    with pytest.raises(ConfigError, match=said):
        [cell.flags(options) for cell in cells(options)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_suite_has_the_time_to_save_and_is_asked_once(number):
    suite = """
import os, signal, sys, time
def save(*_):
    signal.signal(int(sys.argv[1]), signal.SIG_DFL)
    time.sleep(0.6)  # subprocess.run would have killed it after 0.25 s
    sys.exit(99)
signal.signal(int(sys.argv[1]), save)
for _ in range(2):
    os.kill(os.getppid(), int(sys.argv[1]))
time.sleep(60)
"""
    before = signal.signal(number, signal.default_int_handler)
    try:
        assert run_suite([sys.executable, "-c", suite, str(int(number))]) == 99
        assert signal.getsignal(number) == signal.default_int_handler
    finally:
        signal.signal(number, before)


def row(env_steps: int, updates: int, score: float | None, correlation: float | None = None) -> dict:
    return {"env_steps": env_steps, "updates": updates, "charts/episodic_return": score, "train/priority_rank_correlation": correlation}


def test_an_outcome_by_hand():
    rows = [row(0, 0, None), row(200, 0, -9.0), row(400, 5, 1.0, 0.1), row(600, 9, 2.0, 0.4), row(1000, 15, 4.0, 0.8)]
    rows.append(row(1000, 20, 9.0, 1.0))
    run = Recorded(Path("x"), {"env_steps": 1000}, rows, 0, {"mean": 7.0}, None)
    # 200 steps at 1, 200 at 2, 400 at 4; of the second half's rows 0.4 and 0.8; the row after the last step counts in neither.
    assert outcome(run) == Outcome(pytest.approx(2200 / 800), 7.0, pytest.approx(0.6))
    unfinished = [now | {"charts/episodic_return": None} for now in rows]
    assert outcome(Recorded(Path("x"), {"env_steps": 1000}, unfinished, 0, {"mean": 7.0}, None)).curve is None
    with pytest.raises(RunError, match="no complete training"):
        outcome(Recorded(Path("x"), {"env_steps": 1000}, rows, 0, None, None))
    with pytest.raises(RunError, match="no complete training"):
        outcome(Recorded(Path("x"), {"env_steps": 1000}, rows[:2], 0, {"mean": 7.0}, None))


def test_the_table_and_the_picture_have_every_cell():
    pytest.importorskip("matplotlib")
    found = {
        Cell(32, "SGD", True, 1.0): [Outcome(0.5, 1.0, 0.9), Outcome(0.7, 0.0, None)],
        Cell(512, "SGD", False, 2.0): [Outcome(-0.5, -1.0, None)],
    }
    assert table(found).splitlines()[2:] == [
        "| 32 | SGD | 1 | yes | **0.60** (0.50, 0.70) | **0.50** (1.00, 0.00) | **0.90** (0.90) |",
        "| 512 | SGD | 2 | no | **-0.50** (-0.50) | **-1.00** (-1.00) | - |",
    ]
    first = figure(found, "Catch-v0").axes[0]
    assert [list(line.get_ydata()) for line in first.lines] == [[0.6], [0.5, 0.7], [-0.5], [-0.5]]
