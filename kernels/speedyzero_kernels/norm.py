"""BatchNorm in training with what follows it, a residual and ReLU (step 5: the forward and backward passes of the network that learns).

"Batch Normalization" (Ioffe and Szegedy 2015, algorithm 1), with the residual and the ReLU of He et al. 2016: each channel is normalised
by the mean and the variance of the batch, scaled and shifted, and the running statistics take in a share of both.

Channels-last, a batch of boards is one matrix of M rows and C columns, and a channel is a column. The rows are cut into at most 128
chunks. A first launch writes the sums of each chunk; every program of a second adds them up again in the same order, so that all know
the same statistics without a third launch or an atomic, and works on its own chunk. Where the rows are few, one program takes all of
them, 16 channels wide, and the first launch is left out. Both ways are the same on every card: sums have one order, given by the shapes.

The batch may be shared out to several processes, as of `SyncBatchNorm`. Between the launches that make the sums and the one that applies
them, a function of the caller then adds up one buffer [2, C] over the shares, each way. It holds f64: the variance is the difference of two
sums there, which in f32 would lose what a mean far from zero leaves of it. Many chunks are joined in a launch of their own before, and
few rows are summed in one, too: a launch more each way than without shares, besides the message.

What is kept for the backward pass: x, the mean and 1 / the standard deviation of each channel, and, with both a residual and ReLU, the
result, which the layer after this one keeps too. Without a residual the sign of the result is computed again from x. What is never
stored: the normalised x, the sum before ReLU, a mask.

`B` boards of `H x W` and `C` channels: M = B * H * W. Of vectors `[B, C]` M = B.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import checks, dispatch
from .columns import MOST_CHUNKS, Cut, read_sums, span, within, write_sums
from .norm_reference import batch_norm_reference
from .norm_rows import affine, gradient_sums, moments, past_relu
from .support import square_root

MOST_CHANNELS = 2**19  # a grid has 65535 blocks of 16 beside each other
_STAGES = 3  # blocks of rows whose loads are under way at once
_JOINED_AT_ONCE = 16  # channels of a program that joins the chunks: 8 numbers of each sum a thread


@triton.jit(do_not_specialize=["rows", "chunk", "chunks"])
def _moments_kernel(
    x, table, rows, chunk, chunks, SHARED: tl.constexpr,
    CHANNELS: tl.constexpr, STRIDE: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of every channel of a chunk, into the table [2, chunks, C]; if SHARED the sums of x and x^2."""
    first, count, c = span(rows, chunk, BLOCK_C)
    wide: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    widest: tl.constexpr = tl.float64 if SHARED else wide
    mean, square = moments(x + first * STRIDE, count, c, wide, widest, CHANNELS, STRIDE, EVEN, BLOCK_M, BLOCK_C, STAGES)
    if SHARED:
        square += count * (mean * mean)
        mean *= count
    write_sums(table, mean, square, c, chunks, CHANNELS)


@triton.jit
def _write_affine(affine_grad, total, product, rstd, c, CHANNELS: tl.constexpr):
    """The gradients of weight and bias to affine_grad [2, C]."""
    tl.store(affine_grad + c, product * rstd, mask=c < CHANNELS)
    tl.store(affine_grad + CHANNELS + c, total, mask=c < CHANNELS)


