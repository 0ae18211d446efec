"""What a program of BatchNorm's kernels works out of its rows: moments, the gradient before ReLU and its sums. In the shapes of `norm`."""

import triton
import triton.language as tl

from .columns import within


@triton.jit
def moments(
    x, count, c, WIDE: tl.constexpr, WIDEST: tl.constexpr,
    CHANNELS: tl.constexpr, STRIDE: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations [BLOCK_C] of `count` rows from x on.

    Each row of the block keeps its own (Welford 1962), and they are put together at the end: no difference of two great sums. The result
    is WIDEST.
    """
    mean = tl.zeros([BLOCK_M, BLOCK_C], WIDE)
    square = tl.zeros([BLOCK_M, BLOCK_C], WIDE)
    turn = tl.full([], 0.0, WIDE)
    for at in tl.range(0, count, BLOCK_M, num_stages=STAGES):
        row, inside = within(at, count, c, CHANNELS, EVEN, BLOCK_M, BLOCK_C)
        value = tl.load(x + row[:, None] * STRIDE + c[None, :], mask=inside, other=0.0).to(WIDE)
        off = tl.where(inside, value - mean, 0.0)
        turn += 1.0
        mean += off * (1.0 / turn)
        square += off * (value - mean)
    times = turn
    if not EVEN:
        times = ((count - tl.arange(0, BLOCK_M) + (BLOCK_M - 1)) // BLOCK_M).to(WIDE)[:, None]
    mean, square, times = mean.to(WIDEST), square.to(WIDEST), times.to(WIDEST)
    whole = tl.sum(times * mean, 0) / count.to(WIDEST)
    off = mean - whole[None, :]
    return whole, tl.sum(square + times * (off * off), 0)


@triton.jit
def past_relu(
    x, result, upstream, row, c, inside, mean, scale, shift,
    WIDE: tl.constexpr, MASK: tl.constexpr, CHANNELS: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Of a block: the deviation from the mean, and the gradient with respect to what went into ReLU.

    MASK says where that let a number through: "none", everywhere, as there is no ReLU; "input", by x normalised again; "result".
    """
    at = row[:, None] * CHANNELS + c[None, :]
    off = tl.load(x + row[:, None] * STRIDE + c[None, :], mask=inside, other=0.0).to(WIDE) - mean
    g = tl.load(upstream + at, mask=inside, other=0.0).to(WIDE)
    if MASK == "input":
        g = tl.where(off * scale + shift <= 0.0, 0.0, g)
    elif MASK == "result":
        g = tl.where(tl.load(result + at, mask=inside, other=0.0).to(WIDE) <= 0.0, 0.0, g)
    return off, g


@triton.jit
def gradient_sums(
    x, result, upstream, residual_grad, count, c, mean, scale, shift,
    WIDE: tl.constexpr, MASK: tl.constexpr, STORE: tl.constexpr,
    CHANNELS: tl.constexpr, STRIDE: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums [BLOCK_C] over `count` rows of the gradient past ReLU, and of it times the deviation; if STORE the gradient is kept too."""
    total = tl.zeros([BLOCK_M, BLOCK_C], WIDE)
    product = tl.zeros([BLOCK_M, BLOCK_C], WIDE)
    for at in tl.range(0, count, BLOCK_M, num_stages=STAGES):
        row, inside = within(at, count, c, CHANNELS, EVEN, BLOCK_M, BLOCK_C)
        off, g = past_relu(x, result, upstream, row, c, inside, mean, scale, shift, WIDE, MASK, CHANNELS, STRIDE)
        if STORE:
            tl.store(residual_grad + row[:, None] * CHANNELS + c[None, :], g.to(residual_grad.dtype.element_ty), mask=inside)
        total += g
        product += g * off
    return tl.sum(total, 0), tl.sum(product, 0)


@triton.jit
def affine(kept, weight, bias, c, CHANNELS: tl.constexpr):
    """Mean, 1 / standard deviation, scale and shift of these channels, [BLOCK_C] each."""
    known = c < CHANNELS
    mean = tl.load(kept + c, mask=known, other=0.0)
    rstd = tl.load(kept + CHANNELS + c, mask=known, other=0.0)
    return mean, rstd, rstd * tl.load(weight + c, mask=known, other=0.0), tl.load(bias + c, mask=known, other=0.0)
