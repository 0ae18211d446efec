"""The bench itself: it sees a regression, forgives noise, and writes its baseline only when told to."""

import json
from types import SimpleNamespace

import pytest
import torch

from tests.bench.conftest import Baseline
from tools.profile.operations import MAKERS, sizes
from tools.profile.timing import Ceilings, Comparison, compare


def kept(tmp_path, *, update: bool, stored: dict | None = None) -> Baseline:
    path = tmp_path / "baseline.json"
    if stored is not None:
        path.write_text(json.dumps(stored))
    config = SimpleNamespace(stash={}, getoption=lambda name, default: update)
    return Baseline(path, "a card", config)


def around(ratio: float) -> Comparison:
    return Comparison(1.0, 1.0, tuple(ratio * (0.9 + 0.01 * i) for i in range(21)))


def test_a_ratio_that_doubled_fails_and_one_within_the_noise_does_not(tmp_path):
    baseline = kept(tmp_path, update=False, stored={"a card": {"op": 1.0}})
    assert baseline.check("op", around(1.05), 1.15) == "baseline 1"
    with pytest.raises(pytest.fail.Exception, match=r"op: ratio 2, lower quartile"):
        baseline.check("op", around(2.0), 1.15)


def test_a_card_without_a_baseline_passes_says_so_and_writes_nothing(tmp_path):
    baseline = kept(tmp_path, update=False, stored={"another card": {"op": 0.1}})
    assert baseline.check("op", around(5.0), 1.15) == "no baseline"
    baseline.save()
    assert json.loads(baseline.path.read_text()) == {"another card": {"op": 0.1}}


def test_an_update_keeps_the_other_cards_and_comparisons(tmp_path):
    stored = {"a card": {"op": 1.0, "old": 3.0}, "another card": {"op": 0.1}}
    baseline = kept(tmp_path, update=True, stored=stored)
    baseline.check("op", around(5.0), 1.15)
    baseline.save()
    assert json.loads(baseline.path.read_text()) == stored | {"a card": {"op": pytest.approx(5.0), "old": 3.0}}


def test_pairs_show_which_of_two_functions_is_slower():
    x = torch.randn(200, 200)
    comparison = compare(lambda: (x @ x, x @ x, x @ x, x @ x), lambda: x @ x, torch.device("cpu"), pairs=11)
    assert comparison.ratio > 2
    assert comparison.quartiles[0] <= comparison.ratio <= comparison.quartiles[1]


def test_the_floor_is_what_takes_longer_memory_or_arithmetic():
    most = Ceilings(4e12, 8e14)
    assert most.floor(4e12, 8e13) == 1.0
    assert most.floor(4e11, 8e14) == 1.0


@pytest.mark.parametrize("operation", MAKERS)
def test_the_same_seed_makes_the_same_work_and_every_work_has_a_floor(operation):
    one, other = (MAKERS[operation](sizes("smoke", "cpu"), 3) for _ in range(2))
    for a, b in zip(one.ours(), other.ours(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert one.cost()[0] > 0
