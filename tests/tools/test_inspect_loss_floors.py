"""tools/inspect/loss_floors.py: the floor of each loss and what a constant would reach, against targets worked on paper."""

import math

import pytest
import torch

from speedyzero_kernels.nstep import Targets
from speedyzero_kernels.support import inverse_transform
from tools.inspect.loss_floors import Bounds, bounds, prefix_bounds

ONE, HALF = inverse_transform(torch.tensor([1.0, 0.5], dtype=torch.float64)).tolist()
"""h(ONE) = 1 is one bin alone; h(HALF) = 0.5 is shared by the bins of 0 and 1, which costs ln 2."""


def entropy(*shares: float) -> float:
    return -sum(share * math.log(share) for share in shares if share > 0)


def test_bounds_of_worked_targets():
    value, mask, policy, policy_mask, prefix = map(torch.tensor, (
        [[HALF, 0.0], [0.0, 9.0]], [[1.0, 1.0], [1.0, 0.0]], [[[0.5, 0.25], [9.0, 9.0]], [[0.0, 1.0], [9.0, 0.0]]],
        [[1.0, 0.0], [1.0, 0.0]], [[HALF], [9.0]],
    ))  # fmt: skip
    got = bounds(Targets(value, prefix, policy, torch.zeros(2, 1, dtype=torch.int64), mask, policy_mask), 5)
    assert got["value_loss"].floor == pytest.approx(math.log(2) / 2, rel=1e-5)
    assert got["value_loss"].constant == pytest.approx(3 * entropy(5 / 6, 1 / 6) / 2, rel=1e-5)
    assert got["value_prefix_loss"].floor == got["value_prefix_loss"].constant == pytest.approx(math.log(2) / 2, rel=1e-5)
    assert got["policy_loss"].floor == pytest.approx(0.75 * entropy(2 / 3, 1 / 3) / 2)
    assert got["policy_loss"].constant == pytest.approx(1.75 * entropy(0.5 / 1.75, 1.25 / 1.75) / 2)
    assert got["consistency_loss"] == Bounds(-0.5, 0.0)


def test_bounds_divide_by_the_steps_as_the_losses_do():
    ones = torch.ones(1, 3)
    got = bounds(Targets(0 * ones, torch.zeros(1, 2), torch.full((1, 3, 2), 0.5), torch.zeros(1, 2, dtype=torch.int64), ones, ones), 5)
    assert got["policy_loss"].floor == pytest.approx(3 * math.log(2) / 2)
    assert got["consistency_loss"].floor == -1


def test_prefix_bounds_are_of_each_step():
    # Step 1: a quarter is ONE. Step 2: the last is left out, and all others are HALF.
    target = torch.tensor([[ONE, HALF], [0.0, HALF], [0.0, HALF], [0.0, 9.0]])
    got = prefix_bounds(target, torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 0.0]]), 5)
    assert got.constant == pytest.approx((entropy(0.25, 0.75) + math.log(2)) / 2, rel=1e-5)
    assert got.floor == pytest.approx(math.log(2) / 2, rel=1e-5)
