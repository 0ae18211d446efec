"""Scalars as categories: the value and value-prefix heads' support, its expectation and its cross entropy.

A scalar x is squashed by h(x) = sign(x)(sqrt(|x| + 1) - 1) + 0.001 x and spread over the two nearest of 2 * size + 1
bins that stand for -size..size ("Observe and Look Further", Pohlen et al. 2018, section 3.1; MuZero, Schrittwieser et
al. 2020, appendix F). Search reads `to_scalar` (step 2), learning uses `cross_entropy` (step 5). All sums are in f32.

`...` denotes any leading dimensions; logits may be f16, bf16, f32 or f64 (f64 in gives f64 out, for gradient checks).
`transform`, `inverse_transform` and `two_hot` have no kernel: the first two are elementwise, for the compiler to fuse, and the last
is for tests, as `cross_entropy` never builds the target.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import checks, dispatch

EPSILON = 0.001
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MOST_BINS = 4095


def transform(x: Tensor) -> Tensor:
    """h(x), elementwise. x: [...] floating; returns [...] of the same dtype.

    Written as x (1 / (sqrt(|x| + 1) + 1) + 0.001), which is the same number and loses no digits near 0; h(inf) = inf.
    Raises ValueError if x is not floating. Bytes moved: x read and written once when fused.
    """
    _floating("x", x)
    return x * (1 / ((x.abs() + 1).sqrt() + 1) + EPSILON)


def inverse_transform(y: Tensor) -> Tensor:
    """The x with h(x) = y, elementwise, in closed form. y: [...] floating; returns [...] of the same dtype.

    With a = |y|, e = 0.001 and s = sqrt((1 + 2e)^2 + 4ea), the root of the quadratic is sqrt(|x| + 1) - 1 = ac where
    c = (2 - 4e / (s + 1 + 2e)) / (s + 1), hence x = y c (ac + 2): no difference of near numbers, so the relative error
    stays a few ulp for small and large y. Raises ValueError if y is not floating.
    """
    _floating("y", y)
    a = y.abs()
    s = (a * (4 * EPSILON) + (1 + 2 * EPSILON) ** 2).sqrt()
    c = (2 - 4 * EPSILON / (s + (1 + 2 * EPSILON))) / (s + 1)
    return y * c * (a * c + 2)


def two_hot(x: Tensor, size: int) -> Tensor:
    """The target distribution of scalar x: h(x), clamped to -size..size, shared by its two nearest bins.

    x: [...] floating; returns [..., 2 * size + 1] f32 (f64 for f64). MuZero appendix F. A NaN gives NaN, never an
    index out of range. Raises ValueError if x is not floating or size < 1. `cross_entropy` does not need this.
    """
    _floating("x", x)
    if size < 1:
        raise ValueError(f"size: must be at least 1, got {size}")
    pair, weight = _pair(_wide(x), size)
    return weight.new_zeros((*x.shape, 2 * size + 1)).scatter_(-1, pair, weight)


def to_scalar_reference(logits: Tensor) -> Tensor:
    """`to_scalar` in plain PyTorch, without the checks. Differentiable."""
    size = logits.shape[-1] // 2
    p = torch.softmax(_wide(logits), -1)
    bins = torch.arange(-size, size + 1, dtype=p.dtype, device=p.device)
    return inverse_transform((p * bins).sum(-1))  # not a matmul: autocast and TF32 would round it


def cross_entropy_reference(logits: Tensor, target: Tensor) -> Tensor:
    """`cross_entropy` in plain PyTorch, without the checks."""
    return _CrossEntropy.apply(logits, target, False)


def _loss_reference(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    x = _wide(logits)
    pair, weight = _pair(target.to(x.dtype), logits.shape[-1] // 2)
    norm = torch.logsumexp(x, -1)
    return norm - (x.gather(-1, pair) * weight).sum(-1), norm


def _grad_reference(logits: Tensor, target: Tensor, norm: Tensor, upstream: Tensor) -> Tensor:
    pair, weight = _pair(target.to(norm.dtype), logits.shape[-1] // 2)
    grad = (logits - norm.unsqueeze(-1)).exp_()
    grad.scatter_add_(-1, pair, weight.neg()).mul_(upstream.unsqueeze(-1))
    return grad.to(logits.dtype)


def _pair(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Indices [..., 2] int64 of the two bins of x, and their shares [..., 2]."""
    y = transform(x).clamp_(-size, size)
    low = y.floor().clamp_(max=size - 1)
    share = y - low
    index = (low + size).long().clamp_(0, 2 * size - 1)  # the integer clamp is for NaN
    return torch.stack((index, index + 1), -1), torch.stack((1 - share, share), -1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


@triton.jit
def square_root(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:  # not an early return: Triton would compile what follows for f64 too
        return tl.sqrt_rn(x)


@triton.jit
def _load_rows(logits, rows, other, WIDE: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's rows [ROWS] and whether they exist, the mask of their bins [ROWS, BLOCK], and the logits there in WIDE.

    BINS is known to the compiler: it drops the loads and the arithmetic of a block's lanes past it.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    lane = tl.arange(0, BLOCK)
    mask = inside[:, None] & (lane < BINS)[None, :]
    return row, inside, mask, tl.load((logits + row * BINS)[:, None] + lane[None, :], mask=mask, other=other).to(WIDE)


@triton.jit
def _split(target, row, inside, BINS: tl.constexpr, WIDE: tl.constexpr, EPSILON: tl.constexpr):
    """Of the rows' targets: index [ROWS] of the lower of the two bins, and the share [ROWS] of the upper one."""
    x = tl.load(target + row, mask=inside, other=0.0).to(WIDE)
    size: tl.constexpr = BINS // 2
    y = x * (1 / (square_root(tl.abs(x) + 1) + 1) + EPSILON)
    y = tl.where(y > size, size, y)  # `where`, not a minimum: it keeps NaN
    y = tl.where(y < -size, -size, y)
    low = tl.floor(y)
    low = tl.where(low > size - 1, size - 1, low)
    index = tl.where(low == low, low + size, 0).to(tl.int32)
    return index, y - low


@triton.jit
def from_bins(y, EPSILON: tl.constexpr):
    """The inverse of h: the scalars that mean bins, counted from the middle one, stand for."""
    a = tl.abs(y)
    s = square_root(a * (4 * EPSILON) + (1 + 2 * EPSILON) * (1 + 2 * EPSILON))
    c = (2 - 4 * EPSILON / (s + (1 + 2 * EPSILON))) / (s + 1)
    return y * c * (a * c + 2)


@triton.jit(do_not_specialize=["rows"])
def _to_scalar_kernel(logits, scalar, rows, EPSILON: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, inside, _, x = _load_rows(logits, rows, -float("inf"), scalar.dtype.element_ty, BINS, ROWS, BLOCK)
    e = tl.exp(x - tl.max(x, 1)[:, None])
    number = (tl.arange(0, BLOCK) - BINS // 2).to(x.dtype)
    tl.store(scalar + row, from_bins(tl.sum(e * number[None, :], 1) / tl.sum(e, 1), EPSILON), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _loss_kernel(
    logits, target, loss, norm, rows,
    EPSILON: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """loss and norm (the logarithm of the sum of exponentials) of each row."""
    wide = loss.dtype.element_ty
    row, inside, _, x = _load_rows(logits, rows, -float("inf"), wide, BINS, ROWS, BLOCK)
    index, share = _split(target, row, inside, BINS, wide, EPSILON)
    pair = logits + row * BINS + index
    below = tl.load(pair, mask=inside, other=0.0).to(wide)
    above = tl.load(pair + 1, mask=inside, other=0.0).to(wide)
    peak = tl.max(x, 1)
    peak = tl.where(tl.abs(peak) == float("inf"), 0, peak)  # all -inf: the norm is -inf and not NaN, as torch.logsumexp has it
    total = peak + tl.log(tl.sum(tl.exp(x - peak[:, None]), 1))
    tl.store(norm + row, total, mask=inside)
    tl.store(loss + row, total - (below * (1 - share) + above * share), mask=inside)


@triton.jit(do_not_specialize=["rows", "stride"])
def _grad_kernel(
    logits, target, norm, upstream, grad, rows, stride,
    EPSILON: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """upstream (softmax - two_hot); stride: from one row's upstream to the next's."""
    wide = norm.dtype.element_ty
    row, inside, mask, x = _load_rows(logits, rows, 0.0, wide, BINS, ROWS, BLOCK)
    index, share = _split(target, row, inside, BINS, wide, EPSILON)
    factor = tl.load(upstream + row * stride, mask=inside, other=0.0)
    g = tl.exp(x - tl.load(norm + row, mask=inside, other=0.0)[:, None])
    lane = tl.arange(0, BLOCK)[None, :]
    above = lane - index[:, None]  # 0 in the lower of the two bins, 1 in the upper
    g -= tl.where(above == 0, (1 - share)[:, None], tl.where(above == 1, share[:, None], 0.0))
    tl.store((grad + row * BINS)[:, None] + lane, (g * factor[:, None]).to(grad.dtype.element_ty), mask=mask)


def _rows_at_once(rows: int, bins: int) -> int:
    """Rows of a program: one, and of many short rows two or four, so that starting programs does not bound the time."""
    return 1 if rows < 8192 or bins > 640 else 2 if rows < 16384 else 4


def _launch(kernel: triton.JITFunction, logits: Tensor, *arguments: Tensor | int) -> None:
    """Run `kernel` over all rows; `arguments` follow the logits."""
    bins = logits.shape[-1]
    rows = logits.numel() // bins
    if rows == 0:
        return
    at_once, block = _rows_at_once(rows, bins), triton.next_power_of_2(bins)
    # At most 32 numbers of 4 bytes a thread; short rows each within one warp, except where there are no sums over them.
    warps = max(1, block * _wide_dtype(logits).itemsize // 4096) * (at_once if kernel is _grad_kernel else 1)
    kernel[(triton.cdiv(rows, at_once),)](logits, *arguments, EPSILON=EPSILON, BINS=bins, ROWS=at_once, BLOCK=block, num_warps=warps)


def to_scalar_kernel(logits: Tensor) -> Tensor:
    """`to_scalar` in one launch, without the checks. Not differentiable."""
    scalar = logits.new_empty(logits.shape[:-1], dtype=_wide_dtype(logits))
    _launch(_to_scalar_kernel, logits, scalar, scalar.numel())
    return scalar


def cross_entropy_kernel(logits: Tensor, target: Tensor) -> Tensor:
    """`cross_entropy` in one launch forward and one backward, without the checks."""
    return _CrossEntropy.apply(logits, target, True)


def _loss_by_kernel(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    loss, norm = (logits.new_empty(target.shape, dtype=_wide_dtype(logits)) for _ in range(2))
    _launch(_loss_kernel, logits, target, loss, norm, target.numel())
    return loss, norm


def _grad_by_kernel(logits: Tensor, target: Tensor, norm: Tensor, upstream: Tensor) -> Tensor:
    grad = torch.empty_like(logits)
    flat = upstream.reshape(-1)  # of an expanded scalar, as from a sum, it is a view with stride 0
    _launch(_grad_kernel, logits, target, norm, flat, grad, target.numel(), flat.stride(0))
    return grad


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor, kernel: bool) -> Tensor:
        loss, norm = (_loss_by_kernel if kernel else _loss_reference)(logits, target)
        ctx.save_for_backward(logits, target, norm)
        ctx.kernel = kernel
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None]:
        return (_grad_by_kernel if ctx.kernel else _grad_reference)(*ctx.saved_tensors, upstream), None, None


def to_scalar(logits: Tensor) -> Tensor:
    """Expected bin under softmax(logits), mapped back to a scalar. logits: [..., bins] contiguous, bins odd, 3 to 4095; returns [...]
    f32.

    MuZero appendix F. Where a gradient is needed (logits require one and gradients are enabled) it is the reference on every device,
    which is differentiable; the kernel is for inference. Raises ValueError if logits is not floating or not contiguous, or bins is not
    such a number. Bytes moved by the kernel: logits read once, [...] written.
    """
    _check_logits(logits)
    differentiable = torch.is_grad_enabled() and logits.requires_grad
    return to_scalar_kernel(logits) if dispatch.runs_kernel(logits) and not differentiable else to_scalar_reference(logits)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of softmax(logits) against two_hot(target), without building the target.

    logits: [..., bins] floating, bins odd, 3 to 4095; target: [...] floating, untransformed scalars (rewards or values); both
    contiguous. Returns [...] f32. Differentiable once, in logits only: gradient = upstream * (softmax - two_hot), in the logits' dtype;
    the upstream gradient may have any strides. A NaN target gives a NaN loss. MuZero appendix F (loss), EfficientZero (Ye et al. 2021)
    equation 5.
    Bytes moved by the kernels: forward reads logits once; backward reads them once and writes the gradient once.

    Raises ValueError if logits or target is not floating or not contiguous, bins is not such a number, target's shape is not the
    logits' without the last dimension, or the two are on different devices.
    """
    _check_logits(logits)
    checks.tensor("target", target, tuple(logits.shape[:-1]), _FLOATS, logits.device)
    return cross_entropy_kernel(logits, target) if dispatch.runs_kernel(logits) else cross_entropy_reference(logits, target)


def _floating(name: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"{name}: must be floating, got {x.dtype}")


def _check_logits(logits: Tensor) -> None:
    checks.tensor("logits", logits, tuple(logits.shape), _FLOATS)
    bins = logits.shape[-1] if logits.ndim else 0
    if not 3 <= bins <= _MOST_BINS or bins % 2 == 0:
        raise ValueError(f"logits: the last dimension must be 2 * size + 1, 3 to {_MOST_BINS}, got shape {list(logits.shape)}")
