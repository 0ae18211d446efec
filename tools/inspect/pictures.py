"""What the network sees, as one picture.

A block for each position, row by row in the order of the table. In a block, line 0 is the observation and line k the future k steps on;
from left to right the frames of the stack as they lie in the channels, as they are, a white gap, and the same as augmented.
"""

import torch
from torch import Tensor
from torch.nn import functional


def picture(plain: Tensor, augmented: Tensor, stack: int, pixels: bool) -> Tensor:
    """All positions in one image [h, w, 3] u8 RGB. Three channels are RGB, others lie below each other, in grey.

    plain, augmented: [M, K + 1, stack x C, H, W] float, the observation and its futures. pixels: 0..1 is black to white, clipped beyond;
    else the least to the greatest of `plain`.
    """
    low, high = (0.0, 1.0) if pixels else (float(plain.min()), float(plain.max()))
    frames = torch.stack((plain, augmented), 2).unflatten(3, (stack, -1)).sub(low).div(max(high - low, 1e-9)).clamp(0, 1)
    if frames.shape[4] != 3:
        frames = frames.flatten(4, 5)[:, :, :, :, None].expand(-1, -1, -1, -1, 3, -1, -1)
    # White: a line right of and below every frame, a frame after every stack, a line of frames after every position.
    frames = functional.pad(frames, (0, 1, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1), value=1.0)
    across = max(1, round(len(frames) ** 0.5 / 2))
    frames = torch.cat((frames, frames.new_ones(-len(frames) % across, *frames.shape[1:])))
    # [down, across, step, half, frame, RGB, y, x] -> [down, step, y, across, half, frame, x, RGB]
    image = frames.unflatten(0, (-1, across)).permute(0, 2, 6, 1, 3, 4, 7, 5)
    return image.flatten(0, 2).flatten(1, 4).mul(255).round().to(torch.uint8)
