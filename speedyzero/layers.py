"""Layers whose BatchNorm folds: each is one class for the network in training and, `folded`, for its snapshot without BatchNorm.

In the shapes `B` is the batch, `C x H x W` a board.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from speedyzero_kernels import dispatch
from speedyzero_kernels.head import head as fused_head
from speedyzero_kernels.norm import batch_norm
from speedyzero_kernels.resblock import LARGEST_SIDE, conv3x3, resblock


def _initialise(weight: Tensor) -> None:
    """PyTorch's own initialisation of convolutions and linear layers, uniform with a spread of 1 / sqrt(3 inputs), as in EfficientZero.

    Before a BatchNorm the size of a weight changes nothing but how far a step of the optimiser turns it: with He's larger weights the
    value followed the returns less after as many updates, at both rates that were tried (docs/LEARNING.md).
    """
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))


def _folded(norm: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    """Scale and shift per channel that a BatchNorm amounts to with its running statistics."""
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


class _Norm(nn.modules.batchnorm._BatchNorm):
    """A BatchNorm that does what follows it too, and in training on CUDA all of it in our kernels.

    It does not count its batches: with a fixed momentum nobody reads the count, and it is a launch a layer.
    """

    def __init__(self, features: int):
        super().__init__(features)
        self.num_batches_tracked = None
        self.exchange: Callable[[Tensor], None] | None = None
        self.shares = 1
        """Of the batch, and what adds up their sums, where several ranks share it: see `norm_over_ranks`."""

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """Normalise, add the residual, then ReLU."""
        mean, var, weight, bias = self.running_mean, self.running_var, self.weight, self.bias
        if not self.training:
            return _after(F.batch_norm(x, mean, var, weight, bias, eps=self.eps), residual, relu)
        return batch_norm(
            _for_kernel(x), weight, bias, mean, var, _for_kernel(residual), relu,
            momentum=self.momentum, eps=self.eps, exchange=self.exchange, shares=self.shares,
        )  # fmt: skip


class BatchNorm2d(_Norm, nn.BatchNorm2d):
    """Over the channels of [B, C, H, W]."""


class BatchNorm1d(_Norm, nn.BatchNorm1d):
    """Over the features of [B, C]."""


def _for_kernel(x: Tensor | None) -> Tensor | None:
    """A board as the kernels want it: the convolutions leave it so, and then nothing is copied."""
    boards = x is not None and x.dim() == 4 and dispatch.runs_kernel(x)
    return x.contiguous(memory_format=torch.channels_last) if boards else x


def _after(x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """What follows a BatchNorm, where no kernel does both."""
    x = x if residual is None else x + residual
    return F.relu(x) if relu else x


class ConvNorm(nn.Module):
    """A convolution, its BatchNorm, a residual and ReLU; folded: a convolution with a bias."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, folded: bool = False):
        super().__init__()
        self.stride, self.padding = stride, kernel // 2
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel))
        _initialise(self.weight)
        self.norm = None if folded else BatchNorm2d(outputs)
        self.bias = nn.Parameter(torch.zeros(outputs)) if folded else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        return _after(x, residual, relu=True) if self.norm is None else self.norm(x, residual, relu=True)

    def fold_from(self, source: ConvNorm) -> None:
        """Take the weights of `source` with its BatchNorm folded in."""
        scale, shift = _folded(source.norm)
        self.weight.copy_(source.weight * scale[:, None, None, None])
        self.bias.copy_(shift)


def fits_kernel(board: Tensor) -> bool:
    """Whether a board [B, C, H, W] is small enough for the fused convolutions; the larger ones of the representation are cuDNN's."""
    return max(board.shape[2:]) <= LARGEST_SIDE


Parts = tuple[Tensor, Tensor]
"""Of a step of the dynamics: the weight over the latent, and what the action of each board adds [B, channels, H, W]."""


