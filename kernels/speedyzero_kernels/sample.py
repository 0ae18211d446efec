"""Prioritised sampling: which ring positions a batch learns from, and with what importance weight (step 5).

Proportional prioritisation of "Prioritized Experience Replay" (Schaul et al. 2016, section 3.3 and appendix B.2.1),
with a prefix sum in place of the sum tree: the ring is small enough to scan, and priorities may then be written freely.
"""

import torch
from torch import Tensor


def proportional(
    priorities: Tensor,
    batch: int,
    alpha: float | Tensor,
    beta: float | Tensor,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Draw one index per stratum with P(i) = p_i^alpha / sum p^alpha, and its importance weight.

    M denotes the number of slots; up to 4M of them, the prefix sum being f64.

    priorities: [M] floating. NaN, infinite, zero and negative ones are never drawn, whatever alpha is.
    alpha, beta: floats or 0-d tensors on the priorities' device; alpha in 0..1 (0 is uniform over the positive slots),
        beta >= 0.
    generator: of the priorities' device, or None for the default one; it gives `batch` f64 uniforms.

    Returns indices [batch] int64, ascending up to rounding (stratum j is [j, j + 1) / batch of the total mass, so slots
    may repeat), and weights [batch] f32, (count * P(i))^-beta over the largest of the batch, count being the number of
    positive slots (it cancels). With nothing positive: indices 0 and weights 0.

    Raises ValueError if priorities is not a floating vector with an entry, batch < 1, alpha or beta is a tensor that is
    not 0-d or is on another device, or the generator is of another device.
    Bytes moved: priorities read once, a prefix sum (8 M) and a count (4 M) written once; the search reads O(log M).
    """
    _check(priorities, batch, alpha, beta, generator)
    p = priorities.double()
    mass = torch.where((p > 0) & (p < float("inf")), p.pow(alpha), 0)
    upto = mass.cumsum(0)
    rank = (mass > 0).cumsum(0, dtype=torch.int32)  # exact, so it decides what the rounded sums must not
    some = rank[-1] > 0

    strata = torch.arange(batch, dtype=torch.float64, device=p.device)
    uniform = torch.rand(batch, dtype=torch.float64, device=p.device, generator=generator)
    point = (strata + uniform) * (upto[-1] / batch)
    hit = torch.searchsorted(upto, point, right=True).clamp_(max=p.shape[0] - 1)
    # A parallel scan rounds each entry apart, and a point may round up to the total: step back to a positive slot.
    indices = torch.searchsorted(rank, rank[hit].clamp_(min=1)) * some
    drawn = mass[indices]
    weights = (drawn / drawn.min()).pow(-beta)
    return indices, torch.where(some, weights, 0).float()


def _check(priorities: Tensor, batch: int, alpha, beta, generator) -> None:
    if priorities.ndim != 1 or priorities.shape[0] == 0 or not priorities.is_floating_point():
        raise ValueError(f"priorities: must be floating [M], got {priorities.dtype} {tuple(priorities.shape)}")
    if batch < 1:
        raise ValueError(f"batch: must be at least 1, got {batch}")
    for name, value in (("alpha", alpha), ("beta", beta)):
        if isinstance(value, Tensor) and (value.ndim != 0 or value.device != priorities.device):
            raise ValueError(
                f"{name}: must be a float or 0-d on {priorities.device}, got {tuple(value.shape)} on {value.device}"
            )
    if generator is not None and generator.device.type != priorities.device.type:
        raise ValueError(f"generator: of {generator.device}, but priorities is on {priorities.device}")
