"""`norm.batch_norm` in plain PyTorch, the oracle of the kernels' tests and what a CPU runs, of one share of the batch and of several."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def batch_norm_reference(
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
    """`batch_norm` without the checks. In a dtype below f32 it rounds after each of the three, the kernel once."""
    if shares > 1:
        out = _SharedBatchNorm.apply(x, weight, bias, running_mean, running_var, momentum, eps, exchange, shares)
    else:
        out = F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps)
    if residual is not None:
        out = out + residual
    return F.relu(out) if relu else out


class _SharedBatchNorm(torch.autograd.Function):
    """The normalisation alone, of a share."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float,
        exchange: Callable[[Tensor], object], shares: int,
    ) -> Tensor:  # fmt: skip
        wide, rows = weight.dtype, x.numel() // x.shape[1]
        var, mean = (moment.double() for moment in torch.var_mean(x.to(wide), _all_but_channels(x), correction=0))
        sums = rows * torch.stack((mean, var + mean.square()))
        exchange(sums)
        total = shares * rows
        mean, second = sums / total
        var = (second - mean.square()).clamp_min(0.0)
        for running, new in ((running_mean, mean), (running_var, var * (total / (total - 1)))):
            running.mul_(1 - momentum).add_(new.to(wide), alpha=momentum)
        ctx.exchange, ctx.total = exchange, total
        ctx.save_for_backward(x, weight, mean.to(wide), torch.rsqrt(var + eps).to(wide))
        return F.batch_norm(x, mean.to(wide), var.to(wide), weight, bias, False, 0.0, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        dims = _all_but_channels(x)

        def per_channel(row: Tensor) -> Tensor:
            return row.view(-1, *(1,) * (x.dim() - 2))

        normalised = (x.to(mean.dtype) - per_channel(mean)) * per_channel(scale)
        g = upstream.to(mean.dtype)
        own = torch.stack((g.sum(dims), (g * normalised).sum(dims)))
        sums = own.to(torch.float64, copy=True)
        ctx.exchange(sums)
        level, slope = (sums / ctx.total).to(mean.dtype)
        inner = (g - per_channel(level) - normalised * per_channel(slope)) * per_channel(scale * weight)
        return inner.to(x.dtype), own[1], own[0], *(None,) * 6


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]
