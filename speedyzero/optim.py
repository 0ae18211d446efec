"""The optimisers: SGD with momentum and Clipped LARS over one flat buffer of parameters; and the learner that holds one (step 5, learn).

`ClippedLARS` is for other programs: the same step as a `torch.optim.Optimizer`.

And what else a step may have to leave as it was: the running statistics of BatchNorm, which a forward pass has changed by then.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.optimizer import ParamsT

from speedyzero.layers import Head
from speedyzero.nets import Network
from speedyzero.settings import LearnSettings
from speedyzero_kernels.lars import clipped_lars_step, segments, sgd_step


class FlatParameters:
    """The parameters of a module in one fp32 buffer [P], gradients and momentum in two more of the same layout.

    Each `nn.Parameter` of the module becomes a view of `values` and its `grad` a view of `grads`, so that one kernel updates and one
    all-reduce averages everything. A weight that lies channels last keeps that order, as the convolutions want it. The module must not
    be moved or cast afterwards.

    Raises:
        ValueError: the module has no parameters, or not all are float32 on one device.
    """

    def __init__(self, module: nn.Module):
        parameters = dict(module.named_parameters())
        if not parameters:
            raise ValueError("module: has no parameters")
        first = next(iter(parameters.values()))
        if len({(p.dtype, p.device) for p in parameters.values()}) > 1 or first.dtype != torch.float32:
            raise ValueError("module: all parameters must be float32 on one device")
        self._likes = {name: (p.shape, _channels_last(p)) for name, p in parameters.items()}
        self.shapes = [p.shape for p in parameters.values()]
        self.values = torch.cat([_row(p.detach()) for p in parameters.values()])
        self.grads = torch.zeros_like(self.values)
        self.momentum = torch.zeros_like(self.values)
        values, grads = self.views(self.values), self.views(self.grads)
        for name, parameter in parameters.items():
            parameter.data, parameter.grad = values[name], grads[name]

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """`values`, `grads` or `momentum` [P] as the tensors of the parameters, by name."""
        return {name: _shaped(row, *like) for row, (name, like) in zip(self._rows(buffer), self._likes.items(), strict=True)}

    def _rows(self, buffer: Tensor) -> tuple[Tensor, ...]:
        return buffer.split([shape.numel() for shape in self.shapes])

    def halves(self, names: Collection[str]) -> dict[str, Tensor]:
        """bf16 copies of the named parameters as they are now, to differentiate by, made in one launch. Each begins where a tensor of its
        own begins: within one buffer they would lie across the 16 bytes that tensor cores load at once."""
        each = zip(self._likes.items(), self._rows(self.values), strict=True)
        wanted = [(name, like, row) for (name, like), row in each if name in names]
        copies = [torch.empty_like(row, dtype=torch.bfloat16) for _, _, row in wanted]
        if copies:
            torch._foreach_copy_(copies, [row for _, _, row in wanted])
        return {name: _shaped(copy, *like).requires_grad_() for (name, like, _), copy in zip(wanted, copies, strict=True)}

    def take(self, gradients: Iterable[Tensor | None]) -> None:
        """Write the gradients of all parameters, in their order and of any dtypes, into `grads`: a launch a dtype. None: zeros."""
        found: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        rows, likes = self._rows(self.grads), self._likes.values()
        for gradient, row, (_, channels_last) in zip(gradients, rows, likes, strict=True):
            if gradient is None:
                row.zero_()
                continue
            mine, theirs = found.setdefault(gradient.dtype, ([], []))
            mine.append(row)
            theirs.append(_in_order(gradient, channels_last))
        for mine, theirs in found.values():
            torch._foreach_copy_(mine, theirs)


def _channels_last(weight: Tensor) -> bool:
    return weight.dim() == 4 and not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)


def _row(weight: Tensor) -> Tensor:
    """The numbers of a weight in the order in which they lie in memory."""
    return _in_order(weight, _channels_last(weight))


def _in_order(weight: Tensor, channels_last: bool) -> Tensor:
    return (weight.permute(0, 2, 3, 1) if channels_last else weight).reshape(-1)


def _shaped(row: Tensor, shape: torch.Size, channels_last: bool) -> Tensor:
    """The weight whose `_row` this is; a view."""
    if not channels_last:
        return row.view(shape)
    out, inner, height, width = shape
    return row.view(out, height, width, inner).permute(0, 3, 1, 2)


class RunningStatistics:
    """What every BatchNorm of a module has seen so far: running means and variances float32, and int64 of how many batches they are.

    Each buffer of the BatchNorms becomes a view of one buffer of 32-bit words. `keep` remembers all of them and `restore` brings them
    back, in one kernel each: what a forward pass left of a batch that is not finite would stay in them for ever, and come into every
    snapshot. The module must not be moved or cast afterwards.

    Raises:
        ValueError: the module has no BatchNorm.
    """

    def __init__(self, module: nn.Module):
        buffers = [b for norm in module.modules() if isinstance(norm, _BatchNorm) for b in norm.buffers(recurse=False)]
        if not buffers:
            raise ValueError("module: has no BatchNorm")
        buffers.sort(key=lambda buffer: buffer.dtype != torch.int64)  # counts first
        rows = [buffer.reshape(-1).view(torch.int32) for buffer in buffers]
        # Each at a multiple of 64 bytes, as if it had been allocated alone: cuDNN reads and writes them.
        rows = [F.pad(row, (0, -row.numel() % 16)) for row in rows]
        self.words = torch.cat(rows)
        """[W] int32."""
        self.kept = torch.zeros_like(self.words)
        """[W] int32, the words as `keep` found them."""
        for buffer, row in zip(buffers, self.words.split([row.numel() for row in rows]), strict=True):
            buffer.data = row.view(buffer.dtype)[: buffer.numel()].view(buffer.shape)
        counts = sum(row.numel() for row, buffer in zip(rows, buffers, strict=True) if buffer.dtype == torch.int64)
        self.values = self.words[counts:].view(torch.float32)
        """[V] float32, all means and variances, and zeros between them."""

    def keep(self) -> None:
        """Remember the statistics of this moment."""
        self.kept.copy_(self.words)

    def restore(self, wanted: Tensor) -> None:
        """Go back to what was kept if `wanted` [] bool; else change nothing, not a bit."""
        torch.where(wanted, self.kept, self.words, out=self.words)


class SGD:
    """SGD with momentum and L2 decay: v = momentum v + g + weight_decay w; w -= lr v.

    `lr` is a 0-d tensor on the parameters' device, or a float; assign to it in place to change it. With `max_grad_norm` the whole
    gradient is scaled down to that norm.
    """

    def __init__(self, module: nn.Module, lr: float | Tensor, momentum: float, weight_decay: float, max_grad_norm: float | None = None):
        self.flat = FlatParameters(module)
        self.lr, self.momentum, self.weight_decay, self.max_grad_norm = lr, momentum, weight_decay, max_grad_norm

    def zero_grad(self) -> None:
        """Set all gradients to zero, in place."""
        self.flat.grads.zero_()

    def step(self, ok: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Update once, unless the gradient is not finite or `ok` [] bool is false: then nothing changes.

        Returns the gradient norm [] before clipping, and whether the step was skipped [].
        """
        flat = self.flat
        return sgd_step(
            flat.values, flat.grads, flat.momentum, self.lr, self.momentum, self.weight_decay, self.max_grad_norm, ok=ok
        )


