"""The optimiser step on flat buffers: Clipped LARS, and plain SGD with momentum (end of each update of step 5).

All P parameters lie in one flat f32 buffer, gradients and momentum in two more of the same layout, so that a step is a few passes
over memory and many GPUs need one all-reduce. A step whose gradient norm is not finite, or that the caller vetoes (`ok`), changes nothing.

On CUDA a step is two launches. The buffers are cut into M chunks, each within one tensor. `_sums_kernel` writes each chunk's sums of
squares and products in f64; every program of `_step_kernel` adds them up again in the same order, so that all know the same norms
without a third launch or an atomic, and updates its own chunk.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import checks, dispatch

_BLOCK = 1024  # elements at a time: 8 a thread, two 16-byte accesses of each buffer in flight
_MOST = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Segments:
    """Where each of G tensors lies in a flat buffer of P elements, back to back, and the M chunks in which kernels go through it.

    shapes: the tensors' shapes, on the host.
    numel: P.
    chunks: [M, 5] int64, in the order of the buffer, each chunk within one tensor: first element, number of elements, the first chunk
        of its tensor, the number of chunks of its tensor, and what its tensor is: 0 one of at most one dimension, 1 one that takes
        the rate of LARS, 2 one that does not (`plain`).
    plain: the tensors, by their place in `shapes`, that have more than one dimension and yet the plain rate.
    """

    shapes: tuple[tuple[int, ...], ...]
    numel: int
    chunks: Tensor
    plain: frozenset[int] = frozenset()


def segments(shapes: Iterable[Iterable[int]], device: torch.device | str, plain: Iterable[int] = ()) -> Segments:
    """Describe tensors of these shapes, in this order, on `device`. Built once, outside any capture (it copies to the device).

    plain: the places in `shapes` of the tensors that take the plain rate: min(1, trust_clip), as if |w| were 0, with decay. For layers
    that start at zero: the rate of LARS is in proportion to the norm, which keeps them near it.

    Raises ValueError if shapes is empty, or plain names a tensor that is not there.
    """
    shapes, plain = tuple(tuple(shape) for shape in shapes), frozenset(plain)
    if not shapes:
        raise ValueError("shapes: must name at least one tensor")
    if odd := plain - set(range(len(shapes))):
        raise ValueError(f"plain: {min(odd)} is not the place of one of {len(shapes)} shapes")
    numel = sum(prod(shape) for shape in shapes)
    length = _chunk_length(numel)
    rows: list[tuple[int, int, int, int, int]] = []
    begin = 0
    for place, shape in enumerate(shapes):
        kind = 0 if len(shape) < 2 else 2 if place in plain else 1
        end = begin + prod(shape)
        cuts = [begin, *range((begin // length + 1) * length, end, length), end]
        first, count = len(rows), len(cuts) - 1
        rows += [(cut, after - cut, first, count, kind) for cut, after in pairwise(cuts)]
        begin = end
    return Segments(shapes, numel, torch.tensor(rows).to(device), plain)


def _chunk_length(numel: int) -> int:
    """Elements of a chunk: so many that there are about 1024 chunks, since each program of the second launch reads all their sums."""
    return _BLOCK * max(1, triton.cdiv(numel, 1024 * _BLOCK))


@torch.no_grad()
def clipped_lars_step_reference(
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
    copy: Tensor | None = None,
    ok: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`clipped_lars_step` in plain PyTorch, without the checks."""
    sizes = [prod(shape) for shape in segments.shapes]
    matrices = [g for g, shape in enumerate(segments.shapes) if len(shape) > 1]
    norm, step = _clipped(grads, max_grad_norm)
    all_w, all_d = params.split(sizes), step.split(sizes)
    if matrices:
        torch._foreach_add_([all_d[g] for g in matrices], [all_w[g] for g in matrices], alpha=weight_decay)
    if trusted := [g for g in matrices if g not in segments.plain]:
        w, d = [all_w[g] for g in trusted], [all_d[g] for g in trusted]
        w_norm, d_norm = torch.stack(torch._foreach_norm(w)), torch.stack(torch._foreach_norm(d))
        rate = (w_norm * trust_coefficient / (d_norm + eps)).clamp_(max=trust_clip)
        rate = torch.where(w_norm > 0, rate, min(1.0, trust_clip))
        torch._foreach_mul_(d, rate.unbind())
    if trust_clip < 1 and len(trusted) < len(matrices):
        torch._foreach_mul_([all_d[g] for g in matrices if g in segments.plain], trust_clip)
    return norm, _descend(params, momentum, step, _finite(norm, ok), lr, momentum_factor, copy)


