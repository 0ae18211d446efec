"""What an update learns from: positions drawn by priority, their observations, augmented, and their targets (steps 5.1 and 5.2).

In the shapes `B` is the batch, `K` the unroll, `M` the steps whose observations are compared, all K or some.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from speedyzero.config import Config
from speedyzero.refresh import bootstrap, n_steps
from speedyzero.ring import Ring
from speedyzero.schedule import importance_exponent
from speedyzero.settings import LearnSettings
from speedyzero_kernels import dispatch
from speedyzero_kernels.gather import observations
from speedyzero_kernels.nstep import Targets, targets
from speedyzero_kernels.sample import proportional

NOT_NORMALISED: Mapping[str, Tensor] = MappingProxyType({})
"""The `normalisation` of a network that takes pixels as they are."""


@dataclass
class Augmentation:
    """The random draws of a batch; [0] is for the observations, [1] for the futures of the same sample."""

    shift: Tensor
    """[2, B, 2] int64, where the window begins in the padded frame: y, x."""
    intensity: Tensor
    """[2, B] float32."""


@dataclass
class Batch:
    """What an update learns from."""

    observation: Tensor
    """[B, stack x C, H, W] float32 (bfloat16 with `amp`), augmented."""
    future: Tensor
    """[B x M, stack x C, H, W] of the same dtype, the observations that follow, M = K, sample-major, augmented by draws of their own."""
    targets: Targets
    weights: Tensor
    """[B] float32 importance weights, at most 1."""
    augmentation: Augmentation | None = None
    """Without: the frames as they are."""
    compared: Tensor | None = None
    """[M] int64 in 1..K, which steps `future` holds, for the consistency loss to compare; without: all K."""


def draw(ring: Ring, allowed: Tensor, config: Config, updates: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw positions by priority among the `allowed` [L, T] ones: flat indices [B] int64 and importance weights [B]."""
    priorities = torch.where(allowed, ring.priority, 0.0).view(-1)
    beta = importance_exponent(config, updates)
    return proportional(priorities, config.batch_size, config.priority_alpha, beta, generator)


def _augmentation(config: LearnSettings, batch: int, generator: torch.Generator) -> Augmentation:
    """Shift and intensity of the observations and, by draws of their own, of the futures: one draw a sample and branch."""
    device = generator.device
    shifts, noises = [], []
    for _ in range(2):
        shifts.append(torch.randint(2 * config.shift + 1, (batch, 2), generator=generator, device=device))
        noises.append(torch.randn(batch, generator=generator, device=device))
    return Augmentation(torch.stack(shifts), 1.0 + config.intensity * torch.stack(noises).clamp(-2.0, 2.0))


def observe(
    ring: Ring, index: Tensor, config: Config, augmentation: Augmentation | None, compared: Tensor | None = None,
    normalisation: Mapping[str, Tensor] = NOT_NORMALISED,
) -> tuple[Tensor, Tensor]:
    """The observations of the positions `index` [B] flat and of those `compared` [M] steps later, as `Batch` holds them.

    normalisation: the network's own.

    Raises:
        ValueError: the config wants frames normalised and `normalisation` is empty.
    """
    if config.normalize_frames and not normalisation:
        raise ValueError("normalisation: is missing, though --normalize-frames is on; give the network's")
    lane, slot = index // ring.slots, index % ring.slots
    if compared is None:
        compared = torch.arange(1, config.unroll + 1, device=index.device)
    future = (lane[:, None] * ring.slots + (slot[:, None] + compared) % ring.slots).flatten()
    drawn: dict[str, Tensor | int] = {}
    if augmentation is not None:
        both = augmentation.shift, augmentation.intensity
        shift, intensity = (torch.cat((draws[0], draws[1].repeat_interleave(compared.shape[0], 0))) for draws in both)
        drawn = {"shift": shift, "pad": config.shift, "intensity": intensity}
    frames = observations(
        ring.frames, ring.first, torch.cat((index, future)), config.frame_stack, **drawn, **normalisation,
        dtype=torch.bfloat16 if config.amp else torch.float32, memory_format=dispatch.board_format(ring.frames),
    )
    return frames[: index.shape[0]], frames[index.shape[0] :]


def gather_batch(
    ring: Ring, index: Tensor, weights: Tensor, config: Config, generator: torch.Generator, compared: Tensor | None = None,
    normalisation: Mapping[str, Tensor] = NOT_NORMALISED, rows: slice = slice(None),
) -> Batch:
    """Observations and targets of the positions `index` [B] flat; `compared` as in `Batch`, `normalisation` as in `observe`.

    rows: those of the batch that are wanted. What is drawn is drawn for all, so that it is a sample's own whoever else is wanted.
    """
    augmentation = None
    if config.augment:
        drawn = _augmentation(config, index.shape[0], generator)
        augmentation = Augmentation(drawn.shift[:, rows], drawn.intensity[:, rows])
    index, weights = index[rows], weights[rows]
    observation, future = observe(ring, index, config, augmentation, compared, normalisation)
    return Batch(
        observation=observation,
        future=future,
        targets=targets(
            ring.reward, ring.done, bootstrap(ring, config), ring.policy, ring.action, index, n_steps(ring, index, config),
            unroll=config.unroll, n_max=config.n_step, discount=config.discount, horizon=config.lstm_horizon,
        ),
        weights=weights,
        augmentation=augmentation,
        compared=compared,
    )