class ClippedLARS(torch.optim.Optimizer):
    """Clipped LARS for any parameters: per weight tensor, rate = min(trust_coefficient |w| / (|d| + eps), trust_clip).

    d = g + weight_decay w; v = momentum v + rate d; w -= lr v. A tensor of zeros has rate min(1, trust_clip), so that it can leave them;
    after that its small norm still holds it back. Put layers that start at zero into a group with `trust_coefficient=math.inf`: their
    rate is trust_clip at every step, as the trainer's last layers have it.
    Tensors with at most one dimension (biases, norms) take plain SGD with momentum, without decay. LARS: You et al. 2017 ("Large batch
    training of convolutional networks"); the clip as in NVIDIA's LARC. SpeedyZero (ICLR 2023) names the combination.

    It keeps to the contract of `torch.optim`: parameters or groups, each with options of its own, schedulers, `state_dict`, closures.
    Parameters without a gradient, or that require none, do not move. The trainer uses `FlatClippedLARS`, the same numbers in fewer
    launches.

    Args:
        params: floating tensors of any shapes, or groups (dictionaries) of them.
        lr: learning rate, 0 or more; a float, or a 0-d tensor that is read at every step.
        momentum: 0 to below 1.
        weight_decay: L2 decay of tensors with more than one dimension, 0 or more.
        trust_coefficient: above 0.
        trust_clip: greatest rate, above 0; 1 lets no tensor step further than plain SGD, infinity is LARS without the clip.
        eps: added to |d|, 0 or more.

    Raises:
        ValueError: an option out of its range, of any group.
        RuntimeError: at a step, a gradient that is sparse or complex.
    """

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 0.1, *, momentum: float = 0.9, weight_decay: float = 1e-4,
        trust_coefficient: float = 0.02, trust_clip: float = 1.0, eps: float = 1e-9,
    ):  # fmt: skip
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, options | {"trust_coefficient": trust_coefficient, "trust_clip": trust_clip, "eps": eps})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own; what is left out takes the defaults."""
        options = self.defaults | param_group
        for name in ("lr", "momentum", "weight_decay", "eps"):
            if not options[name] >= 0:
                raise ValueError(f"{name}: must be at least 0, got {options[name]}")
        for name in ("trust_coefficient", "trust_clip"):
            if not options[name] > 0:
                raise ValueError(f"{name}: must be above 0, got {options[name]}")
        if not options["momentum"] < 1:
            raise ValueError(f"momentum: must be below 1, got {options['momentum']}")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update once. `closure` clears the gradients, computes the loss and its gradients, and returns it; so does this."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.requires_grad and p.grad is not None]
            if any(p.grad.layout != torch.strided or p.is_complex() for p in moving):
                raise RuntimeError("ClippedLARS: a gradient is sparse or complex, neither is supported")
            if moving:
                self._descend(group, moving)
        return loss

    def _descend(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        for w in weights:
            if not self.state[w]:
                self.state[w]["momentum_buffer"] = torch.zeros_like(w)
        velocities = [self.state[w]["momentum_buffer"] for w in weights]
        steps = [w.grad for w in weights]
        matrices = [i for i, w in enumerate(weights) if w.dim() > 1]
        if matrices:
            w = [weights[i] for i in matrices]
            decayed = torch._foreach_add([steps[i] for i in matrices], w, alpha=group["weight_decay"])
            w_norms = torch._foreach_norm(w)
            rates = torch._foreach_div(
                torch._foreach_mul(w_norms, group["trust_coefficient"]), torch._foreach_add(torch._foreach_norm(decayed), group["eps"])
            )
            torch._foreach_clamp_max_(rates, group["trust_clip"])
            plain = min(1.0, group["trust_clip"])
            torch._foreach_mul_(decayed, [torch.where(norm > 0, rate, plain) for norm, rate in zip(w_norms, rates, strict=True)])
            for i, d in zip(matrices, decayed, strict=True):
                steps[i] = d
        torch._foreach_mul_(velocities, group["momentum"])
        torch._foreach_add_(velocities, steps)
        torch._foreach_sub_(weights, torch._foreach_mul(velocities, group["lr"]))


class FlatClippedLARS:
    """`ClippedLARS` over flat buffers, for the trainer: two launches on CUDA, and a step that may be refused. `lr` as in `SGD`.

    plain: names of weights that take the rate min(1, trust_clip), with decay, as a group with an infinite `trust_coefficient` does there.
    """

    def __init__(
        self, module: nn.Module, lr: float | Tensor, momentum: float = 0.9, weight_decay: float = 1e-4,
        trust_coefficient: float = 0.02, trust_clip: float = 1.0, max_grad_norm: float | None = None, plain: Collection[str] = (),
    ):
        self.flat = FlatParameters(module)
        places = [place for place, (name, _) in enumerate(module.named_parameters()) if name in plain]
        self.segments = segments(self.flat.shapes, self.flat.values.device, places)
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.trust_coefficient, self.trust_clip, self.max_grad_norm = trust_coefficient, trust_clip, max_grad_norm

    def zero_grad(self) -> None:
        """Set all gradients to zero, in place."""
        self.flat.grads.zero_()

    def step(self, ok: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Update once, or not at all: as `SGD.step`."""
        flat = self.flat
        return clipped_lars_step(
            flat.values, flat.grads, flat.momentum, self.segments, self.lr, self.momentum, self.weight_decay,
            self.trust_coefficient, self.trust_clip, self.max_grad_norm, ok=ok,
        )


