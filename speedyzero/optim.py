"""The optimisers: SGD with momentum and Clipped LARS over one flat buffer of parameters (step 5, learn)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from speedyzero_kernels.lars import clipped_lars_step, segments, sgd_step


class FlatParameters:
    """The parameters of a module in one fp32 buffer [P], gradients and momentum in two more of the same layout.

    Each `nn.Parameter` of the module becomes a view of `values` and its `grad` a view of `grads`, so that one kernel updates and one
    all-reduce averages everything. The module must not be moved or cast afterwards.

    Raises:
        ValueError: the module has no parameters, or not all are float32 on one device.
    """

    def __init__(self, module: nn.Module):
        parameters = list(module.parameters())
        if not parameters:
            raise ValueError("module: has no parameters")
        if len({(p.dtype, p.device) for p in parameters}) > 1 or parameters[0].dtype != torch.float32:
            raise ValueError("module: all parameters must be float32 on one device")
        self.shapes = [p.shape for p in parameters]
        self.values = torch.cat([p.detach().reshape(-1) for p in parameters])
        self.grads = torch.zeros_like(self.values)
        self.momentum = torch.zeros_like(self.values)
        start = 0
        for parameter in parameters:
            end = start + parameter.numel()
            parameter.data = self.values[start:end].view_as(parameter)
            parameter.grad = self.grads[start:end].view_as(parameter)
            start = end


class SGD:
    """SGD with momentum and L2 decay: v = momentum v + g + weight_decay w; w -= lr v.

    `lr` is a 0-d tensor on the parameters' device, or a float; assign to it in place to change it. With `max_grad_norm` the whole
    gradient is scaled down to that norm. A step whose gradient is not finite changes nothing.
    """

    def __init__(self, module: nn.Module, lr: float | Tensor, momentum: float, weight_decay: float, max_grad_norm: float | None = None):
        self.flat = FlatParameters(module)
        self.lr, self.momentum, self.weight_decay, self.max_grad_norm = lr, momentum, weight_decay, max_grad_norm

    def zero_grad(self) -> None:
        """Set all gradients to zero, in place."""
        self.flat.grads.zero_()

    def step(self) -> tuple[Tensor, Tensor]:
        """Update once; returns the gradient norm [] before clipping and whether the step was skipped []."""
        flat = self.flat
        return sgd_step(flat.values, flat.grads, flat.momentum, self.lr, self.momentum, self.weight_decay, self.max_grad_norm)


class ClippedLARS:
    """Clipped LARS for any module: per weight tensor, rate = min(eta |w| / (|g + decay w| + eps), trust_clip).

    v = momentum v + rate (g + decay w); w -= lr v. Tensors of one dimension take plain SGD without decay. LARS: You et al. 2017
    ("Large batch training of convolutional networks"); the clip as in NVIDIA's LARC. SpeedyZero (ICLR 2023) names the combination.
    `lr` as in `SGD`. A step whose gradient is not finite changes nothing.
    """

    def __init__(
        self, module: nn.Module, lr: float | Tensor, momentum: float = 0.9, weight_decay: float = 1e-4,
        trust_coefficient: float = 0.02, trust_clip: float = 1.0, max_grad_norm: float | None = None,
    ):
        self.flat = FlatParameters(module)
        self.segments = segments(self.flat.shapes, self.flat.values.device)
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.trust_coefficient, self.trust_clip, self.max_grad_norm = trust_coefficient, trust_clip, max_grad_norm

    def zero_grad(self) -> None:
        """Set all gradients to zero, in place."""
        self.flat.grads.zero_()

    def step(self) -> tuple[Tensor, Tensor]:
        """Update once; returns the gradient norm [] before clipping and whether the step was skipped []."""
        flat = self.flat
        return clipped_lars_step(
            flat.values, flat.grads, flat.momentum, self.segments, self.lr, self.momentum, self.weight_decay,
            self.trust_coefficient, self.trust_clip, self.max_grad_norm,
        )