class ActionConv(nn.Module):
    """The first convolution of the dynamics, over the latent and planes that say the action, with its BatchNorm.

    `scalar` is one plane of action / A, as in EfficientZero; `one-hot` is A planes, the action's of ones. A plane is constant over the
    board, so its share of the convolution is one map per action: the maps are computed from the weights once (once an update, or once a
    snapshot, when folded), and no plane is ever built.
    """

    def __init__(self, channels: int, actions: int, board: tuple[int, int], encoding: str = "scalar", folded: bool = False):
        super().__init__()
        self.channels = channels
        planes = actions if encoding == "one-hot" else 1
        self.weight = nn.Parameter(torch.empty(channels, channels + planes, 3, 3))
        _initialise(self.weight)
        if encoding == "one-hot":
            # No action differs from another before there is a reason: a search would take random differences for advantages.
            nn.init.zeros_(self.weight[:, channels:])
        self.norm = None if folded else BatchNorm2d(channels)
        self.register_buffer("ones", torch.ones(1, 1, *board), persistent=False)
        # [A, planes], what each plane holds for each action.
        code = torch.eye(actions) if encoding == "one-hot" else torch.arange(actions).float()[:, None] / actions
        self.register_buffer("code", code, persistent=False)
        self.register_buffer("identity", torch.eye(actions), persistent=False)
        if folded:
            self.action_bias = nn.Parameter(torch.zeros(actions, channels, *board))
            self.weight = nn.Parameter(torch.empty(channels, channels, 3, 3))

    def _maps(self) -> Tensor:
        """What each action adds to the convolution: [A, channels, H, W]."""
        planes = self.weight[:, self.channels :].transpose(0, 1).flatten(0, 1).unsqueeze(1)
        shares = F.conv2d(self.ones, planes, padding=1).view(-1, self.channels, *self.ones.shape[2:])
        if self.code.shape[1] > 1:
            return shares
        # In the dtype of autocast: one fp32 factor here would make the rest of the dynamics fp32.
        return self.code.to(shares.dtype)[:, :, None, None] * shares

    def _latent_weight(self) -> Tensor:
        return self.weight[:, : self.channels].contiguous(memory_format=dispatch.board_format(self.weight))

    def split(self, actions: Tensor) -> list[Parts | None]:
        """The `parts` of `forward` at every step of an unroll over actions [B, K], made once. None each if folded."""
        if self.norm is None:
            return [None] * actions.shape[1]
        weight, maps = self._latent_weight(), self._maps()
        if not dispatch.runs_kernel(maps):
            return [(weight, maps[action]) for action in actions.unbind(1)]
        # A product with the actions as rows of the identity looks up the maps of all steps at once. It is exact, and so is the sum of its
        # gradient but for one rounding; that of an index is sorted first.
        count, channels, height, width = maps.shape
        rows = self.identity.to(maps.dtype)[actions.t()].flatten(0, 1) @ maps.permute(0, 2, 3, 1).reshape(count, -1)
        boards = rows.view(-1, height, width, channels).permute(0, 3, 1, 2)
        return [(weight, added) for added in boards.split(actions.shape[0])]

    def forward(self, latent: Tensor, action: Tensor, parts: Parts | None = None) -> Tensor:
        """relu(convolution + latent): the residual of the dynamics is a part of it, as one launch does it all. `parts`: of `split`."""
        if self.norm is None and fits_kernel(latent):
            return conv3x3(latent, self.weight, action_bias=self.action_bias, action=action, residual=latent)
        if self.norm is None:
            return F.relu(F.conv2d(latent, self.weight, padding=1) + self.action_bias[action] + latent)
        weight, added = parts or (self._latent_weight(), self._maps()[action])
        return self.norm(F.conv2d(latent, weight, padding=1) + added, latent, relu=True)

    def fold_from(self, source: ActionConv) -> None:
        """Take the weights of `source` with its BatchNorm and its action planes folded in."""
        scale, shift = (term[:, None, None] for term in _folded(source.norm))
        self.weight.copy_(source.weight[:, : source.channels] * scale[..., None])
        self.action_bias.copy_(source._maps() * scale + shift)


class LinearNorm(nn.Module):
    """A linear layer, its BatchNorm and, with `relu`, ReLU; folded: a linear layer with a bias."""

    def __init__(self, inputs: int, outputs: int, folded: bool = False, relu: bool = True):
        super().__init__()
        self.relu = relu
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        _initialise(self.weight)
        self.norm = None if folded else BatchNorm1d(outputs)
        self.bias = nn.Parameter(torch.zeros(outputs)) if folded else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.weight, self.bias)
        return _after(x, None, self.relu) if self.norm is None else self.norm(x, relu=self.relu)

    def fold_from(self, source: LinearNorm) -> None:
        """Take the weights of `source` with its BatchNorm folded in."""
        scale, shift = _folded(source.norm)
        self.weight.copy_(source.weight * scale[:, None])
        self.bias.copy_(shift)


