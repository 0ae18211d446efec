"""BatchNorm over the batch of all ranks: each has a share of the rows, and normalises by the mean and variance of all of them."""

from __future__ import annotations

from torch import nn

from speedyzero.layers import BatchNorm1d, BatchNorm2d
from speedyzero.ranks import Ranks


def normalise_over_ranks(module: nn.Module, ranks: Ranks) -> None:
    """Let every BatchNorm of a module normalise by the batch of all ranks while it trains; of a single rank nothing changes.

    Two messages of 16 bytes a channel, forward and backward. Every rank's loss is a mean over as many samples, and the gradients of the
    ranks are averaged afterwards.

    Raises:
        TypeError: a BatchNorm is not one of `layers`, and would keep to the rows of its rank.
    """
    for norm in module.modules():
        if isinstance(norm, BatchNorm1d | BatchNorm2d):
            norm.exchange, norm.shares = ranks.add, ranks.size
        elif isinstance(norm, nn.modules.batchnorm._BatchNorm):
            raise TypeError(f"{type(norm).__name__}: normalises by the rows of one rank; take the BatchNorm of speedyzero.layers")