@triton.jit(do_not_specialize=["chunks"])
def _join_kernel(
    table, sums, kept, affine_grad, chunks, GRADIENT: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr
):
    """The sums [2, C] of all chunks of a table [2, chunks, C], both f64; if GRADIENT, those of weight and bias too."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    _, firsts, seconds = read_sums(table, c, chunks, CHANNELS, BLOCK_P)
    first, second = tl.sum(firsts, 0), tl.sum(seconds, 0)
    write_sums(sums, first, second, c, 1, CHANNELS)
    if GRADIENT:
        wide: tl.constexpr = kept.dtype.element_ty
        rstd = tl.load(kept + CHANNELS + c, mask=c < CHANNELS, other=0.0)
        _write_affine(affine_grad, first.to(wide), second.to(wide), rstd, c, CHANNELS)


@triton.jit
def _read_shared(sums, c, CHANNELS: tl.constexpr):
    """The two sums [BLOCK_C] over all shares."""
    known = c < CHANNELS
    return tl.load(sums + c, mask=known, other=0.0), tl.load(sums + CHANNELS + c, mask=known, other=0.0)


@triton.jit(
    do_not_specialize=["rows", "chunk", "chunks"],
    do_not_specialize_on_alignment=["weight", "bias", "running_mean", "running_var"],
)
def _forward_kernel(
    x, residual, weight, bias, running_mean, running_var, table, out, kept, rows, chunk, chunks,
    MOMENTUM: tl.constexpr, EPS: tl.constexpr, RELU: tl.constexpr, RESIDUAL: tl.constexpr, ALONE: tl.constexpr, SHARES: tl.constexpr,
    CHANNELS: tl.constexpr, STRIDE: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / standard deviation of all rows to kept [2, C], the running statistics, and the result of one chunk.

    With SHARES the table holds the sums [2, C] of x and x^2 over all of them.
    """
    first, count, c = span(rows, chunk, BLOCK_C)
    known = c < CHANNELS
    wide: tl.constexpr = kept.dtype.element_ty
    x += first * STRIDE
    total = rows
    if SHARES > 1:
        total = rows.to(tl.int64) * SHARES
        first_sum, second_sum = _read_shared(table, c, CHANNELS)
        middle = first_sum / total.to(tl.float64)
        square = second_sum - first_sum * middle
        mean, square = middle.to(wide), tl.where(square < 0.0, 0.0, square).to(wide)  # NaN stays NaN
    elif ALONE:
        mean, square = moments(x, count, c, wide, wide, CHANNELS, STRIDE, EVEN, BLOCK_M, BLOCK_C, STAGES)
    else:
        p, means, squares = read_sums(table, c, chunks, CHANNELS, BLOCK_P)
        times = tl.maximum(tl.minimum(rows - p * chunk, chunk), 0).to(wide)[:, None]
        mean = tl.sum(times * means, 0) / rows.to(wide)
        off = means - mean[None, :]
        square = tl.sum(squares + times * (off * off), 0)
    rstd = 1.0 / square_root(square / total.to(wide) + EPS)
    if tl.program_id(0) == 0:
        tl.store(kept + c, mean, mask=known)
        tl.store(kept + CHANNELS + c, rstd, mask=known)
        before = tl.load(running_mean + c, mask=known)
        tl.store(running_mean + c, before * (1.0 - MOMENTUM) + mean * MOMENTUM, mask=known)
        before = tl.load(running_var + c, mask=known)
        tl.store(running_var + c, before * (1.0 - MOMENTUM) + square / (total - 1).to(wide) * MOMENTUM, mask=known)
    scale = (rstd * tl.load(weight + c, mask=known, other=0.0))[None, :]
    shift = tl.load(bias + c, mask=known, other=0.0)[None, :]
    mean = mean[None, :]
    out += first * CHANNELS
    residual += first * CHANNELS
    blocks = tl.cdiv(count, BLOCK_M)
    for i in tl.range(0, blocks, num_stages=STAGES):  # backwards: what was read last is likeliest to be in the cache
        row, inside = within((blocks - 1 - i) * BLOCK_M, count, c, CHANNELS, EVEN, BLOCK_M, BLOCK_C)
        at = row[:, None] * CHANNELS + c[None, :]
        y = (tl.load(x + row[:, None] * STRIDE + c[None, :], mask=inside, other=0.0).to(wide) - mean) * scale + shift
        if RESIDUAL:
            y += tl.load(residual + at, mask=inside, other=0.0).to(wide)
        if RELU:
            y = tl.where(y < 0.0, 0.0, y)  # NaN stays NaN
        tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "chunk", "chunks"], do_not_specialize_on_alignment=["weight", "bias"])
