"""Observations out of the ring: stack the frames of a position, shift, scale (steps 2 and 5).

A frame is stored once and a stack is gathered: the frames before an episode's first are that first one again (the usual
Atari stack, Mnih et al. 2015). The random shift with replicated borders and the intensity factor are those of "Image
Augmentation Is All You Need" (Kostrikov et al. 2021, section 3.1) and SPR (Schwarzer et al. 2021, section 2.3), as
EfficientZero uses them. Normalising each pixel by its own mean and spread, clipped to a few spreads, is that of "Exploration by Random
Network Distillation" (Burda et al. 2018, section 2.4): what never moves becomes 0, and does not drown what does.

`L` lanes, `T` slots, `M` positions, `C`, `H`, `W` channels, height and width of one frame, `S` frames of a stack.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import checks, dispatch
from .gather_cpu import NORMALISED_LIMIT, observations_numba

LONGEST_STACK = 64
MOST_PLANES = 512
LARGEST_SIDE = 2048
# A position is a 32-bit number in the kernel. Where its bytes are is not: a ring of 100k frames of 3 x 96 x 96 has 2.8e9.
MOST_POSITIONS = 2**30


def stack_indices(first: Tensor, index: Tensor, stack: int) -> Tensor:
    """Where the `stack` frames of each position lie. Plain PyTorch, on any device: the kernel of `observations` walks by itself.

    first: [L, T] bool, the first frames of episodes. index: [M] int64, flat (lane * T + slot).
    Returns [M, stack] int64 flat indices, oldest first: slot, slot - 1, ... modulo T, staying at the first slot met
    whose `first` is set. The caller offers no position whose walk crosses the ring's head.

    Raises ValueError if first is not bool [L, T], index not int64 [M], on another device, or stack not in 1..64.
    Bytes moved: M * stack flags read, 8 * M * stack written.
    """
    _check_walk(first, index, stack)
    slots = first.shape[1]
    slot = index.remainder(slots)[:, None]
    back = torch.arange(stack - 1, -1, -1, device=index.device)
    base = index[:, None] - slot
    newest_first = base + (slot - back.flip(0)).remainder_(slots)
    free = (first.view(-1)[newest_first].cumsum(1) == 0).sum(1, keepdim=True)  # steps before a first frame stops it
    return base + (slot - torch.minimum(back, free)).remainder_(slots)


def observations_reference(
    frames: Tensor,
    first: Tensor,
    index: Tensor,
    stack: int,
    shift: Tensor | None = None,
    pad: int = 4,
    intensity: Tensor | None = None,
    *,
    mean: Tensor | None = None,
    scale: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """`observations` in plain PyTorch."""
    lanes, slots, channels, height, width = frames.shape
    count = index.shape[0]
    flat = stack_indices(first, index, stack)
    still = () if mean is None else (mean, scale)  # [C, H, W], to become [M, 1, C, H, W] as seen through each shift
    if shift is None:
        out = frames.view(lanes * slots, -1).index_select(0, flat.view(-1))
    else:
        rows, columns = ((shift - pad)[:, :, None] + torch.arange(max(height, width), device=index.device)).unbind(1)
        rows = rows[:, :height].clamp(0, height - 1)
        columns = columns[:, :width].clamp(0, width - 1)
        planes = flat[:, :, None] * channels + torch.arange(channels, device=index.device)
        lines = planes.view(count, -1, 1) * height + rows[:, None]
        out = frames.view(-1, width).index_select(0, lines.view(-1)).view(count, -1, width)
        out = out.gather(2, columns[:, None].expand(out.shape))
        still = tuple(plane[:, rows[:, :, None], columns[:, None]].transpose(0, 1)[:, None] for plane in still)
    out = out.view(count, stack * channels, height, width)
    unit = 1.0
    if frames.dtype == torch.uint8:
        out, unit = out.float(), 1 / 255
    if intensity is not None:
        out.mul_((intensity * unit).view(count, 1, 1, 1))
    elif unit != 1.0:
        out.mul_(unit)
    if still:
        out.view(count, stack, channels, height, width).sub_(still[0]).mul_(still[1]).clamp_(-NORMALISED_LIMIT, NORMALISED_LIMIT)
    return out.to(dtype=dtype, memory_format=memory_format)


@triton.jit
def _pixels(at, some, SHIFTED: tl.constexpr):
    """What lies at the addresses [P, Q], where `some` says so. Shifted ones are read in one dimension, as of two the compiler, which cannot
    see that these run along the pixels, may take the wrong one."""
    if SHIFTED:
        value = tl.load(tl.reshape(at, [at.numel]), mask=tl.reshape(some, [at.numel]), other=0)
        value = tl.reshape(value, at.shape)
    else:
        value = tl.load(at, mask=some, other=0)
    return value


@triton.jit(do_not_specialize=["positions", "slots", "pad"])
def _observations_kernel(
    frames, first, index, shift, intensity, mean, scale, out, positions, slots, pad,
    STACK: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, SHIFT: tl.constexpr, INTENSITY: tl.constexpr,
    SCALE: tl.constexpr, NORMALISE: tl.constexpr, LIMIT: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs read the same frames: the blocks of a position, then the position after it.
    planes: tl.constexpr = STACK * C
    pixels: tl.constexpr = H * W
    blocks_p: tl.constexpr = (planes + BLOCK_P - 1) // BLOCK_P
    blocks_q: tl.constexpr = (pixels + BLOCK_Q - 1) // BLOCK_Q
    block = tl.program_id(0) % (blocks_p * blocks_q)
    position = (tl.program_id(0) // (blocks_p * blocks_q)).to(tl.int64)
    p = block // blocks_q * BLOCK_P + tl.arange(0, BLOCK_P)
    q = block % blocks_q * BLOCK_Q + tl.arange(0, BLOCK_Q)

    # The walk: all flags it could meet at once, for a step at a time would wait for memory at each.
    newest = tl.minimum(tl.maximum(tl.load(index + position), 0), positions - 1).to(tl.int32)
    slot = newest % slots
    start = newest - slot
    back = tl.arange(0, BLOCK_S)
    met = (slot - back) % slots
    met = tl.where(met < 0, met + slots, met)  # the remainder has the sign of the dividend
    stop = tl.load(first + start + met, mask=back < STACK, other=0) != 0
    free = tl.min(tl.where(stop, back, STACK), 0)
    taken = (slot - tl.minimum(STACK - 1 - p // C, free)) % slots
    taken = start + tl.where(taken < 0, taken + slots, taken)
    channel = p % C * pixels
    plane = taken.to(tl.int64) * (C * pixels) + channel

    some = (p < planes)[:, None] & (q < pixels)[None, :]
    if SHIFT:
        dy = tl.load(shift + 2 * position) - pad
        dx = tl.load(shift + 2 * position + 1) - pad
        # Further out than a side is all border; within 32 bits by then.
        y = q // W + tl.minimum(tl.maximum(dy, -H), H).to(tl.int32)
        x = q % W + tl.minimum(tl.maximum(dx, -W), W).to(tl.int32)
        y = tl.minimum(tl.maximum(y, 0), H - 1)
        x = tl.minimum(tl.maximum(x, 0), W - 1)
        source = y * W + x
    else:
        source = q
    value = _pixels(frames + plane[:, None] + source[None, :], some, SHIFT).to(tl.float32)
    if INTENSITY:
        value *= tl.load(intensity + position) * SCALE
    else:
        value *= SCALE
    if NORMALISE:
        still = channel[:, None] + source[None, :]
        value = (value - _pixels(mean + still, some, SHIFT)) * _pixels(scale + still, some, SHIFT)
        value = tl.where(value > LIMIT, LIMIT, value)  # NaN is neither, and stays
        value = tl.where(value < -LIMIT, -LIMIT, value)
    value = value.to(out.dtype.element_ty)
    out += position * (planes * pixels)
    if CHANNELS_LAST:
        # Read along the pixels, written along the planes: turned in shared memory.
        tl.store(out + q[:, None] * planes + p[None, :], tl.trans(value), mask=tl.trans(some))
    else:
        tl.store(out + p[:, None] * pixels + q[None, :], value, mask=some)


def observations_kernel(
    frames: Tensor,
    first: Tensor,
    index: Tensor,
    stack: int,
    shift: Tensor | None = None,
    pad: int = 4,
    intensity: Tensor | None = None,
    *,
    mean: Tensor | None = None,
    scale: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """`observations` as one launch."""
    _, slots, channels, height, width = frames.shape
    count, planes, pixels = index.shape[0], stack * channels, height * width
    out = torch.empty((count, planes, height, width), dtype=dtype, device=frames.device, memory_format=memory_format)
    block_p = min(triton.next_power_of_2(planes), 64)
    # Normalising reads three numbers a pixel, and half the pixels at once keep them in registers.
    block_q = min(triton.next_power_of_2(pixels), (4096 if mean is None else 2048) // block_p, 512)
    _observations_kernel[(count * triton.cdiv(planes, block_p) * triton.cdiv(pixels, block_q),)](
        frames, first.view(torch.uint8), index, index if shift is None else shift, frames if intensity is None else intensity,
        frames if mean is None else mean, frames if scale is None else scale, out, first.numel(), slots, pad,
        STACK=stack, C=channels, H=height, W=width, SHIFT=shift is not None, INTENSITY=intensity is not None,
        SCALE=1 / 255 if frames.dtype == torch.uint8 else 1.0, NORMALISE=mean is not None, LIMIT=NORMALISED_LIMIT,
        CHANNELS_LAST=memory_format == torch.channels_last,
        BLOCK_S=triton.next_power_of_2(stack), BLOCK_P=block_p, BLOCK_Q=block_q, num_warps=2,
        enable_fp_fusion=False,  # to normalise is a difference and a product, each rounded, as in the other forms
        maxnreg=128,  # unbound, the assembler keeps to as few as 40 and spills
    )  # fmt: skip
    return out


def observations(
    frames: Tensor,
    first: Tensor,
    index: Tensor,
    stack: int,
    shift: Tensor | None = None,
    pad: int = 4,
    intensity: Tensor | None = None,
    *,
    mean: Tensor | None = None,
    scale: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """The stacked, augmented, scaled observation of each position.

    On CUDA any number of positions is one launch; on a CPU it is one pass of `gather_cpu`, but for f16, which is the reference.
    Neighbours in `index` should be neighbours in the ring, as the steps of an unroll are (`[B, K + 1]` flattened): their stacks share
    frames, which are then read from memory once.

    frames: [L, T, C, H, W] u8 (scaled by 1/255) or f32 (taken as is), sides of at most 2048.
    first, index, stack: as in `stack_indices`; stack * C is at most 512. Of an index out of range the kernel makes the nearest,
        and the other forms an IndexError.
    shift: [M, 2] int64, (dy, dx) in 0..2 * pad: crop of H x W at (dy, dx) out of the frame with its border replicated
        `pad` times; (pad, pad) is the identity, None the same at no cost. One draw for all frames of a stack.
    intensity: [M] f32, multiplies the observation; None is 1.
    mean, scale: [C, H, W] f32, of one frame; both or none. With them a pixel x, scaled and dimmed, becomes
        clip((x - mean) * scale, -NORMALISED_LIMIT, NORMALISED_LIMIT): of the source pixel, so a shift is one of the normalised picture.
        All forms round to f32 after each step, in this order: x = pixel * (intensity * (1/255)), x - mean, that * scale. NaN stays NaN.
    dtype: of the result: f32, bf16 or f16, rounded from f32 at the end.
    memory_format: of the result: torch.contiguous_format or torch.channels_last.
    Returns [M, stack * C, H, W], oldest frame first.

    Raises ValueError for a wrong shape or dtype, tensors that are not contiguous or on different devices, sizes beyond those
    above or of 0, or pad < 0. Bytes moved: M * stack * C * H * W read (u8; x 4 for f32) less what neighbours share, and as many
    elements written; `mean` and `scale` are small enough to stay in a cache.
    """
    _check_walk(first, index, stack)
    lanes, slots = first.shape
    checks.tensor("frames", frames, (lanes, slots, "C", "H", "W"), (torch.uint8, torch.float32), first.device)
    channels, height, width = frames.shape[2:]
    for name, size in (("channels", channels), ("height", height), ("width", width)):
        checks.at_least(f"frames: {name}", size, 1)
    checks.at_most("frames: height", height, LARGEST_SIDE)
    checks.at_most("frames: width", width, LARGEST_SIDE)
    checks.at_most("stack: stack x channels", stack * channels, MOST_PLANES)
    if shift is not None:
        checks.tensor("shift", shift, (index.shape[0], 2), torch.int64, first.device)
        checks.at_least("pad", pad, 0)
    if intensity is not None:
        checks.tensor("intensity", intensity, (index.shape[0],), torch.float32, first.device)
    if (mean is None) != (scale is None):
        raise ValueError("mean: goes with scale, give both or none")
    if mean is not None:
        checks.tensor("mean", mean, (channels, height, width), torch.float32, first.device)
        checks.tensor("scale", scale, (channels, height, width), torch.float32, first.device)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype: must be float32, bfloat16 or float16, got {dtype}")
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(f"memory_format: must be torch.contiguous_format or torch.channels_last, got {memory_format}")
    if dispatch.runs_kernel(frames):
        gather = observations_kernel
    elif dispatch.runs_numba(frames) and dtype != torch.float16:  # which neither numba nor any CPU config of ours has
        gather = observations_numba
    else:
        gather = observations_reference
    return gather(frames, first, index, stack, shift, pad, intensity, mean=mean, scale=scale, dtype=dtype, memory_format=memory_format)


def _check_walk(first: Tensor, index: Tensor, stack: int) -> None:
    checks.tensor("first", first, ("L", "T"), torch.bool)
    checks.tensor("index", index, ("M",), torch.int64, first.device)
    checks.at_least("first: positions", first.numel(), 1)
    checks.at_most("first: positions", first.numel(), MOST_POSITIONS)
    checks.at_least("index: positions", index.shape[0], 1)
    checks.at_least("stack", stack, 1)
    checks.at_most("stack", stack, LONGEST_STACK)
