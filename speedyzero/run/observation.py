"""What the network sees, as pictures for the logs. They wait for the device, and change nothing."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from speedyzero.state import State
from speedyzero_kernels.gather import observations
from speedyzero_kernels.gather_cpu import NORMALISED_LIMIT

CLIP_STEPS = 150
"""Ten seconds of Atari."""


def newest_observation(state: State) -> np.ndarray | None:
    """The newest observation of the first lane, the frames of its stack side by side, oldest left: [H, S x W, 3] u8 if they are RGB, else
    [C x H, S x W, 1] with the channels below each other. None where an observation is a list of numbers.

    Normalised pixels are shown as the network gets them: gray is their mean. What is no pixels goes from its least, black, to its greatest.
    """
    ring, config = state.ring, state.config
    if min(state.spec.frame_shape[1:]) < 2:
        return None
    (seen,) = observations(ring.frames, ring.first, ring.newest()[:1], config.frame_stack, **state.snapshot.input_format).float().cpu()
    if config.normalize_frames:
        seen = seen / (2 * NORMALISED_LIMIT) + 0.5
    elif not state.spec.image:
        seen = _spread(seen)
    frames = _pixels(seen.unflatten(0, (config.frame_stack, -1)))
    return frames.transpose(1, 0, 2, 3).reshape(frames.shape[1], -1, frames.shape[3])


def newest_frames(state: State) -> np.ndarray | None:
    """The newest frames of the first lane, oldest first: [T, H, W, 3] u8 if they are RGB, else [T, C x H, W, 1]. None as above."""
    ring = state.ring
    if min(state.spec.frame_shape[1:]) < 2:
        return None
    head = int(ring.head)
    count = min(head, ring.slots, CLIP_STEPS)
    slots = torch.arange(head - count, head, device=ring.frames.device) % ring.slots
    frames = ring.frames[0].index_select(0, slots).float().cpu()
    return _pixels(frames / 255 if state.spec.image else _spread(frames))


def _spread(numbers: Tensor) -> Tensor:
    """Numbers from their least, 0, to their greatest, 1."""
    return (numbers - numbers.min()) / (numbers.max() - numbers.min()).clamp_min(1e-9)


def _pixels(frames: Tensor) -> np.ndarray:
    """Frames [T, C, H, W] of 0 to 1 as u8: [T, H, W, 3] if they are RGB, else [T, C x H, W, 1]."""
    pixels = frames.clamp(0, 1).mul(255).round().byte()
    return (pixels.permute(0, 2, 3, 1) if pixels.shape[1] == 3 else pixels.flatten(1, 2)[..., None]).numpy()
