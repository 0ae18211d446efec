"""Observations out of the ring: stack the frames of a position, shift, scale (steps 2 and 5).

A frame is stored once and a stack is gathered: the frames before an episode's first are that first one again (the usual
Atari stack, Mnih et al. 2015). The random shift with replicated borders and the intensity factor are those of "Image
Augmentation Is All You Need" (Kostrikov et al. 2021, section 3.1) and SPR (Schwarzer et al. 2021, section 2.3), as
EfficientZero uses them.

`L` lanes, `T` slots, `M` positions, `C`, `H`, `W` channels, height and width of one frame.
"""

import torch
from torch import Tensor


def stack_indices(first: Tensor, index: Tensor, stack: int) -> Tensor:
    """Where the `stack` frames of each position lie.

    first: [L, T] bool, the first frames of episodes. index: [M] int64, flat (lane * T + slot).
    Returns [M, stack] int64 flat indices, oldest first: slot, slot - 1, ... modulo T, staying at the first slot met
    whose `first` is set. The caller offers no position whose walk crosses the ring's head.

    Raises ValueError if first is not bool [L, T], index not int64 [M], on another device, or stack < 1.
    Bytes moved: M * stack flags read, 8 * M * stack written.
    """
    _check_first(first, index, stack)
    slots = first.shape[1]
    slot = index.remainder(slots)[:, None]
    back = torch.arange(stack - 1, -1, -1, device=index.device)
    base = index[:, None] - slot
    newest_first = base + (slot - back.flip(0)).remainder_(slots)
    free = (first.view(-1)[newest_first].cumsum(1) == 0).sum(1, keepdim=True)  # steps before a first frame stops it
    return base + (slot - torch.minimum(back, free)).remainder_(slots)


def observations(
    frames: Tensor,
    first: Tensor,
    index: Tensor,
    stack: int,
    shift: Tensor | None = None,
    pad: int = 4,
    intensity: Tensor | None = None,
) -> Tensor:
    """The stacked, augmented, scaled observation of each position.

    frames: [L, T, C, H, W] u8 (scaled by 1/255) or f32 (taken as is), contiguous.
    first, index, stack: as in `stack_indices`.
    shift: [M, 2] int64, (dy, dx) in 0..2 * pad: crop of H x W at (dy, dx) out of the frame with its border replicated
        `pad` times; (pad, pad) is the identity, None the same at no cost. One draw for all frames of a stack.
    intensity: [M] f32, multiplies the observation; None is 1.
    Returns [M, stack * C, H, W] f32, oldest frame first.

    Raises ValueError for a wrong shape or dtype, frames that are not contiguous, tensors on different devices,
    stack < 1 or pad < 0. Bytes moved when fused: M * stack * C * H * W read (u8; x 4 for f32), 4 times that written.
    """
    _check_first(first, index, stack)
    _check_frames(frames, first)
    lanes, slots, channels, height, width = frames.shape
    count = index.shape[0]
    flat = stack_indices(first, index, stack)
    if shift is None:
        out = frames.view(lanes * slots, -1).index_select(0, flat.view(-1))
    else:
        _check_sample("shift", shift, (count, 2), torch.int64, index)
        if pad < 0:
            raise ValueError(f"pad: must be at least 0, got {pad}")
        rows, columns = ((shift - pad)[:, :, None] + torch.arange(max(height, width), device=index.device)).unbind(1)
        rows = rows[:, :height].clamp(0, height - 1)
        columns = columns[:, :width].clamp(0, width - 1)
        planes = flat[:, :, None] * channels + torch.arange(channels, device=index.device)
        lines = planes.view(count, -1, 1) * height + rows[:, None]
        out = frames.view(-1, width).index_select(0, lines.view(-1)).view(count, -1, width)
        out = out.gather(2, columns[:, None].expand(out.shape))
    out = out.view(count, stack * channels, height, width)
    scale = 1.0
    if frames.dtype == torch.uint8:
        out, scale = out.float(), 1 / 255
    if intensity is not None:
        _check_sample("intensity", intensity, (count,), torch.float32, index)
        return out.mul_((intensity * scale).view(count, 1, 1, 1))
    return out if scale == 1.0 else out.mul_(scale)


def _check_first(first: Tensor, index: Tensor, stack: int) -> None:
    if first.ndim != 2 or first.dtype != torch.bool or not first.is_contiguous():
        raise ValueError(f"first: must be contiguous bool [L, T], got {first.dtype} {tuple(first.shape)}")
    if index.ndim != 1 or index.dtype != torch.int64:
        raise ValueError(f"index: must be int64 [M], got {index.dtype} {tuple(index.shape)}")
    if index.device != first.device:
        raise ValueError(f"index: on {index.device}, but first is on {first.device}")
    if stack < 1:
        raise ValueError(f"stack: must be at least 1, got {stack}")


def _check_frames(frames: Tensor, first: Tensor) -> None:
    if frames.ndim != 5 or frames.dtype not in (torch.uint8, torch.float32):
        raise ValueError(f"frames: must be u8 or f32 [L, T, C, H, W], got {frames.dtype} {tuple(frames.shape)}")
    if not frames.is_contiguous():
        raise ValueError("frames: must be contiguous")
    if frames.shape[:2] != first.shape:
        raise ValueError(f"frames: [L, T] is {tuple(frames.shape[:2])}, but first's is {tuple(first.shape)}")
    if frames.device != first.device:
        raise ValueError(f"frames: on {frames.device}, but first is on {first.device}")


def _check_sample(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, index: Tensor) -> None:
    if x.shape != shape or x.dtype != dtype:
        raise ValueError(f"{name}: must be {dtype} {shape}, got {x.dtype} {tuple(x.shape)}")
    if x.device != index.device:
        raise ValueError(f"{name}: on {x.device}, but index is on {index.device}")
