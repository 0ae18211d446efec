"""`gather.observations` on a CPU: numba functions that read each pixel out of the ring and write each of the result once.

The plain PyTorch form makes a copy for every step (gathered, floats, scaled, rounded, turned to channels last); here all of it happens in
registers. Numbers are those of the reference to the bit: the same f32 product, rounded to bf16 to nearest, ties to even; a difference and a
product when pixels are normalised, which numba does not fuse. A table of the 256
results that a sample's intensity allows was measured to take as long as this arithmetic, which the compiler makes vectors of.

bf16 has no type in numba: the functions see its bits, as uint16. Channels last interleaves planes, which one by one are stores of 2 bytes
each; so of bf16 four neighbours are put together and written as one uint64 where the number of planes allows.
"""

import threading

import numpy as np
import torch
from numba import njit, types
from numba.extending import overload, register_jitable
from torch import Tensor

# To start and join a second thread takes some 0.2 ms, as long as a million pixels take; two were measured to pay from two million on.
PIXELS_A_THREAD = 1 << 20

# Most spreads that a normalised pixel may be from its mean (Burda et al. 2018, section 2.4).
NORMALISED_LIMIT = 5.0
_LIMIT = np.float32(NORMALISED_LIMIT)


@register_jitable
def _bf16(value):
    """Bits, in a uint32, of the bf16 that is nearest to an f32, ties to even. NaN is apart: the carry could make a zero of it."""
    bits = np.float32(value).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.uint32(0x7FC0) if value != value else np.uint32(rounded)


def _value(pixel, factor, mean, scale):
    """The f32 that a pixel becomes: pixel * factor, normalised unless `mean` and `scale` are no numbers but bools."""


@overload(_value)
def _value_as(pixel, factor, mean, scale):
    if isinstance(mean, types.Boolean):
        return lambda pixel, factor, mean, scale: np.float32(pixel) * factor

    def normalised(pixel, factor, mean, scale):
        value = (np.float32(pixel) * factor - mean) * scale
        value = _LIMIT if value > _LIMIT else value  # NaN is neither, and stays
        return -_LIMIT if value < -_LIMIT else value

    return normalised


def _encode(to, value):
    """An f32 as an element of `to`: f32, or the bits of bf16."""


@overload(_encode)
def _encode_as(to, value):
    if to.dtype.name == "float32":
        return lambda to, value: value
    return lambda to, value: np.uint16(_bf16(value))


@register_jitable
def _four(a, b, c, d):
    """The bits of four bf16 in the order of memory, which is little-endian."""
    low, high = _bf16(a) | (_bf16(b) << np.uint32(16)), _bf16(c) | (_bf16(d) << np.uint32(16))
    return np.uint64(low) | (np.uint64(high) << np.uint64(32))


@register_jitable
def _walk(first, newest, taken, channels):
    """Writes where the planes of a stack lie, oldest first: the walk back, modulo T, stays at the first frame of an episode."""
    slots = first.shape[1]
    lane, slot = newest // slots, newest % slots
    for p in range(taken.shape[0] - channels, -1, -channels):
        for c in range(channels):
            taken[p + c] = (lane * slots + slot) * channels + c
        if not first[lane, slot]:
            slot = slot - 1 if slot > 0 else slots - 1


@register_jitable
def _moved(shift, m, pad, height, width):
    """dy, and the columns of border on the left and on the right, of which one is 0; further out than a side is all border."""
    if shift.shape[0] == 0:
        return 0, 0, 0
    dy, dx = min(max(shift[m, 0] - pad, -height), height), min(max(shift[m, 1] - pad, -width), width)
    return dy, max(-dx, 0), max(dx, 0)


# Inlined by numba, which otherwise counts the references to these arrays, atomically, at every row.
@register_jitable(inline="always")
def _fill(to, row, left, right, factor, mean, scale):
    """A row of the result out of one of the frame, and of one of `mean` and `scale`: border, pixels, border. No pixel is tested for where
    it lies."""
    width, end = row.shape[0], row.shape[0] - 1
    to[:left] = _encode(to, _value(row[0], factor, mean[0], scale[0]))
    to[width - right :] = _encode(to, _value(row[end], factor, mean[end], scale[end]))
    middle, source = to[left : width - right], row[right : width - left]
    means, scales = mean[right : width - left], scale[right : width - left]
    for x in range(middle.shape[0]):
        middle[x] = _encode(to, _value(source[x], factor, means[x], scales[x]))


# Of all that follow, frames: [L * T * C, H, W] u8 or f32; mean, scale: [C, H, W] f32 or bool; positions start..stop - 1 are done.
@njit(cache=True, nogil=True)
def _contiguous(frames, first, index, channels, planes, shift, pad, factors, mean, scale, out, start, stop):
    """out: [M, planes, H, W] f32 or uint16."""
    height, width = frames.shape[1:]
    taken = np.empty(planes, np.int64)
    for m in range(start, stop):
        _walk(first, index[m], taken, channels)
        factor = factors[m]
        dy, left, right = _moved(shift, m, pad, height, width)
        for p in range(planes):
            plane, to, c = frames[taken[p]], out[m, p], p % channels
            for y in range(height):
                at = min(max(y + dy, 0), height - 1)
                _fill(to[y], plane[at], left, right, factor, mean[c, at], scale[c, at])


