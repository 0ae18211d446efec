"""The schedule of a run: which phase comes next, how many positions it searches, and the rates that change with the updates.

All of it follows from counts of what was done, never from time, so that a seed determines the run. Everything here is a pure function.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from speedyzero.config import Config
from speedyzero.settings import LearnSettings

Phase = Literal["collect", "sweep", "train", "learn"]
"""What an iteration does; `iteration` says what each is."""


class Counts(NamedTuple):
    """What a run has done so far."""

    env_steps: int = 0
    """Transitions, over all lanes."""
    updates: int = 0
    slots: int = 0
    """Slots written in each lane."""
    swept: int = 0
    """Positions refreshed by the first sweep."""


def next_phase(config: Config, counts: Counts) -> Phase | None:
    """The phase of the next iteration; None when the run is complete."""
    if counts.env_steps < config.start_transitions:
        return "collect"
    searchable = min(counts.slots - 1, config.slots) * config.lanes
    if config.refresh == "sweep" and counts.swept < searchable and counts.updates == 0:
        return "sweep"
    if counts.env_steps < config.env_steps:
        return "train"
    return "learn" if counts.updates < config.total_updates else None


def sweep_roots(config: Config, slots: int) -> int:
    """R, the positions of the ring that a sweep refreshes in one iteration; 0 under `sampled` refresh, which sweeps nothing.

    The least of R/8, R/4, R/2 and R that keeps the sweep's period while the ring fills.
    """
    if config.refresh == "sampled":
        return 0
    share = config.refresh_roots * min(slots * config.lanes, config.ring_positions) / config.ring_positions
    return next(config.refresh_roots // part for part in (8, 4, 2, 1) if config.refresh_roots // part >= share or part == 1)


def count(config: Config, counts: Counts, phase: Phase, roots: int) -> Counts:
    """The counts after one more iteration of `phase` with `roots` of the sweep."""
    steps, learns = phase in ("collect", "train"), phase in ("train", "learn")
    return Counts(
        env_steps=counts.env_steps + steps * config.lanes,
        updates=counts.updates + learns * config.updates_per_iteration,
        slots=counts.slots + steps,
        swept=counts.swept + (roots if phase == "sweep" else 0),
    )


def iterations(config: Config) -> Iterator[tuple[Phase, int]]:
    """Phase and R of every iteration of a run, from the first to the last."""
    counts = Counts()
    while (phase := next_phase(config, counts)) is not None:
        roots = 0 if phase == "collect" else sweep_roots(config, counts.slots)
        yield phase, roots
        counts = count(config, counts, phase, roots)


def search_roots(config: Config) -> dict[str, int]:
    """Roots of the largest search of each phase that searches, and of the evaluation."""
    if config.refresh == "sampled":
        replayed = config.updates_per_iteration * config.batch_size * config.window
        phases = {"train": replayed + config.lanes, "learn": replayed}
    else:
        phases = {"sweep": config.refresh_roots, "train": config.refresh_roots + config.lanes, "learn": config.refresh_roots}
    return phases | {"evaluation": config.eval_episodes}


def learning_rate(config: Config, updates: Tensor) -> Tensor:
    """Learning rate [] float32 of the update after `updates` [] int64: linear warm-up, constant, times lr_decay past the planned ones."""
    warmup = max(1.0, config.lr_warmup * config.planned_updates)
    rate = config.lr * ((updates + 1) / warmup).clamp(max=1.0)
    return torch.where(updates < config.planned_updates, rate, rate * config.lr_decay).to(torch.float32)


def importance_exponent(config: Config, updates: Tensor) -> Tensor:
    """Beta [] float32: from priority_beta to 1, linearly over the planned updates."""
    progress = (updates / config.planned_updates).clamp(max=1.0)
    return config.priority_beta + (1 - config.priority_beta) * progress


def temperature(config: Config, updates: Tensor) -> Tensor:
    """Temperature of the acting distribution [] float32 after `updates` [] int64: steps down at 50% and 75% of the planned updates."""
    early, middle, late = config.temperatures
    progress = updates / config.planned_updates
    return torch.where(progress < 0.5, early, torch.where(progress < 0.75, middle, late)).to(torch.float32)


def compared_steps(config: LearnSettings, updates: Tensor) -> Tensor | None:
    """The steps of the unroll [M] int64, in 1..K, that the consistency loss of the update after `updates` [] compares; None: all.

    All steps take their turn.
    """
    steps = config.consistency_steps or config.unroll
    if steps >= config.unroll:
        return None
    return (updates * steps + torch.arange(steps, device=updates.device)) % config.unroll + 1
