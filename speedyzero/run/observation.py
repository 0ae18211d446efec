"""What the network sees, as a picture for the logs."""

from __future__ import annotations

import numpy as np

from speedyzero.state import State
from speedyzero_kernels.gather import observations
from speedyzero_kernels.gather_cpu import NORMALISED_LIMIT


def newest_observation(state: State) -> np.ndarray | None:
    """The newest observation of the first lane, the frames of its stack side by side, oldest left: [H, S x W, 3] u8 if they are RGB, else
    [C x H, S x W, 1] with the channels below each other. None where an observation is a list of numbers.

    Normalised pixels are shown as the network gets them: gray is their mean. What is no pixels goes from its least, black, to its greatest.
    Waits for the device, and changes nothing.
    """
    ring, config = state.ring, state.config
    if min(state.spec.frame_shape[1:]) < 2:
        return None
    (seen,) = observations(ring.frames, ring.first, ring.newest()[:1], config.frame_stack, **state.snapshot.input_format).float().cpu()
    if config.normalize_frames:
        seen = seen / (2 * NORMALISED_LIMIT) + 0.5
    elif not state.spec.image:
        seen = (seen - seen.min()) / (seen.max() - seen.min()).clamp_min(1e-9)
    frames = seen.clamp(0, 1).mul(255).round().byte().unflatten(0, (config.frame_stack, -1))  # [S, C, H, W]
    if frames.shape[1] == 3:
        return frames.permute(2, 0, 3, 1).flatten(1, 2).numpy()
    return frames.permute(1, 2, 0, 3).flatten(0, 1).flatten(1, 2)[..., None].numpy()