def _gradient_sums_kernel(
    x, result, upstream, residual_grad, weight, bias, kept, table, affine_grad, rows, chunk, chunks,
    MASK: tl.constexpr, AFFINE: tl.constexpr,
    CHANNELS: tl.constexpr, STRIDE: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The two sums of every channel of a chunk into the table [2, chunks, C]; with a residual its gradient.

    If AFFINE, which is for the only chunk of a share, the gradients of weight and bias too.
    """
    first, count, c = span(rows, chunk, BLOCK_C)
    wide: tl.constexpr = kept.dtype.element_ty
    mean, rstd, scale, shift = affine(kept, weight, bias, c, CHANNELS)
    past = first * CHANNELS
    total, product = gradient_sums(
        x + first * STRIDE, result + past, upstream + past, residual_grad + past, count, c, mean[None, :], scale[None, :], shift[None, :],
        wide, MASK, MASK == "result", CHANNELS, STRIDE, EVEN, BLOCK_M, BLOCK_C, STAGES,
    )  # fmt: skip
    write_sums(table, total, product, c, chunks, CHANNELS)
    if AFFINE:
        _write_affine(affine_grad, total, product, rstd, c, CHANNELS)


@triton.jit(do_not_specialize=["rows", "chunk", "chunks"], do_not_specialize_on_alignment=["weight", "bias"])
def _backward_kernel(
    x, result, upstream, residual_grad, weight, bias, kept, table, grad, affine_grad, rows, chunk, chunks,
    MASK: tl.constexpr, ALONE: tl.constexpr, SHARES: tl.constexpr,
    CHANNELS: tl.constexpr, STRIDE: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradients of weight and bias to affine_grad [2, C], and of x in one chunk; if MASK is of the result, the residual's too.

    With SHARES the table holds the sums [2, C] over all of them, and affine_grad is written already.
    """
    first, count, c = span(rows, chunk, BLOCK_C)
    wide: tl.constexpr = kept.dtype.element_ty
    mean, rstd, scale, shift = affine(kept, weight, bias, c, CHANNELS)
    all_rows = rows.to(wide)
    x += first * STRIDE
    result += first * CHANNELS
    upstream += first * CHANNELS
    residual_grad += first * CHANNELS
    if SHARES > 1:
        all_rows = (rows.to(tl.int64) * SHARES).to(wide)
        total, product = _read_shared(table, c, CHANNELS)
        total, product = total.to(wide), product.to(wide)
    elif ALONE:
        total, product = gradient_sums(
            x, result, upstream, residual_grad, count, c, mean[None, :], scale[None, :], shift[None, :],
            wide, MASK, False, CHANNELS, STRIDE, EVEN, BLOCK_M, BLOCK_C, STAGES,
        )  # fmt: skip
    else:
        _, totals, products = read_sums(table, c, chunks, CHANNELS, BLOCK_P)
        total, product = tl.sum(totals, 0), tl.sum(products, 0)
    if SHARES == 1:  # noqa: SIM102 - the one is known when it is compiled, the other when it runs
        if tl.program_id(0) == 0:
            _write_affine(affine_grad, total, product, rstd, c, CHANNELS)
    level = (total / all_rows)[None, :]
    slope = (product * rstd * rstd / all_rows)[None, :]
    mean, scale, shift = mean[None, :], scale[None, :], shift[None, :]
    grad += first * CHANNELS
    blocks = tl.cdiv(count, BLOCK_M)
    for i in tl.range(0, blocks, num_stages=STAGES):
        row, inside = within((blocks - 1 - i) * BLOCK_M, count, c, CHANNELS, EVEN, BLOCK_M, BLOCK_C)
        off, g = past_relu(x, result, upstream, row, c, inside, mean, scale, shift, wide, MASK, CHANNELS, STRIDE)
        at = row[:, None] * CHANNELS + c[None, :]
        if MASK == "result":
            tl.store(residual_grad + at, g.to(residual_grad.dtype.element_ty), mask=inside)
        tl.store(grad + at, (scale * (g - level - off * slope)).to(grad.dtype.element_ty), mask=inside)


def batch_norm_kernel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    residual: Tensor | None = None,
    relu: bool = True,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
    exchange: Callable[[Tensor], object] | None = None,
    shares: int = 1,
) -> Tensor:
    """`batch_norm` in one or two launches forward and as many backward, of shares in two or three, without the checks."""
    return _BatchNorm.apply(x, weight, bias, residual, running_mean, running_var, relu, float(momentum), float(eps), exchange, shares)


def _dense(x: Tensor, like: Tensor) -> Tensor:
    """`x` with the rows of `like` in memory; itself if it lies so."""
    return x.contiguous(memory_format=torch.channels_last if like.ndim == 4 else torch.contiguous_format)


def _empty_like(x: Tensor) -> Tensor:
    """Dense rows in the shape of `x`."""
    return torch.empty(
        x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last if x.ndim == 4 else torch.contiguous_format
    )