@njit(cache=True, nogil=True)
def _last(frames, first, index, channels, planes, shift, pad, factors, mean, scale, out, start, stop):
    """out: [M, H, W, planes] f32 or uint16, for any number of planes."""
    height, width = frames.shape[1:]
    taken = np.empty(planes, np.int64)
    for m in range(start, stop):
        _walk(first, index[m], taken, channels)
        factor = factors[m]
        dy, left, right = _moved(shift, m, pad, height, width)
        for y in range(height):
            at = min(max(y + dy, 0), height - 1)
            for p in range(planes):
                c = p % channels
                _fill(out[m, y, :, p], frames[taken[p], at], left, right, factor, mean[c, at], scale[c, at])


@register_jitable(inline="always")
def _fill_by_four(to, frames, taken, channels, p, y, left, right, factor, mean, scale):
    """A row of planes p..p + 3, as `_fill`."""
    width, end = frames.shape[2], frames.shape[2] - 1
    a, b, c, d = frames[taken[p], y], frames[taken[p + 1], y], frames[taken[p + 2], y], frames[taken[p + 3], y]
    ca, cb, cc, cd = p % channels, (p + 1) % channels, (p + 2) % channels, (p + 3) % channels
    ma, mb, mc, md = mean[ca, y], mean[cb, y], mean[cc, y], mean[cd, y]
    sa, sb, sc, sd = scale[ca, y], scale[cb, y], scale[cc, y], scale[cd, y]
    to[:left] = _four(
        _value(a[0], factor, ma[0], sa[0]), _value(b[0], factor, mb[0], sb[0]),
        _value(c[0], factor, mc[0], sc[0]), _value(d[0], factor, md[0], sd[0]),
    )  # fmt: skip
    to[width - right :] = _four(
        _value(a[end], factor, ma[end], sa[end]), _value(b[end], factor, mb[end], sb[end]),
        _value(c[end], factor, mc[end], sc[end]), _value(d[end], factor, md[end], sd[end]),
    )  # fmt: skip
    middle, end = to[left : width - right], width - left
    a, b, c, d = a[right:end], b[right:end], c[right:end], d[right:end]
    ma, mb, mc, md = ma[right:end], mb[right:end], mc[right:end], md[right:end]
    sa, sb, sc, sd = sa[right:end], sb[right:end], sc[right:end], sd[right:end]
    for x in range(middle.shape[0]):
        middle[x] = _four(
            _value(a[x], factor, ma[x], sa[x]), _value(b[x], factor, mb[x], sb[x]),
            _value(c[x], factor, mc[x], sc[x]), _value(d[x], factor, md[x], sd[x]),
        )  # fmt: skip


@njit(cache=True, nogil=True)
def _last_by_four(frames, first, index, channels, planes, shift, pad, factors, mean, scale, out, start, stop):
    """out: [M, H, W * planes / 4] uint64. One group of four is written in place; of more a row is made, as a vector, and then turned."""
    height, width = frames.shape[1:]
    groups = out.shape[2] // width
    taken, rows = np.empty(planes, np.int64), np.empty((groups, width), np.uint64)
    for m in range(start, stop):
        _walk(first, index[m], taken, channels)
        factor = factors[m]
        dy, left, right = _moved(shift, m, pad, height, width)
        for y in range(height):
            at = min(max(y + dy, 0), height - 1)
            to = out[m, y]
            if groups == 1:
                _fill_by_four(to, frames, taken, channels, 0, at, left, right, factor, mean, scale)
                continue
            for g in range(groups):
                _fill_by_four(rows[g], frames, taken, channels, 4 * g, at, left, right, factor, mean, scale)
            for x in range(width):
                for g in range(groups):
                    to[x * groups + g] = rows[g, x]


def observations_numba(
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
    """`observations` as one pass on as many threads as PyTorch has; the result does not depend on how many. dtype: f32 or bf16.

    Raises IndexError for an index out of range. Beyond the result it allocates [M] factors and a row of the planes.
    """
    lanes, slots, channels, height, width = frames.shape
    count, planes = index.shape[0], stack * channels
    least, greatest = index.aminmax()
    if least < 0 or greatest >= lanes * slots:
        raise IndexError(f"index: must be in 0..{lanes * slots - 1}, got {least.item()}..{greatest.item()}")
    unit = 1 / 255 if frames.dtype == torch.uint8 else 1.0
    factors = torch.full((count,), unit) if intensity is None else intensity * unit
    if mean is None:  # the functions see by the dtype that there are none
        means = scales = np.broadcast_to(np.False_, (channels, height, width))
    else:
        means, scales = mean.numpy(), scale.numpy()

    bits = torch.int16 if dtype == torch.bfloat16 else torch.float32
    if planes == 1 or memory_format == torch.contiguous_format:
        memory, last = torch.empty((count, planes, height, width), dtype=bits), False
    else:
        memory, last = torch.empty((count, height, width, planes), dtype=bits), True
    out, fill = memory.numpy(), _last if last else _contiguous
    if bits == torch.int16:
        out = out.view(np.uint16)
        if last and planes % 4 == 0:
            out, fill = out.view(np.uint64).reshape(count, height, -1), _last_by_four

    moves = np.empty((0, 2), np.int64) if shift is None else shift.numpy()
    arguments = (
        frames.numpy().reshape(-1, height, width), first.numpy(), index.numpy(), channels, planes, moves, pad, factors.numpy(),
        means, scales, out,
    )  # fmt: skip
    parts = max(1, min(torch.get_num_threads(), count, memory.numel() // PIXELS_A_THREAD))
    bounds = [count * part // parts for part in range(parts + 1)]
    others = [threading.Thread(target=fill, args=(*arguments, *bounds[part : part + 2])) for part in range(1, parts)]
    for thread in others:
        thread.start()
    fill(*arguments, *bounds[:2])
    for thread in others:
        thread.join()

    result = memory.view(dtype)
    if last:
        return result.permute(0, 3, 1, 2)
    return result.to(memory_format=memory_format)
