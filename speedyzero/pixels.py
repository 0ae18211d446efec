"""What normalises the pixels of frames: the mean and the spread of each over the random start.

As the observations of random network distillation (Burda et al., 2018) are normalised.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from speedyzero.ring import Ring

# Added to the standard deviation of a pixel: five levels of 255. One that never changed in the random start is scaled by no more than 50.
SPREAD_FLOOR = 0.02


class Pixels(nn.Module):
    """Mean and spread of every pixel of a frame, by which `gather.observations` normalises: a network is of no use without them.

    Not learned: measured once, before the first update. float32 in every network.
    """

    def __init__(self, shape: tuple[int, int, int]):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("scale", torch.ones(shape))

    def fold_from(self, source: Pixels) -> None:
        """Take those of `source`."""
        self.mean.copy_(source.mean)
        self.scale.copy_(source.scale)


@torch.no_grad()
def measure_pixels(ring: Ring, mean: Tensor, scale: Tensor) -> None:
    """Mean and 1 / (standard deviation + SPREAD_FLOOR) of every pixel over all slots written so far, of uint8 frames as 0..1.

    mean, scale: [C, H, W] float32, written in place. Waits for the device: for the host loop only.

    Sums of whole numbers: exact, so the same in any order and on any device. One slot at a time, for the ring may fill the memory.
    """
    total, squares = (torch.zeros(mean.shape, dtype=torch.int64, device=mean.device) for _ in range(2))
    written = min(int(ring.head), ring.slots)
    for slot in range(written):
        frame = ring.frames[:, slot].to(torch.int64)
        total += frame.sum(0)
        squares += frame.square().sum(0)
    count = written * ring.lanes
    average = total.double() / count
    # A variance that rounding made less than 0 is 0.
    deviation = (squares.double() / count - average.square()).clamp_min(0).sqrt() / 255
    mean.copy_(average / 255)
    scale.copy_(1 / (deviation + SPREAD_FLOOR))