def _constants(x: Tensor, cut: Cut) -> dict[str, int | bool]:
    """What the kernels that go over the rows know when they are compiled."""
    channels = x.shape[1]
    return {
        "CHANNELS": channels, "STRIDE": channels if x.ndim == 4 else x.stride(0), "EVEN": (x.numel() // channels) % cut.block_m == 0,
        "BLOCK_M": cut.block_m, "BLOCK_C": cut.block_c, "STAGES": _STAGES, "num_warps": cut.warps,
    }  # fmt: skip


def _table(weight: Tensor, chunks: int, sums: Tensor | None) -> Tensor:
    """Where the sums of the chunks go [2, chunks, C], wide enough for the `sums` [2, C] over all shares, if there are shares."""
    if sums is not None and chunks == 1:
        return sums
    return weight.new_empty(2, chunks, weight.numel(), dtype=weight.dtype if sums is None else sums.dtype)


def _join(table: Tensor, sums: Tensor, kept: Tensor, affine_grad: Tensor | None = None) -> None:
    """Add up the chunks of a table into the sums of this share; backward the gradients of weight and bias too."""
    _, chunks, channels = table.shape
    _join_kernel[1, triton.cdiv(channels, _JOINED_AT_ONCE)](
        table, sums, kept, kept if affine_grad is None else affine_grad, chunks, GRADIENT=affine_grad is not None,
        CHANNELS=channels, BLOCK_C=_JOINED_AT_ONCE, BLOCK_P=MOST_CHUNKS, num_warps=8,
    )  # fmt: skip


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, running_mean: Tensor, running_var: Tensor, relu: bool,
        momentum: float, eps: float, exchange: Callable[[Tensor], object] | None, shares: int,
    ) -> Tensor:  # fmt: skip
        channels = x.shape[1]
        rows = x.numel() // channels
        cut = Cut.of(rows, channels, x.itemsize)
        shared, constants = shares > 1, _constants(x, cut)
        alone = cut.chunks == 1 and not shared
        grid = cut.chunks, triton.cdiv(channels, cut.block_c)
        kept = weight.new_empty(2, channels)
        sums = weight.new_empty(2, channels, dtype=torch.float64) if shared else None
        table = kept if alone else _table(weight, cut.chunks, sums)
        out = _empty_like(x)
        if not alone:
            _moments_kernel[grid](x, table, rows, cut.chunk, cut.chunks, SHARED=shared, **constants)
        if shared:
            if table is not sums:
                _join(table, sums, kept)
            exchange(sums)
            table = sums
        _forward_kernel[grid](
            x, x if residual is None else residual, weight, bias, running_mean, running_var, table, out, kept, rows, cut.chunk, cut.chunks,
            MOMENTUM=momentum, EPS=eps, RELU=relu, RESIDUAL=residual is not None, ALONE=alone, SHARES=shares,
            BLOCK_P=MOST_CHUNKS, **constants,
        )  # fmt: skip
        ctx.relu, ctx.adds, ctx.exchange, ctx.shares = relu, residual is not None, exchange, shares
        ctx.save_for_backward(x, weight, bias, kept, out if ctx.relu and ctx.adds else None)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, kept, result = ctx.saved_tensors
        channels = x.shape[1]
        rows = x.numel() // channels
        cut = Cut.of(rows, channels, x.itemsize)
        shared, constants = ctx.shares > 1, _constants(x, cut)
        alone = cut.chunks == 1 and not shared
        grid = cut.chunks, triton.cdiv(channels, cut.block_c)
        mask = "none" if not ctx.relu else "input" if result is None else "result"
        upstream = _dense(upstream, x)
        grad, affine_grad = _empty_like(x), torch.empty_like(kept)
        # Placeholders, of the type that would be there, are never read or written.
        residual_grad = upstream if result is None else _empty_like(x)
        result = upstream if result is None else result
        sums = weight.new_empty(2, channels, dtype=torch.float64) if shared else None
        table = kept if alone else _table(weight, cut.chunks, sums)
        if not alone:
            _gradient_sums_kernel[grid](
                x, result, upstream, residual_grad, weight, bias, kept, table, affine_grad, rows, cut.chunk, cut.chunks,
                MASK=mask, AFFINE=table is sums, **constants,
            )  # fmt: skip
            if mask == "result":  # the residual's gradient is what comes past ReLU
                upstream, mask = residual_grad, "none"
        if shared:
            if table is not sums:
                _join(table, sums, kept, affine_grad)
            ctx.exchange(sums)
            table = sums
        _backward_kernel[grid](
            x, result, upstream, residual_grad, weight, bias, kept, table, grad, affine_grad, rows, cut.chunk, cut.chunks,
            MASK=mask, ALONE=alone, SHARES=ctx.shares, BLOCK_P=MOST_CHUNKS, **constants,
        )  # fmt: skip
        return grad, affine_grad[0], affine_grad[1], residual_grad if ctx.adds else None, *(None,) * 7


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    residual: Tensor | None = None,
    relu: bool = True,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
    exchange: Callable[[Tensor], object] | None = None,
    shares: int = 1,
) -> Tensor:
    """relu(weight (x - mean) / sqrt(var + eps) + bias + residual) with the mean and variance of the batch, per channel.

    As `nn.BatchNorm2d` or `nn.BatchNorm1d` in training, then add, then ReLU. Differentiable once, in x, weight, bias and residual.
    Statistics and sums are f32 (f64 for f64) and of a fixed order: the same input gives the same bits.

    Layout: on CUDA boards are in channels-last memory; the rows of vectors may have any stride. Elsewhere any strides will do.
    An upstream gradient in another layout is copied.

    Shares: x may be one of several equal shares of a batch, one a process. All of them make the same calls, and `exchange` adds up the
    sums of a call over them, once forward and once backward; then mean, variance and running statistics are those of all shares' rows.
    Gradients of x and residual are of the sum of all shares' losses. Those of weight and bias are this share's part, to be added up with
    the others' as those of any weight are.

    Args:
      x: `[B, C, H, W]` or `[B, C]` bf16, f16, f32 or f64, of two rows or more in all shares, at most 2^19 channels.
      weight, bias: `[C]` f32 (f64 for f64).
      running_mean, running_var: `[C]` of weight's dtype, written in place: running = (1 - momentum) running + momentum batch, the
        batch's variance with M - 1 in the denominator. They do not change the result.
      residual: of x's shape and dtype, added before the ReLU.
      relu: whether negative results become 0.
      exchange: replaces a tensor, `[2, C]` f64 on x's device, by its sum over all shares, the same bits in each. Not called of one share.
      shares: how many they are.

    Returns:
      x's shape, dtype and layout.

    Launches: two each way, and one where there are at most 2048 rows; of shares three and two, and those of `exchange`. Bytes moved: in
    passes over x, forward 3, and 4 with a residual; backward 5, and 7 with a residual and ReLU. Sums of the chunks are small beside it.

    Raises:
      ValueError: a wrong shape, dtype, device or layout, one row only, more channels than that, or shares that nothing adds up.
    """
    checks.at_least("shares", shares, 1)
    if shares > 1 and exchange is None:
        raise ValueError(f"exchange: must be given with {shares} shares")
    _check(x, weight, bias, running_mean, running_var, residual, shares)
    form = batch_norm_kernel if dispatch.runs_kernel(x) else batch_norm_reference
    return form(
        x, weight, bias, running_mean, running_var, residual, relu, momentum=momentum, eps=eps, exchange=exchange, shares=shares
    )  # fmt: skip


