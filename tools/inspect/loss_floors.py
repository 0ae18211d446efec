"""Between what bounds each loss lies, worked out from the targets alone: the floor, and what one constant prediction would reach.

A cross entropy cannot fall below the entropy of its targets: a value between two bins costs up to ln 2, a visit distribution its own
entropy. A loss at its floor is learned; one at the constant's has learned nothing of the observations.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from speedyzero_kernels.nstep import Targets
from speedyzero_kernels.support import two_hot


@dataclass(frozen=True)
class Bounds:
    """Of one loss, in the units of `learn.losses`: summed over the steps that count, divided by K."""

    floor: float
    constant: float
    """Of the best prediction that is the same for all positions and steps; of the consistency, that of two directions at random."""

    def learned(self, loss: float) -> float:
        """1 at the floor, 0 at the constant's loss, less above it."""
        span = self.constant - self.floor
        return (self.constant - loss) / span if span > 1e-6 else float(loss - self.floor < 1e-3)


def _of_distributions(target: Tensor, mask: Tensor, steps: int) -> Bounds:
    """Of targets [M, J, bins], which need not sum to 1 (a policy is rounded to f16), of which `mask` [M, J] counts."""
    target = target.double() * mask.double()[..., None]
    per_sample = 1 / (target.shape[0] * steps)
    total = target.sum(-1, keepdim=True)
    floor = -torch.special.xlogy(target, target / total.clamp_min(1e-300)).sum()
    mean = target.sum((0, 1))
    constant = -torch.special.xlogy(mean, mean / mean.sum().clamp_min(1e-300)).sum()
    return Bounds(float(floor) * per_sample, float(constant) * per_sample)


def bounds(goal: Targets, support: int) -> dict[str, Bounds]:
    """Bounds of each loss by the names of `learn.losses`."""
    steps = goal.action.shape[1]
    aligned = -float(goal.mask[:, 1:].sum()) / (goal.mask.shape[0] * steps)
    return {
        "value_prefix_loss": _of_distributions(two_hot(goal.prefix, support), goal.mask[:, 1:], steps),
        "value_loss": _of_distributions(two_hot(goal.value, support), goal.mask, steps),
        "policy_loss": _of_distributions(goal.policy, goal.policy_mask, steps),
        "consistency_loss": Bounds(aligned, 0.0),
    }
