"""tools/inspect/loss_floors.py: the floor of each loss and what a constant would reach, against targets worked on paper."""

import math

import pytest
import torch

from speedyzero_kernels.nstep import Targets
from speedyzero_kernels.support import inverse_transform
from tools.inspect.loss_floors import Bounds, bounds


def goals(value, mask, policy, policy_mask, prefix) -> Targets:
    value, mask, policy, policy_mask, prefix = map(torch.tensor, (value, mask, policy, policy_mask, prefix))
    return Targets(value=value, prefix=prefix, policy=policy, action=torch.zeros_like(prefix, dtype=torch.int64), mask=mask,
                   policy_mask=policy_mask)  # fmt: skip


def entropy(*shares: float) -> float:
    return -sum(share * math.log(share) for share in shares if share > 0)


def test_bounds_of_worked_targets():
    half = float(inverse_transform(torch.tensor(0.5, dtype=torch.float64)))  # h(half) = 0.5: shared by the bins of 0 and 1
    goal = goals(value=[[half, 0.0], [0.0, 9.0]], mask=[[1.0, 1.0], [1.0, 0.0]], prefix=[[half], [9.0]],
                 policy=[[[0.5, 0.25], [9.0, 9.0]], [[0.0, 1.0], [9.0, 0.0]]], policy_mask=[[1.0, 0.0], [1.0, 0.0]])  # fmt: skip
    got = bounds(goal, 5)
    assert got["value_loss"].floor == pytest.approx(math.log(2) / 2, rel=1e-5)
    assert got["value_loss"].constant == pytest.approx(3 * entropy(5 / 6, 1 / 6) / 2, rel=1e-5)
    assert got["value_prefix_loss"].floor == got["value_prefix_loss"].constant == pytest.approx(math.log(2) / 2, rel=1e-5)
    assert got["policy_loss"].floor == pytest.approx(0.75 * entropy(2 / 3, 1 / 3) / 2)
    assert got["policy_loss"].constant == pytest.approx(1.75 * entropy(0.5 / 1.75, 1.25 / 1.75) / 2)
    assert got["consistency_loss"] == Bounds(-0.5, 0.0)


def test_bounds_divide_by_the_steps_as_the_losses_do():
    flat = [[0.0, 0.0, 0.0]]
    goal = goals(value=flat, mask=[[1.0, 1.0, 1.0]], prefix=[[0.0, 0.0]], policy=[[[0.5, 0.5]] * 3], policy_mask=[[1.0, 1.0, 1.0]])
    got = bounds(goal, 5)
    assert got["policy_loss"].floor == pytest.approx(3 * math.log(2) / 2)
    assert got["consistency_loss"].floor == -1
    assert goal.value.tolist() == flat
