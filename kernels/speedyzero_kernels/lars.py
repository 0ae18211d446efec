"""The optimiser step on flat buffers: Clipped LARS, and plain SGD with momentum (end of each update of step 5).

All P parameters lie in one flat f32 buffer, gradients and momentum in two more of the same layout, so that a step is a
few passes over memory and many GPUs need one all-reduce. A step whose gradient norm is not finite changes nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Segments:
    """Where each of G tensors lies in a flat buffer of P elements, back to back.

    shapes: the tensors' shapes, on the host.
    start, size: [G] int64, first element and number of elements.
    tensor: [P] int32, which tensor an element belongs to.
    is_matrix: [G] bool, the tensor has more than one dimension.
    """

    shapes: tuple[tuple[int, ...], ...]
    start: Tensor
    size: Tensor
    tensor: Tensor
    is_matrix: Tensor


def segments(shapes: Iterable[Iterable[int]], device: torch.device | str) -> Segments:
    """Describe tensors of these shapes, in this order, on `device`. Built once, outside any capture (it copies to the
    device). Raises ValueError if shapes is empty."""
    shapes = tuple(tuple(shape) for shape in shapes)
    if not shapes:
        raise ValueError("shapes: must name at least one tensor")
    size = torch.tensor([prod(shape) for shape in shapes])
    return Segments(
        shapes=shapes,
        start=(size.cumsum(0) - size).to(device),
        size=size.to(device),
        tensor=torch.arange(len(shapes), dtype=torch.int32).repeat_interleave(size).to(device),
        is_matrix=torch.tensor([len(shape) > 1 for shape in shapes]).to(device),
    )


@torch.no_grad()
def clipped_lars_step(
    params: Tensor,
    grads: Tensor,
    momentum: Tensor,
    segments: Segments,
    lr: float | Tensor,
    momentum_factor: float,
    weight_decay: float,
    trust_coefficient: float,
    trust_clip: float,
    max_grad_norm: float | None = None,
    eps: float = 1e-9,
) -> tuple[Tensor, Tensor]:
    """One step of LARS with the local rate clipped, in place in params and momentum; grads are only read.

    For each tensor w with more than one dimension, with gradient g (after the clip by the global norm):
        lambda = min(trust_coefficient |w| / (|g + weight_decay w| + eps), trust_clip), or min(1, trust_clip) if |w| = 0
        v = momentum_factor v + lambda (g + weight_decay w);  w = w - lr v
    Tensors with at most one dimension (biases, BatchNorm) have lambda = 1 and no decay. With trust_clip = 1 no tensor
    steps further than plain SGD would take it. |w| = 0 keeps the plain rate: layers that start at zero can learn.

    LARS is "Large Batch Training of Convolutional Networks" (You, Gitman and Ginsburg 2017, section 4, algorithm 1);
    the clip, and leaving the plain rate where |w| = 0, follow LARC in NVIDIA's apex. Both divide by |g| + weight_decay
    |w|, and LARC bounds lambda by lr instead of multiplying the two. Clipped LARS is named by SpeedyZero (ICLR 2023),
    whose text was not at hand: this is our reading of the name.

    params, grads, momentum: [P] f32 contiguous. segments: of these buffers. lr: float or 0-d tensor on their device.
    max_grad_norm: bound of the global gradient norm, or None for no clip.
    Returns the global gradient norm before the clip (0-d f32) and whether the step was skipped (0-d bool): if the norm
    is not finite, neither params nor momentum changes.

    Raises ValueError for a wrong shape, dtype, device or layout, or segments of other buffers.
    Bytes moved when fused: 12 P for the norms (params, grads twice), 12 P read and 8 P written for the update. The
    reference holds one temporary of P elements.
    """
    _check(params, grads, momentum, lr)
    if segments.tensor.shape != params.shape or segments.tensor.device != params.device:
        have = f"{segments.tensor.shape[0]} elements on {segments.tensor.device}"
        raise ValueError(f"segments: {have}, but params has {params.shape[0]} on {params.device}")
    sizes = [prod(shape) for shape in segments.shapes]
    matrix = [g for g, shape in enumerate(segments.shapes) if len(shape) > 1]
    norm, step = _clipped(grads, max_grad_norm)
    if matrix:
        all_w, all_d = params.split(sizes), step.split(sizes)
        w, d = [all_w[g] for g in matrix], [all_d[g] for g in matrix]
        torch._foreach_add_(d, w, alpha=weight_decay)
        w_norm, d_norm = torch.stack(torch._foreach_norm(w)), torch.stack(torch._foreach_norm(d))
        rate = (w_norm * trust_coefficient / (d_norm + eps)).clamp_(max=trust_clip)
        rate = torch.where(w_norm > 0, rate, min(1.0, trust_clip))
        torch._foreach_mul_(d, rate.unbind())
    return norm, _descend(params, momentum, step, norm, lr, momentum_factor)


@torch.no_grad()
def sgd_step(
    params: Tensor,
    grads: Tensor,
    momentum: Tensor,
    lr: float | Tensor,
    momentum_factor: float,
    weight_decay: float,
    max_grad_norm: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of SGD with momentum and decay of every element, in place in params and momentum; grads are only read.

    v = momentum_factor v + g + weight_decay w; w = w - lr v, with g clipped to the global norm max_grad_norm if given:
    torch.optim.SGD after clip_grad_norm_. Arguments, returns, the skip and errors as in `clipped_lars_step`.
    Bytes moved when fused: 4 P for the norm, 12 P read and 8 P written.
    """
    _check(params, grads, momentum, lr)
    norm, step = _clipped(grads, max_grad_norm)
    step.add_(params, alpha=weight_decay)
    return norm, _descend(params, momentum, step, norm, lr, momentum_factor)


def _clipped(grads: Tensor, max_grad_norm: float | None) -> tuple[Tensor, Tensor]:
    """The norm of grads, and a copy of them scaled to at most max_grad_norm."""
    norm = torch.linalg.vector_norm(grads)
    return norm, grads.clone() if max_grad_norm is None else grads * (max_grad_norm / norm).clamp_(max=1)


def _descend(
    params: Tensor, momentum: Tensor, step: Tensor, norm: Tensor, lr: float | Tensor, momentum_factor: float
) -> Tensor:
    """Turn the scaled gradient `step` into the new momentum, then the new params; keep both if norm is not finite."""
    finite = norm.isfinite()
    step.add_(momentum, alpha=momentum_factor)
    torch.where(finite, step, momentum, out=momentum)
    step.mul_(lr)
    torch.sub(params, step, out=step)
    torch.where(finite, step, params, out=params)
    return finite.logical_not()


def _check(params: Tensor, grads: Tensor, momentum: Tensor, lr: float | Tensor) -> None:
    for name, x in (("params", params), ("grads", grads), ("momentum", momentum)):
        if x.ndim != 1 or x.dtype != torch.float32 or not x.is_contiguous() or x.shape != params.shape:
            raise ValueError(f"{name}: must be contiguous f32 [P], got {x.dtype} {tuple(x.shape)}")
        if x.device != params.device:
            raise ValueError(f"{name}: on {x.device}, but params is on {params.device}")
    if isinstance(lr, Tensor) and (lr.ndim != 0 or lr.device != params.device):
        raise ValueError(f"lr: must be a float or 0-d on {params.device}, got {tuple(lr.shape)} on {lr.device}")
