"""How stale the priorities of the ring are: whether those that it holds still rank positions as the present network would.

A batch draws by rank as much as by size, so this, and not the age, is what Priority Refresh has to keep high (SpeedyZero, ICLR 2023).
"""

from __future__ import annotations

import torch
from torch import Tensor

from speedyzero import act, refresh
from speedyzero.ring import eligible
from speedyzero.state import State
from speedyzero_kernels.gather import observations

POSITIONS = 256
"""Positions that are compared."""
FEWEST = 32
"""Positions below which a correlation says nothing."""


def priority_rank_correlation(state: State) -> float | None:
    """Spearman's correlation between the priorities in the ring and those that the snapshot would give now, over up to 256 positions that
    may be drawn, evenly spaced. None: there are too few yet, or all are equal.

    Values are the snapshot's, at the positions and where their targets bootstrap; root values stay those of the last search. For the host
    loop: waits for the device, draws nothing, changes nothing.
    """
    ring, config = state.ring, state.config
    index = eligible(ring, config).view(-1).nonzero().flatten()
    if index.shape[0] < FEWEST:
        return None
    index = index[torch.linspace(0, index.shape[0] - 1, min(POSITIONS, index.shape[0]), device=index.device).long()]
    lane, slot = index // ring.slots, index % ring.slots
    later = lane * ring.slots + (slot + refresh.n_steps(ring, index, config)) % ring.slots
    frames = observations(ring.frames, ring.first, torch.cat((index, later)), config.frame_stack, **state.snapshot.input_format)
    value, value_later = act.values(state.snapshot, frames).chunk(2)
    bootstrap = refresh.bootstrap(ring, config).clone()
    if config.bootstrap == "network":
        bootstrap.view(-1)[later] = value_later
    fresh, _ = refresh.errors(ring, index, value, bootstrap, config)
    return rank_correlation(ring.priority.view(-1)[index], fresh)


def rank_correlation(a: Tensor, b: Tensor) -> float | None:
    """Spearman's rank correlation of two [M] float tensors, equal numbers sharing their mean rank; None if all of one are equal, or one is
    not finite."""
    if not (a.isfinite().all() and b.isfinite().all()):
        return None
    a, b = (_ranks(x) - (x.shape[0] + 1) / 2 for x in (a, b))
    scale = a.norm() * b.norm()
    return float((a @ b) / scale) if scale else None


def _ranks(x: Tensor) -> Tensor:
    """Ranks [M] float64 from 1."""
    _, place, count = x.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2).double()[place]