class Norm(nn.Module):
    """A BatchNorm over features that no linear layer precedes, and ReLU; folded: a scale and a shift."""

    def __init__(self, features: int, folded: bool = False):
        super().__init__()
        self.norm = None if folded else BatchNorm1d(features)
        self.scale = nn.Parameter(torch.ones(features)) if folded else None
        self.shift = nn.Parameter(torch.zeros(features)) if folded else None

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(torch.addcmul(self.shift, x, self.scale)) if self.norm is None else self.norm(x, relu=True)

    def fold_from(self, source: Norm) -> None:
        """Take the scale and shift that the BatchNorm of `source` amounts to."""
        scale, shift = _folded(source.norm)
        self.scale.copy_(scale)
        self.shift.copy_(shift)


class ResBlock(nn.Module):
    """Two 3x3 convolutions with a residual; with `stride` 2 or other channels the residual passes a convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, folded: bool = False):
        super().__init__()
        self.first = ConvNorm(inputs, outputs, 3, stride, folded)
        self.second = ConvNorm(outputs, outputs, 3, 1, folded)
        same = stride == 1 and inputs == outputs
        self.skip = None if same else nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.first.norm is None and self.skip is None and fits_kernel(x):
            return resblock(x, self.first.weight, self.first.bias, self.second.weight, self.second.bias)
        residual = x if self.skip is None else self.skip(x)
        return self.second(self.first(x), residual)


def full_precision(x: Tensor) -> AbstractContextManager:
    """No autocast on the device of `x`. Tensors without memory know none, and refuse to have it turned off."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def lstm_cell(inputs: Tensor, more: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """An LSTM's output and cell [B, H] from the two summands of its gates [B, 4 H], in PyTorch's order, and its cell before.

    On CUDA it is PyTorch's own kernel, as of `nn.LSTMCell`, one each way.
    """
    if inputs.is_cuda:
        return torch.ops.aten._thnn_fused_lstm_cell(inputs, more, cell)[:2]
    take, keep, new, show = (inputs + more).chunk(4, dim=1)
    cell = keep.sigmoid() * cell + take.sigmoid() * new.tanh()
    return show.sigmoid() * cell.tanh(), cell


class Head(nn.Module):
    """Hidden layer, BatchNorm, ReLU and a last layer that starts at zero: [B, inputs] -> [B, outputs]."""

    def __init__(self, inputs: int, hidden: int, outputs: int, folded: bool = False):
        super().__init__()
        self.hidden = LinearNorm(inputs, hidden, folded)
        self.last = nn.Linear(hidden, outputs)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.hidden(x)
        # In fp32 whatever the rest is in: 601 logits rounded to bf16 put an error on a value that is larger than the least range of Q.
        with full_precision(x):
            return self.last(x.to(self.last.weight.dtype))


def read_out(head: Head, before: ConvNorm | Norm, x: Tensor, scalar: bool) -> Tensor:
    """The head behind `before`, both folded, in one launch: its logits of x, or the scalar that they stand for."""
    terms = (before.weight, before.bias) if isinstance(before, ConvNorm) else (before.scale, before.shift)
    return fused_head(x, head.hidden.weight, head.hidden.bias, head.last.weight, head.last.bias, terms, scalar)


class _HalfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> Tensor:
        return upstream * 0.5


def halve_gradient(x: Tensor) -> Tensor:
    """The same values, half the gradient (MuZero, appendix G)."""
    return _HalfGradient.apply(x)


class WithoutMemory(TorchFunctionMode):
    """Under it, modules are made of weights that have shapes and no memory.

    Not by `torch.device("meta")`, where arithmetic, such as that of an initialisation, imports PyTorch's compiler: a second or two.
    """

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in (torch.empty, torch.zeros, torch.ones):
            return func(*args, **((kwargs or {}) | {"device": "meta"}))
        if func in (torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.zero_, torch.Tensor.fill_):
            return args[0]
        return func(*args, **(kwargs or {}))