def _check(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, residual: Tensor | None, shares: int
) -> None:
    shape = ("B", "C", "H", "W") if x.ndim == 4 else ("B", "C")
    checks.tensor("x", x, shape, checks.FLOATING, any_strides=True)
    channels, wide = x.shape[1], torch.float64 if x.dtype == torch.float64 else torch.float32
    checks.at_least("x: channels", channels, 1)
    checks.at_most("x: channels", channels, MOST_CHANNELS)
    checks.at_least("x: values of a channel", shares * (x.numel() // channels), 2)
    for name, y in (("weight", weight), ("bias", bias), ("running_mean", running_mean), ("running_var", running_var)):
        checks.tensor(name, y, (channels,), wide, x.device)
    if residual is not None:
        checks.tensor("residual", residual, tuple(x.shape), x.dtype, x.device, any_strides=True)
    if not dispatch.runs_kernel(x):
        return
    if x.ndim == 2 and x.stride(1) != 1:
        raise ValueError(f"x: the numbers of a row must lie side by side, got strides {list(x.stride())}")
    for name, y in (("x", x if x.ndim == 4 else None), ("residual", residual)):
        if y is not None and not y.is_contiguous(memory_format=torch.channels_last if y.ndim == 4 else torch.contiguous_format):
            layout = "in channels_last memory" if y.ndim == 4 else "contiguous"
            raise ValueError(f"{name}: must be {layout}, got strides {list(y.stride())} for shape {list(y.shape)}")
