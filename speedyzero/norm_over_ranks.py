"""BatchNorm over the batch of all ranks: each has a share of the rows, and normalises by the mean and variance of all of them.

As `SyncBatchNorm`, in any dtype and on a CPU too. In the shapes `m` is a rank's share of some rows, and `C` channels or features.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from speedyzero.ranks import Ranks


def normalise_over_ranks(module: nn.Module, ranks: Ranks) -> None:
    """Let every BatchNorm of a module in training normalise by the batch of all ranks; of a single rank nothing changes."""
    if ranks.size > 1:
        for norm in module.modules():
            if isinstance(norm, _BatchNorm):
                norm.whole_batch = partial(batch_norm, ranks)


def batch_norm(ranks: Ranks, x: Tensor, norm: _BatchNorm) -> Tensor:
    """`norm` of this rank's rows x [m, C, ...] in training, by mean and variance of all ranks' rows; its running statistics follow.

    "Batch normalization" (Ioffe and Szegedy, 2015) over the whole batch. Two messages of 16 C bytes, forward and backward. Every rank's
    loss is a mean over as many samples, and the gradients of the ranks are averaged afterwards.
    """
    return _WholeBatchNorm.apply(x, norm.weight, norm.bias, norm, ranks)


class _WholeBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: _BatchNorm, ranks: Ranks) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        var, mean = torch.var_mean(x.to(wide), _all_but_channels(x), correction=0)
        # In fp64: a variance as the difference of two means of squares would lose what fp32 holds.
        moments = torch.stack((mean.double(), var.double() + mean.double().square()))
        ranks.average(moments)
        mean = moments[0]
        var = (moments[1] - mean.square()).clamp_min(0.0)
        count = ranks.size * x.numel() // x.shape[1]
        for running, new in ((norm.running_mean, mean), (norm.running_var, var * (count / (count - 1)))):
            running.mul_(1 - norm.momentum).add_(new.to(running.dtype), alpha=norm.momentum)
        ctx.ranks = ranks
        ctx.save_for_backward(x, weight, mean.to(wide), torch.rsqrt(var + norm.eps).to(wide))
        return F.batch_norm(x, mean.to(weight.dtype), var.to(weight.dtype), weight, bias, False, 0.0, norm.eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, mean, scale = ctx.saved_tensors
        dims, count = _all_but_channels(x), x.numel() // x.shape[1]

        def per_channel(row: Tensor) -> Tensor:
            return row.view(-1, *(1,) * (x.dim() - 2))

        normalised = (x.to(mean.dtype) - per_channel(mean)) * per_channel(scale)
        grad = grad.to(mean.dtype)
        sums = torch.stack((grad.sum(dims), (grad * normalised).sum(dims)))
        means = sums.double() / count
        ranks: Ranks = ctx.ranks
        ranks.average(means)
        shift, slope = means.to(mean.dtype)
        inner = (grad - per_channel(shift) - normalised * per_channel(slope)) * per_channel(scale * weight)
        return inner.to(x.dtype), sums[1].to(weight.dtype), sums[0].to(weight.dtype), None, None


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]
