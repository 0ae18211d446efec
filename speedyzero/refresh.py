"""Which positions are searched again, and writing what a search found into the ring (step 4, refresh).

Reanalysis (MuZero Unplugged, Schrittwieser et al. 2021) and SpeedyZero's Priority Refresh in one: every searched position gets a new
policy, new values, and a priority from the current snapshot. In the shapes `R` is the positions searched again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from speedyzero.config import Config
from speedyzero.ring import Ring
from speedyzero.search import SearchResult
from speedyzero.settings import RefreshSettings
from speedyzero_kernels.nstep import targets

PRIORITY_FLOOR = 1e-6


def sweep(ring: Ring, roots: int, frame_stack: int, cursor: Tensor | None = None) -> Tensor:
    """Flat indices [R] of the positions whose turn it is: step after step, all lanes of a step together, round and round.

    The newest slot is left out, as the live search writes it, and so are the oldest, whose stacked frames were overwritten. Moves
    `cursor`, by default the ring's. No position comes twice while the ring holds at least R others.
    """
    cursor = ring.cursor if cursor is None else cursor
    lanes = ring.lanes
    overwritten = torch.where(ring.head > ring.slots, ring.head - ring.slots + frame_stack - 1, 0)
    low = overwritten * lanes
    high = (ring.head - 1) * lanes
    start = torch.maximum(cursor, low)
    position = low + (start - low + torch.arange(roots, device=ring.head.device)) % (high - low).clamp_min(1)
    cursor.copy_(position[-1] + 1)
    return (position % lanes) * ring.slots + (position // lanes) % ring.slots


def windows(ring: Ring, index: Tensor, length: int) -> Tensor:
    """Flat indices [M x length] of the positions `index` [M] and the slots that follow each."""
    lane, slot = index // ring.slots, index % ring.slots
    steps = torch.arange(length, device=index.device)
    return (lane[:, None] * ring.slots + (slot[:, None] + steps) % ring.slots).flatten()


def n_steps(ring: Ring, index: Tensor, config: Config) -> Tensor:
    """The n of each position's value target [M] int64: n_step, one less for every n_step_age of the run that has passed, at least 1."""
    age = ring.age()[index % ring.slots] * ring.lanes
    return (config.n_step - age // max(1, int(config.n_step_age * config.env_steps))).clamp(1, config.n_step)


def bootstrap(ring: Ring, config: RefreshSettings) -> Tensor:
    """The cached values that bootstrap value targets [L, T]."""
    return ring.value if config.bootstrap == "network" else ring.root_value


def _one_result_each(index: Tensor, result: SearchResult, value: Tensor, size: int) -> tuple[SearchResult, Tensor]:
    """Give all roots of one position the results of the last of them, so that the order of the writes cannot matter."""
    order = torch.arange(index.shape[0], device=index.device)
    winner = torch.zeros(size, dtype=torch.int64, device=index.device).scatter_reduce_(0, index, order, "amax")[index]
    return result.of(winner), value[winner]


def write(ring: Ring, index: Tensor, result: SearchResult, value: Tensor, updates: Tensor, repeated: bool = False) -> None:
    """Cache a search of the positions `index` [M] flat: policy, network value [M], root value. Dead slots keep zeros.

    repeated: whether a position may come more than once.
    """
    if repeated:
        result, value = _one_result_each(index, result, value, ring.done.numel())
    alive = ~ring.done.view(-1)[index]
    ring.policy.view(-1, ring.policy.shape[-1])[index] = (result.policy * alive[:, None]).to(ring.policy.dtype)
    ring.value.view(-1)[index] = torch.where(alive, value.float(), 0.0)
    ring.root_value.view(-1)[index] = torch.where(alive, result.value.float(), 0.0)
    ring.refreshed_at.view(-1)[index] = updates.to(torch.int32).expand_as(index)


def write_values(ring: Ring, index: Tensor, value: Tensor) -> None:
    """Cache the network values [M] of the positions `index` [M] flat, without a search. Dead slots keep zeros."""
    ring.value.view(-1)[index] = torch.where(ring.done.view(-1)[index], 0.0, value.float())


def refresh_priorities(ring: Ring, index: Tensor, config: Config) -> None:
    """Priority Refresh: |v - z| of the positions `index` [M] from the cached values.

    A position whose n steps do not exist yet, or whose bootstrap value was never searched, keeps the priority it has.
    """
    searched = (ring.refreshed_at >= 0) | ring.done
    fresh, n = errors(ring, index, ring.value.view(-1)[index], torch.where(searched, bootstrap(ring, config), torch.nan), config)
    known = (ring.age()[index % ring.slots] >= n) & fresh.isfinite()
    old = ring.priority.view(-1)[index]
    known &= ~ring.done.view(-1)[index]
    ring.priority.view(-1)[index] = torch.where(known, fresh, old)
    ring.measured.view(-1)[index] |= known


def errors(ring: Ring, index: Tensor, value: Tensor, bootstrap: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """The priorities |v - z| [M] of the positions `index` [M] flat, whose values are `value` [M], with targets that bootstrap from
    `bootstrap` [L, T]; and the n [M] of the targets."""
    n = n_steps(ring, index, config)
    target = targets(
        ring.reward, ring.done, bootstrap, ring.policy, ring.action, index, n,
        unroll=0, n_max=config.n_step, discount=config.discount, horizon=config.lstm_horizon,
    )  # fmt: skip
    return (value - target.value[:, 0]).abs() + PRIORITY_FLOOR, n