@torch.no_grad()
def sgd_step_reference(
    params: Tensor,
    grads: Tensor,
    momentum: Tensor,
    lr: float | Tensor,
    momentum_factor: float,
    weight_decay: float,
    max_grad_norm: float | None = None,
    copy: Tensor | None = None,
    ok: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`sgd_step` in plain PyTorch, without the checks."""
    norm, step = _clipped(grads, max_grad_norm)
    step.add_(params, alpha=weight_decay)
    return norm, _descend(params, momentum, step, _finite(norm, ok), lr, momentum_factor, copy)


def _clipped(grads: Tensor, max_grad_norm: float | None) -> tuple[Tensor, Tensor]:
    """The norm of grads, and a copy of them scaled to at most max_grad_norm."""
    norm = torch.linalg.vector_norm(grads)
    return norm, grads.clone() if max_grad_norm is None else grads * (max_grad_norm / norm).clamp_(max=1)


def _finite(norm: Tensor, ok: Tensor | None) -> Tensor:
    return norm.isfinite() if ok is None else norm.isfinite() & ok


def _descend(
    params: Tensor, momentum: Tensor, step: Tensor, finite: Tensor, lr: float | Tensor, momentum_factor: float, copy: Tensor | None
) -> Tensor:
    """Turn the scaled gradient `step` into the new momentum, then the new params; keep both if not `finite`."""
    step.add_(momentum, alpha=momentum_factor)
    torch.where(finite, step, momentum, out=momentum)
    step.mul_(lr)
    torch.sub(params, step, out=step)
    torch.where(finite, step, params, out=params)
    if copy is not None:
        copy.copy_(params)
    return finite.logical_not()


@triton.jit
def _span(chunks, numel, length, LAYERED: tl.constexpr):
    """This program's chunk [low, high), counted from an element `base` whose index is a multiple of 4, and within it [begin, end),
    both multiples of 4: there the compiler sees that 16-byte accesses are aligned, wherever the tensor starts."""
    pid = tl.program_id(0).to(tl.int64)
    if LAYERED:
        start = tl.load(chunks + pid * 5)
        size = tl.load(chunks + pid * 5 + 1)
    else:
        start = pid * length
        size = tl.minimum(numel - start, length)
    base = start // 4 * 4
    low = (start - base).to(tl.int32)
    high = low + size.to(tl.int32)
    return base, low, (low + 3) // 4 * 4, high // 4 * 4, high


@triton.jit
def _edges(lane, low, begin, end, high):
    """Offsets and mask of the up to 3 elements before `begin` and the up to 3 from `end` on."""
    offset = tl.where(lane < 4, low + lane, tl.maximum(begin, end) + lane - 4)
    return offset, offset < tl.where(lane < 4, tl.minimum(begin, high), high)


@triton.jit
def _add_sums(gg, gw, ww, grads, weights, offset, mask, LAYERED: tl.constexpr):
    """The running sums with these elements added. In f64 the products are exact, so |g + decay w| can be had from the three sums."""
    g = tl.load(grads + offset, mask=mask, other=0.0).to(tl.float64)
    gg += g * g
    if LAYERED:
        w = tl.load(weights + offset, mask=mask, other=0.0).to(tl.float64)
        gw += g * w
        ww += w * w
    return gg, gw, ww


@triton.jit(do_not_specialize=["numel", "length", "count"])
def _sums_kernel(
    weights, grads, sums, chunks, numel, length, count,
    LAYERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of g g, and if LAYERED of g w and w w, of one chunk, to its column of sums [3, count] f64 ([1, count] if not)."""
    base, low, begin, end, high = _span(chunks, numel, length, LAYERED)
    grads += base
    weights += base
    lane = tl.arange(0, BLOCK)
    gg = tl.zeros([BLOCK], tl.float64)
    gw = tl.zeros([BLOCK], tl.float64)
    ww = tl.zeros([BLOCK], tl.float64)
    for at in range(begin, end, BLOCK):
        offset = at + lane
        gg, gw, ww = _add_sums(gg, gw, ww, grads, weights, offset, offset < end, LAYERED)
    if (low < begin) | (end < high):
        offset, mask = _edges(lane, low, begin, end, high)
        gg, gw, ww = _add_sums(gg, gw, ww, grads, weights, offset, mask, LAYERED)
    sums += tl.program_id(0)
    tl.store(sums, tl.sum(gg, 0))
    if LAYERED:
        tl.store(sums + count, tl.sum(gw, 0))
        tl.store(sums + 2 * count, tl.sum(ww, 0))


@triton.jit
def _move(
    weights, grads, momentum, copy, offset, mask, finite, scale, decays, decay, rate, lr, momentum_factor, COPY: tl.constexpr,
):  # fmt: skip
    """New momentum and weights of these elements, or the old ones if not `finite`."""
    w = tl.load(weights + offset, mask=mask, other=0.0)
    step = tl.load(grads + offset, mask=mask, other=0.0) * scale
    old = tl.load(momentum + offset, mask=mask, other=0.0)
    step = tl.where(decays, step + decay * w, step)
    new = momentum_factor * old + rate * step
    w = tl.where(finite, w - lr * new, w)
    tl.store(momentum + offset, tl.where(finite, new, old), mask=mask)
    tl.store(weights + offset, w, mask=mask)
    if COPY:
        tl.store(copy + offset, w.to(tl.bfloat16), mask=mask)


@triton.jit(do_not_specialize=["numel", "length", "count"])
def _step_kernel(
    weights, grads, momentum, copy, sums, chunks, ok, norm_out, skipped_out, lr, momentum_factor, weight_decay,
    trust_coefficient, trust_clip, max_grad_norm, eps, numel, length, count,
    LAYERED: tl.constexpr, TENSOR_LR: tl.constexpr, OK: tl.constexpr, COPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The norms from all chunks' sums, then the update of one chunk."""
    base, low, begin, end, high = _span(chunks, numel, length, LAYERED)
    lane = tl.arange(0, BLOCK)
    gg = tl.zeros([BLOCK], tl.float64)
    for at in range(0, count, BLOCK):
        gg += tl.load(sums + at + lane, mask=at + lane < count, other=0.0)
    # Sums become f32 before the root, so that what overflows f32 is an infinite norm, as in the reference. `where`, not a
    # minimum: it keeps NaN.
    norm = tl.sqrt_rn(tl.sum(gg, 0).to(tl.float32))
    finite = norm < float("inf")
    if OK:
        finite = finite & (tl.load(ok) != 0)
    ratio = max_grad_norm / norm
    scale = tl.where(ratio > 1.0, 1.0, ratio)
    rate = 1.0
    decays = True
    if LAYERED:
        row = chunks + tl.program_id(0) * 5
        first = tl.load(row + 2).to(tl.int32)
        after = first + tl.load(row + 3).to(tl.int32)
        kind = tl.load(row + 4)
        decays = kind != 0
        part = tl.arange(0, BLOCK // 4)
        own_gg = tl.zeros([BLOCK // 4], tl.float64)
        own_gw = tl.zeros([BLOCK // 4], tl.float64)
        own_ww = tl.zeros([BLOCK // 4], tl.float64)
        for at in range(first, after, BLOCK // 4):
            mask = at + part < after
            own_gg += tl.load(sums + at + part, mask=mask, other=0.0)
            own_gw += tl.load(sums + count + at + part, mask=mask, other=0.0)
            own_ww += tl.load(sums + 2 * count + at + part, mask=mask, other=0.0)
        ww = tl.sum(own_ww, 0)
        s = scale.to(tl.float64)
        square = s * s * tl.sum(own_gg, 0) + 2.0 * s * weight_decay * tl.sum(own_gw, 0) + weight_decay * (weight_decay * ww)
        square = tl.where(square < 0.0, 0.0, square)
        w_norm = tl.sqrt_rn(ww.to(tl.float32))
        trust = w_norm * trust_coefficient / (tl.sqrt_rn(square.to(tl.float32)) + eps)
        trust = tl.where((w_norm > 0.0) & (kind == 1), trust, 1.0)
        trust = tl.where(trust > trust_clip, trust_clip, trust)
        rate = tl.where(decays, trust, 1.0)
    if TENSOR_LR:
        lr = tl.load(lr)
    if tl.program_id(0) == 0:
        tl.store(norm_out, norm)
        tl.store(skipped_out, finite == 0)

    weights += base
    grads += base
    momentum += base
    copy += base
    blocks = tl.cdiv(end - begin, BLOCK)
    for i in range(0, blocks):  # backwards: the first launch has read the end last, so it is likeliest to be in the cache
        offset = begin + (blocks - 1 - i) * BLOCK + lane
        _move(
            weights, grads, momentum, copy, offset, offset < end, finite, scale, decays, weight_decay, rate, lr, momentum_factor, COPY,
        )  # fmt: skip
    if (low < begin) | (end < high):
        offset, mask = _edges(lane, low, begin, end, high)
        _move(weights, grads, momentum, copy, offset, mask, finite, scale, decays, weight_decay, rate, lr, momentum_factor, COPY)


def _launch(
    params: Tensor, grads: Tensor, momentum: Tensor, segments: Segments | None, lr: float | Tensor, momentum_factor: float,
    weight_decay: float, trust_coefficient: float, trust_clip: float, max_grad_norm: float | None, eps: float,
    copy: Tensor | None, ok: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Both launches: of Clipped LARS, or, without segments, of SGD."""
    numel, layered = params.numel(), segments is not None
    length = _chunk_length(numel)
    count = len(segments.chunks) if layered else max(1, triton.cdiv(numel, length))
    sums = params.new_empty((3 if layered else 1, count), dtype=torch.float64)
    norm, skipped = params.new_empty(()), params.new_empty((), dtype=torch.bool)
    chunks = segments.chunks if layered else sums  # sums, params, skipped: in place of what there is not, and never read
    _sums_kernel[(count,)](params, grads, sums, chunks, numel, length, count, LAYERED=layered, BLOCK=_BLOCK, num_warps=4)
    _step_kernel[(count,)](
        params, grads, momentum, params if copy is None else copy, sums, chunks, skipped if ok is None else ok, norm, skipped,
        lr if isinstance(lr, Tensor) else float(lr), float(momentum_factor), float(weight_decay), float(trust_coefficient),
        float(trust_clip), float("inf") if max_grad_norm is None else float(max_grad_norm), float(eps), numel, length, count,
        LAYERED=layered, TENSOR_LR=isinstance(lr, Tensor), OK=ok is not None, COPY=copy is not None, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    return norm, skipped


@torch.no_grad()
def clipped_lars_step_kernel(
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
    copy: Tensor | None = None,
    ok: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`clipped_lars_step` as two launches, without the checks."""
    return _launch(
        params, grads, momentum, segments, lr, momentum_factor, weight_decay, trust_coefficient, trust_clip, max_grad_norm, eps, copy, ok
    )


@torch.no_grad()
def sgd_step_kernel(
    params: Tensor,
    grads: Tensor,
    momentum: Tensor,
    lr: float | Tensor,
    momentum_factor: float,
    weight_decay: float,
    max_grad_norm: float | None = None,
    copy: Tensor | None = None,
    ok: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`sgd_step` as two launches, without the checks."""
    return _launch(params, grads, momentum, None, lr, momentum_factor, weight_decay, 1.0, 1.0, max_grad_norm, 0.0, copy, ok)


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
    copy: Tensor | None = None,
    ok: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of LARS with the local rate clipped, in place in params and momentum; grads are only read.

    For each tensor w with more than one dimension, with gradient g (after the clip by the global norm):
        lambda = min(trust_coefficient |w| / (|g + weight_decay w| + eps), trust_clip), or min(1, trust_clip) if |w| = 0 or
            `segments` has it as plain
        v = momentum_factor v + lambda (g + weight_decay w);  w = w - lr v
    Tensors with at most one dimension (biases, BatchNorm) have lambda = 1 and no decay. With trust_clip = 1 no tensor
    steps further than plain SGD would take it. |w| = 0 keeps the plain rate: layers that start at zero can learn.

    LARS is "Large Batch Training of Convolutional Networks" (You, Gitman and Ginsburg 2017, section 4, algorithm 1);
    the clip, and leaving the plain rate where |w| = 0, follow LARC in NVIDIA's apex. Both divide by |g| + weight_decay
    |w|, and LARC bounds lambda by lr instead of multiplying the two. Clipped LARS is named by SpeedyZero (ICLR 2023),
    whose text was not at hand: this is our reading of the name.

    params, grads, momentum: [P] f32 contiguous, P < 2^31. segments: of these buffers. lr: float, or 0-d f32 on their device.
    max_grad_norm: bound of the global gradient norm, or None for no clip.
    copy: [P] bf16 contiguous, or None: becomes the params after the step, rounded, in the same pass (also if it was skipped).
    ok: 0-d bool on their device, or None: whether the caller agrees to the step.
    Returns the global gradient norm before the clip (0-d f32) and whether the step was skipped (0-d bool): if the norm
    is not finite, or `ok` is false, neither params nor momentum changes. A sum of squares beyond f32 is an infinite norm.

    Raises ValueError for a wrong shape, dtype, device or layout, or segments of other buffers.
    Bytes moved by the kernel: 8 P for the norms (params, grads), then 12 P read and 8 P written, and 2 P for a copy. It adds up the
    norms in f64. The reference holds one temporary of P elements.
    """
    _check(params, grads, momentum, lr, copy, ok)
    if segments.numel != params.numel() or segments.chunks.device != params.device:
        have = f"{segments.numel} elements on {segments.chunks.device}"
        raise ValueError(f"segments: {have}, but params has {params.numel()} on {params.device}")
    step = clipped_lars_step_kernel if dispatch.runs_kernel(params) else clipped_lars_step_reference
    return step(
        params, grads, momentum, segments, lr, momentum_factor, weight_decay, trust_coefficient, trust_clip, max_grad_norm, eps, copy, ok
    )


def sgd_step(
    params: Tensor,
    grads: Tensor,
    momentum: Tensor,
    lr: float | Tensor,
    momentum_factor: float,
    weight_decay: float,
    max_grad_norm: float | None = None,
    copy: Tensor | None = None,
    ok: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of SGD with momentum and decay of every element, in place in params and momentum; grads are only read.

    v = momentum_factor v + g + weight_decay w; w = w - lr v, with g clipped to the global norm max_grad_norm if given:
    torch.optim.SGD after clip_grad_norm_. Arguments, returns, the skip and errors as in `clipped_lars_step`.
    Bytes moved by the kernel: 4 P for the norm, then 12 P read and 8 P written, and 2 P for a copy.
    """
    _check(params, grads, momentum, lr, copy, ok)
    step = sgd_step_kernel if dispatch.runs_kernel(params) else sgd_step_reference
    return step(params, grads, momentum, lr, momentum_factor, weight_decay, max_grad_norm, copy, ok)


def _check(params: Tensor, grads: Tensor, momentum: Tensor, lr: float | Tensor, copy: Tensor | None, ok: Tensor | None) -> None:
    checks.tensor("params", params, ("P",), torch.float32)
    checks.at_most("params", params.numel(), _MOST)
    for name, x in (("grads", grads), ("momentum", momentum)):
        checks.tensor(name, x, (params.numel(),), torch.float32, params.device)
    if copy is not None:
        checks.tensor("copy", copy, (params.numel(),), torch.bfloat16, params.device)
    if isinstance(lr, Tensor):
        checks.tensor("lr", lr, (), torch.float32, params.device)
    if ok is not None:
        checks.tensor("ok", ok, (), torch.bool, params.device)
