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
    """Of one loss."""

    floor: float
    constant: float
    """Of the best prediction that is the same for all positions and steps; of the consistency, that of two directions at random."""

    def learned(self, loss: float) -> float:
        """1 at the floor, 0 at the constant's loss, less above it."""
        span = self.constant - self.floor
        return (self.constant - loss) / span if span > 1e-6 else float(loss - self.floor < 1e-3)


def _sums(target: Tensor, mask: Tensor) -> tuple[float, float]:
    """Floor and constant, summed, of targets [..., bins], which need not sum to 1 (a policy is rounded to f16), that `mask` [...] keeps."""
    target = target.double() * mask.double()[..., None]
    mean = target.flatten(0, -2).sum(0)
    floor = -torch.special.xlogy(target, target / target.sum(-1, keepdim=True).clamp_min(1e-300)).sum()
    return float(floor), float(-torch.special.xlogy(mean, mean / mean.sum().clamp_min(1e-300)).sum())


def bounds(goal: Targets, support: int) -> dict[str, Bounds]:
    """Bounds of each loss by the names of `learn.losses` and in its units: summed over the steps that count, divided by K."""
    windows = goal.action.numel()  # M x K
    distributions = {
        "value_prefix_loss": (two_hot(goal.prefix, support), goal.mask[:, 1:]), "value_loss": (two_hot(goal.value, support), goal.mask),
        "policy_loss": (goal.policy, goal.policy_mask),
    }  # fmt: skip
    found = {name: Bounds(*(total / windows for total in _sums(*of))) for name, of in distributions.items()}
    return found | {"consistency_loss": Bounds(-float(goal.mask[:, 1:].sum()) / windows, 0.0)}


def prefix_bounds(prefix: Tensor, mask: Tensor, support: int) -> Bounds:
    """Bounds of the value-prefix loss a step: the mean over the steps of each step's own. prefix, mask: [M, K]."""
    steps = [_sums(two_hot(target, support), kept) for target, kept in zip(prefix.double().t(), mask.t(), strict=True)]
    means = torch.tensor(steps, dtype=torch.float64) / mask.sum(0).double().clamp_min(1)[:, None]
    return Bounds(*means.mean(0).tolist())
