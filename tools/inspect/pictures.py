"""What the network sees, as one picture.

A block for each position, row by row in the order of the table. In a block, line 0 is the observation and line k the future k steps on;
from left to right the frames of the stack as they lie in the channels, as they are, a white gap, and the same as augmented.
"""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

GAP = 4
LEAST_SIDE = 40


def write_png(path: Path, image: Tensor) -> None:
    """Write `image` [H, W, 3] u8 RGB. Raises OSError."""
    Image.fromarray(image.numpy()).save(path)


def _panel(observation: Tensor, stack: int, low: float, high: float) -> Tensor:
    """The frames of an observation [stack x C, H, W] side by side: [h, w, 3] u8. Three channels are RGB, others lie below each other."""
    frames = observation.unflatten(0, (stack, -1))
    channels = frames.shape[1]
    frames = frames if channels == 3 else frames.flatten(1, 2)[:, None].expand(-1, 3, -1, -1)
    scale = max(1, -(-LEAST_SIDE // max(frames.shape[2:])))
    frames = frames.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    frames = functional.pad(frames, (0, 1, 0, 1), value=high)
    pixels = ((frames - low) / max(high - low, 1e-9)).clamp(0, 1).mul(255).round().to(torch.uint8)
    return torch.cat(list(pixels), 2).permute(1, 2, 0)


def picture(plain: Tensor, augmented: Tensor, stack: int, pixels: bool) -> Tensor:
    """All positions in one image [h, w, 3] u8.

    plain, augmented: [M, K + 1, stack x C, H, W] float, the observation and its futures. pixels: 0..1 is black to white, clipped beyond;
    else the least to the greatest of `plain`.
    """
    low, high = (0.0, 1.0) if pixels else (float(plain.min()), float(plain.max()))
    blocks = []
    for left, right in zip(plain, augmented, strict=True):
        lines = []
        for a, b in zip(left, right, strict=True):
            a, b = _panel(a, stack, low, high), _panel(b, stack, low, high)
            lines.append(torch.cat((a, a.new_full((a.shape[0], GAP, 3), 255), b), 1))
        blocks.append(functional.pad(torch.cat(lines), (0, 0, 0, 2 * GAP, 0, 2 * GAP), value=255))
    across = max(1, round((len(blocks) * blocks[0].shape[0] / blocks[0].shape[1]) ** 0.5))
    blocks += [torch.full_like(blocks[0], 255)] * (-len(blocks) % across)
    return torch.cat([torch.cat(blocks[at : at + across], 1) for at in range(0, len(blocks), across)])
