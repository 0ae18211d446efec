"""rliable's statistics, on examples worked out by hand."""

import numpy as np
import pytest

from speedyzero.aggregate import aggregate, band


def test_the_statistics_of_two_games_by_hand():
    found = aggregate([[0.0, 1.0, 2.0, 9.0], [0.5, 0.5, 1.5, 1.5]])
    assert found["mean"].value == (3.0 + 1.0) / 2
    assert found["median"].value == (3.0 + 1.0) / 2
    # Sorted 0, .5, .5, 1, 1.5, 1.5, 2, 9: without two at each end .5, 1, 1.5, 1.5.
    assert found["IQM"].value == pytest.approx((0.5 + 1 + 1.5 + 1.5) / 4)
    # Cut at 1: 0, 1, 1, 1 and .5, .5, 1, 1.
    assert found["optimality gap"].value == pytest.approx(1 - 6 / 8)


def test_the_median_is_over_games_and_not_over_seeds():
    found = aggregate([[0.0, 0.0, 9.0], [1.0], [2.0, 2.0]])
    assert found["median"].value == 2.0  # of the means 3, 1, 2
    assert found["mean"].value == 2.0


def test_the_quarter_that_is_cut_is_rounded_down():
    assert aggregate([[1.0, 2.0, 3.0]])["IQM"].value == 2.0
    assert aggregate([[1.0, 2.0, 3.0, 4.0, 100.0]])["IQM"].value == 3.0


def test_seeds_are_drawn_again_within_their_game_alone():
    apart = aggregate([[0.0, 0.0], [1.0, 1.0]])
    assert all(estimate.low == estimate.value == estimate.high for estimate in apart.values())
    two = aggregate([[0.0, 1.0]])["mean"]  # resampled means are 0, 1/2, 1 with chances 1/4, 1/2, 1/4
    assert two == (0.5, 0.0, 1.0)
    assert aggregate([[0.0, 1.0]], confidence=0.4)["mean"] == (0.5, 0.5, 0.5)  # the quantiles 0.3 and 0.7


def test_an_interval_is_as_wide_as_the_standard_error_says():
    scores = np.random.default_rng(1).normal(size=(3, 200))
    low, high = aggregate(scores)["mean"][1:]
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(scores.var(1).sum() / 200) / 3, rel=0.05)


def test_a_single_seed_a_game_has_no_interval_and_nothing_at_all_is_refused():
    assert aggregate([[1.0], [3.0]])["mean"] == (2.0, None, None)
    for nothing in ([], [[1.0], []], [[float("nan")]]):
        with pytest.raises(ValueError, match="at least one finite score"):
            aggregate(nothing)


def test_a_band_goes_over_the_steps_that_all_seeds_have():
    found = band([([0, 10], [0.0, 10.0]), ([5, 20], [1.0, 1.0]), ([0, 20], [4.0, 4.0])], points=6)
    assert found.x.tolist() == [5, 6, 7, 8, 9, 10]
    assert found.middle.tolist() == pytest.approx([(x + 1 + 4) / 3 for x in found.x])
    assert (found.low >= 1).all()
    assert (found.low < found.middle).all()
    assert (found.high <= np.maximum(found.x, 4)).all()
    assert band([([0, 1], [0, 1])]) is None
    assert band([([0, 1], [0, 1]), ([2, 3], [0, 1])]) is None