def make_optimizer(module: nn.Module, config: LearnSettings, lr: Tensor) -> SGD | FlatClippedLARS:
    """The optimiser that the config names; `lr` [] is read at every step."""
    if config.optimizer == "sgd":
        return SGD(module, lr, config.momentum, config.weight_decay, config.max_grad_norm)
    # The last layers start at zero. A rate in proportion to their norm would hardly let them leave it.
    plain = {f"{name}.last.weight" for name, part in module.named_modules() if isinstance(part, Head)}
    return FlatClippedLARS(
        module, lr, config.momentum, config.weight_decay, config.trust_coefficient, config.trust_clip, config.max_grad_norm, plain
    )


@dataclass
class Learner:
    """The network in training, its optimiser, and how it fares."""

    network: Network
    optimizer: SGD | FlatClippedLARS
    statistics: RunningStatistics
    """Of the network's BatchNorms."""
    skipped: Tensor
    """[] int64, updates skipped because their loss, gradient or running statistics were not finite."""
    skipped_in_a_row: Tensor
    """[] int64, those since the last one that was not."""


def make_learner(network: Network, config: LearnSettings) -> Learner:
    """A learner of `network`, whose parameters and running statistics become views of flat buffers."""
    device = next(network.parameters()).device
    optimizer = make_optimizer(network, config, torch.zeros((), device=device))
    skipped, in_a_row = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
    return Learner(network, optimizer, RunningStatistics(network), skipped, in_a_row)
