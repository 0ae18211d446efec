"""Scalars as categories: the value and value-prefix heads' support, its expectation and its cross entropy.

A scalar x is squashed by h(x) = sign(x)(sqrt(|x| + 1) - 1) + 0.001 x and spread over the two nearest of 2 * size + 1
bins that stand for -size..size ("Observe and Look Further", Pohlen et al. 2018, section 3.1; MuZero, Schrittwieser et
al. 2020, appendix F). Search reads `to_scalar` (step 2), learning uses `cross_entropy` (step 5). All sums are in f32.

`...` denotes any leading dimensions; logits may be f16, bf16, f32 or f64 (f64 in gives f64 out, for gradient checks).
"""

import torch
from torch import Tensor

_EPSILON = 0.001


def transform(x: Tensor) -> Tensor:
    """h(x), elementwise. x: [...] floating; returns [...] of the same dtype.

    Written as x (1 / (sqrt(|x| + 1) + 1) + 0.001), which is the same number and loses no digits near 0; h(inf) = inf.
    Raises ValueError if x is not floating. Bytes moved: x read and written once when fused.
    """
    _floating("x", x)
    return x * (1 / ((x.abs() + 1).sqrt() + 1) + _EPSILON)


def inverse_transform(y: Tensor) -> Tensor:
    """The x with h(x) = y, elementwise, in closed form. y: [...] floating; returns [...] of the same dtype.

    With a = |y|, e = 0.001 and s = sqrt((1 + 2e)^2 + 4ea), the root of the quadratic is sqrt(|x| + 1) - 1 = ac where
    c = (2 - 4e / (s + 1 + 2e)) / (s + 1), hence x = y c (ac + 2): no difference of near numbers, so the relative error
    stays a few ulp for small and large y. Raises ValueError if y is not floating.
    """
    _floating("y", y)
    a = y.abs()
    s = (a * (4 * _EPSILON) + (1 + 2 * _EPSILON) ** 2).sqrt()
    c = (2 - 4 * _EPSILON / (s + (1 + 2 * _EPSILON))) / (s + 1)
    return y * c * (a * c + 2)


def to_scalar(logits: Tensor) -> Tensor:
    """Expected bin under softmax(logits), mapped back to a scalar. logits: [..., bins]; returns [...] f32.

    MuZero appendix F. Differentiable. Raises ValueError if logits is not floating or bins is not an odd number >= 3.
    Bytes moved when fused: logits read once, [...] written.
    """
    size = _size(logits)
    p = torch.softmax(_wide(logits), -1)
    bins = torch.arange(-size, size + 1, dtype=p.dtype, device=p.device)
    return inverse_transform((p * bins).sum(-1))  # not a matmul: autocast and TF32 would round it


def two_hot(x: Tensor, size: int) -> Tensor:
    """The target distribution of scalar x: h(x), clamped to -size..size, shared by its two nearest bins.

    x: [...] floating; returns [..., 2 * size + 1] f32 (f64 for f64). MuZero appendix F. A NaN gives NaN, never an
    index out of range. Raises ValueError if x is not floating or size < 1. `cross_entropy` does not need this.
    """
    _floating("x", x)
    if size < 1:
        raise ValueError(f"size: must be at least 1, got {size}")
    low, share = _split(_wide(x), size)
    out = share.new_zeros((*x.shape, 2 * size + 1))
    return out.scatter_(-1, torch.stack((low, low + 1), -1), torch.stack((1 - share, share), -1))


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of softmax(logits) against two_hot(target), without building the target.

    logits: [..., bins] floating; target: [...] floating, untransformed scalars (rewards or values); returns [...] f32.
    Differentiable once, in logits only: gradient = upstream * (softmax - two_hot), in the logits' dtype.
    A NaN target gives a NaN loss. MuZero appendix F (loss), EfficientZero (Ye et al. 2021) equation 5.
    Bytes moved when fused: forward reads logits once; backward reads them once and writes the gradient once.

    Raises ValueError if logits or target is not floating, bins is not an odd number >= 3, target's shape is not the
    logits' without the last dimension, or the two are on different devices.
    """
    _size(logits)
    _floating("target", target)
    if target.shape != logits.shape[:-1]:
        raise ValueError(f"target: shape {tuple(target.shape)}, expected {tuple(logits.shape[:-1])} as logits")
    if target.device != logits.device:
        raise ValueError(f"target: on {target.device}, but logits is on {logits.device}")
    return _CrossEntropy.apply(logits, target)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor) -> Tensor:
        x = _wide(logits)
        low, share = _split(target.to(x.dtype), logits.shape[-1] // 2)
        pair = torch.stack((low, low + 1), -1)
        weight = torch.stack((1 - share, share), -1)
        norm = torch.logsumexp(x, -1)
        ctx.save_for_backward(logits, norm, pair, weight)
        return norm - (x.gather(-1, pair) * weight).sum(-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None]:
        logits, norm, pair, weight = ctx.saved_tensors
        grad = (logits - norm.unsqueeze(-1)).exp_()
        grad.scatter_add_(-1, pair, weight.neg()).mul_(upstream.unsqueeze(-1))
        return grad.to(logits.dtype), None


def _split(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Index [...] int64 of the lower of the two bins of x, and the share [...] of the upper one."""
    y = transform(x).clamp_(-size, size)
    low = y.floor().clamp_(max=size - 1)
    return (low + size).long().clamp_(0, 2 * size - 1), y - low  # the integer clamp is for NaN


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _floating(name: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"{name}: must be floating, got {x.dtype}")


def _size(logits: Tensor) -> int:
    _floating("logits", logits)
    bins = logits.shape[-1] if logits.ndim else 0
    if bins < 3 or bins % 2 == 0:
        raise ValueError(f"logits: the last dimension must be 2 * size + 1 >= 3, got shape {tuple(logits.shape)}")
    return bins // 2
