"""A head of the network, from what it reads to its logits or their scalar (step 2: the network of the search).

A head is a 1x1 convolution or a scale and shift, ReLU, a hidden layer, ReLU, and a last layer in f32 (EfficientZero, Ye et al. 2021,
appendix A.1, its BatchNorms folded); `scalar` heads end in the expectation of `support.to_scalar`. The kernel does all of it for a
block of boards: what lies between, the logits of a scalar too, is never stored. Pixel by pixel, the channels that the convolution gives
go into the sum of the hidden layer; of the logits a softmax on the way keeps the greatest, the sum and the weighted sum.

`B` boards of `I x H x W` or vectors of `F` numbers, `C` channels of the convolution, `U` hidden units, `N` outputs.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import checks, dispatch
from .support import EPSILON, from_bins, to_scalar_reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_INPUTS = 4096
MOST_WIDE = 128
"""Channels of the convolution and hidden units at most: a block of boards holds all of them in registers."""
MOST_OUTPUTS = 4095
_BLOCK_B = 32
_BLOCK_N = 64


def head_reference(
    x: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    last_weight: Tensor,
    last_bias: Tensor,
    before: tuple[Tensor, Tensor],
    scalar: bool,
) -> Tensor:
    """`head` in plain PyTorch, without the checks."""
    weight, bias = before
    x = F.relu(F.conv2d(x, weight, bias)).flatten(1) if x.ndim == 4 else F.relu(torch.addcmul(bias, x, weight))
    logits = F.linear(F.relu(F.linear(x, hidden_weight, hidden_bias)).float(), last_weight, last_bias)
    return to_scalar_reference(logits) if scalar else logits


@triton.jit
def _positive(x):
    return tl.where(x < 0.0, 0.0, x)  # NaN stays NaN


@triton.jit(do_not_specialize=["boards", "stride"])
def _head_kernel(
    x, weight, bias, hidden_weight, hidden_bias, last_weight, last_bias, out, boards, stride,
    EPSILON: tl.constexpr, SCALAR: tl.constexpr, PIXELS: tl.constexpr, INPUTS: tl.constexpr, CHANNELS: tl.constexpr, HIDDEN: tl.constexpr,
    OUTPUTS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_U: tl.constexpr,
    BLOCK_N: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """PIXELS 0: vectors, `stride` from one to the next, and CHANNELS is 0. Else boards, channels last."""
    kind = tl.float32 if WIDEN else x.dtype.element_ty
    board = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    there = (board < boards)[:, None]
    i, c, u = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_U)
    hidden = tl.zeros([BLOCK_B, BLOCK_U], tl.float32)
    if PIXELS > 0:
        x += board[:, None] * (PIXELS * INPUTS)
        c_bias = tl.load(bias + c, mask=c < CHANNELS, other=0.0).to(tl.float32)[None, :]
        into_hidden = (c < CHANNELS)[:, None] & (u < HIDDEN)[None, :]
        for pixel in range(PIXELS):
            y = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
            for begin in tl.static_range(0, INPUTS, BLOCK_I):
                known = begin + i < INPUTS
                a = tl.load(x + pixel * INPUTS + (begin + i)[None, :], mask=there & known[None, :], other=0.0)
                w = tl.load(
                    weight + c[None, :] * INPUTS + (begin + i)[:, None], mask=known[:, None] & (c < CHANNELS)[None, :], other=0.0
                )  # fmt: skip
                y = tl.dot(a.to(kind), w.to(kind), y, input_precision="ieee")
            y = _positive(y + c_bias).to(x.dtype.element_ty)
            w = tl.load(hidden_weight + u[None, :] * (CHANNELS * PIXELS) + c[:, None] * PIXELS + pixel, mask=into_hidden, other=0.0)
            hidden = tl.dot(y.to(kind), w.to(kind), hidden, input_precision="ieee")
    else:
        x += board[:, None] * stride
        for begin in range(0, INPUTS, BLOCK_I):
            known = begin + i < INPUTS
            a = tl.load(x + (begin + i)[None, :], mask=there & known[None, :], other=0.0).to(tl.float32)
            scale = tl.load(weight + begin + i, mask=known, other=0.0).to(tl.float32)[None, :]
            shift = tl.load(bias + begin + i, mask=known, other=0.0).to(tl.float32)[None, :]
            y = _positive(a * scale + shift).to(x.dtype.element_ty)
            w = tl.load(
                hidden_weight + u[None, :] * INPUTS + (begin + i)[:, None], mask=known[:, None] & (u < HIDDEN)[None, :], other=0.0
            )  # fmt: skip
            hidden = tl.dot(y.to(kind), w.to(kind), hidden, input_precision="ieee")
    u_bias = tl.load(hidden_bias + u, mask=u < HIDDEN, other=0.0).to(tl.float32)[None, :]
    hidden = _positive(hidden + u_bias).to(x.dtype.element_ty).to(tl.float32)

    greatest = tl.full([BLOCK_B], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_B], tl.float32)
    weighed = tl.zeros([BLOCK_B], tl.float32)
    for begin in range(0, OUTPUTS, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        w = tl.load(last_weight + n[None, :] * HIDDEN + u[:, None], mask=(n < OUTPUTS)[None, :] & (u < HIDDEN)[:, None], other=0.0)
        logits = tl.dot(hidden, w, input_precision="ieee") + tl.load(last_bias + n, mask=n < OUTPUTS, other=float("-inf"))[None, :]
        if SCALAR:
            before = greatest
            greatest = tl.maximum(greatest, tl.max(logits, 1))
            e = tl.exp(logits - greatest[:, None])
            rest = tl.exp(before - greatest)
            total = total * rest + tl.sum(e, 1)
            weighed = weighed * rest + tl.sum(e * (n - OUTPUTS // 2).to(tl.float32)[None, :], 1)
        else:
            tl.store(out + board[:, None] * OUTPUTS + n[None, :], logits, mask=there & (n < OUTPUTS)[None, :])
    if SCALAR:
        tl.store(out + board, from_bins(weighed / total, EPSILON), mask=board < boards)


def head_kernel(
    x: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    last_weight: Tensor,
    last_bias: Tensor,
    before: tuple[Tensor, Tensor],
    scalar: bool,
) -> Tensor:
    """`head` in one launch, without the checks."""
    boards, inputs, convolved = x.shape[0], x.shape[1], x.ndim == 4
    hidden, outputs = hidden_weight.shape[0], last_weight.shape[0]
    channels = before[0].shape[0] if convolved else 0
    out = torch.empty((boards,) if scalar else (boards, outputs), dtype=torch.float32, device=x.device)

    def block(size: int) -> int:
        return max(16, triton.next_power_of_2(size))

    _head_kernel[(triton.cdiv(boards, _BLOCK_B),)](
        x, *before, hidden_weight, hidden_bias, last_weight, last_bias, out, boards, 0 if convolved else x.stride(0),
        EPSILON=EPSILON, SCALAR=scalar, PIXELS=x.shape[2] * x.shape[3] if convolved else 0, INPUTS=inputs, CHANNELS=channels, HIDDEN=hidden,
        OUTPUTS=outputs, BLOCK_B=_BLOCK_B, BLOCK_I=min(64, block(inputs)), BLOCK_C=block(channels), BLOCK_U=block(hidden),
        BLOCK_N=_BLOCK_N, WIDEN=triton.knobs.runtime.interpret,  # the interpreter multiplies the bits of bf16 as integers
        num_warps=4,
    )  # fmt: skip
    return out


def head(
    x: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    last_weight: Tensor,
    last_bias: Tensor,
    before: tuple[Tensor, Tensor],
    scalar: bool,
) -> Tensor:
    """last(relu(hidden(relu(before(x))))): logits, or the scalar that they stand for. For inference: no gradient.

    Args:
      x: `[B, I, H, W]` bf16, f16 or f32, on CUDA in channels-last memory, I at most 4096; or `[B, F]`, its rows of any stride.
      hidden_weight: `[U, C H W]`, as `flatten(1)` orders what it reads, or `[U, F]`. U at most 128. Of x's dtype.
      hidden_bias: `[U]` of x's dtype.
      last_weight: `[N, U]` f32, N at most 4095, and for a scalar odd and 3 or more.
      last_bias: `[N]` f32.
      before: of boards weight `[C, I, 1, 1]` and bias `[C]` of a 1x1 convolution, C at most 128; of vectors scale and shift `[F]`. Of
        x's dtype.
      scalar: whether the result is `support.to_scalar` of the logits.

    Returns:
      `[B, N]` f32, or `[B]` f32.

    Sums are f32; what a layer gives is rounded to x's dtype, as where it is stored, but for the logits. Bytes moved: x once and the result;
    the weights, which caches keep. Operations: 2 B (H W I C + H W C U + U N).

    Raises:
      ValueError: a wrong shape, dtype, device or layout, sizes beyond those above, or a gradient wanted.
    """
    _check(x, hidden_weight, hidden_bias, last_weight, last_bias, before, scalar)
    form = head_kernel if dispatch.runs_kernel(x) else head_reference
    return form(x, hidden_weight, hidden_bias, last_weight, last_bias, before, scalar)


def fits(channels: int, hidden: int, inputs: int, outputs: int) -> bool:
    """Whether `head` takes a head of so many channels, hidden units, inputs and outputs."""
    return max(channels, hidden) <= MOST_WIDE and inputs <= MOST_INPUTS and outputs <= MOST_OUTPUTS


def _check(
    x: Tensor, hidden_weight: Tensor, hidden_bias: Tensor, last_weight: Tensor, last_bias: Tensor, before: tuple[Tensor, Tensor],
    scalar: bool,
) -> None:  # fmt: skip
    checks.tensor("x", x, ("B", "I", "H", "W") if x.ndim == 4 else ("B", "F"), DTYPES, any_strides=True)
    checks.at_least("x: boards", x.shape[0], 1)
    checks.at_most("x: inputs", x.shape[1], MOST_INPUTS)
    inputs, pixels = x.shape[1], x.shape[2:].numel()
    if x.ndim == 4:
        checks.tensor("before: weight", before[0], ("C", inputs, 1, 1), x.dtype, x.device, any_strides=True)
        channels = before[0].shape[0]
        checks.at_most("before: channels", channels, MOST_WIDE)
        checks.tensor("before: bias", before[1], (channels,), x.dtype, x.device)
    else:
        channels = inputs
        for name, term in zip(("scale", "shift"), before, strict=True):
            checks.tensor(f"before: {name}", term, (inputs,), x.dtype, x.device)
    checks.tensor("hidden_weight", hidden_weight, ("U", channels * pixels), x.dtype, x.device)
    hidden = hidden_weight.shape[0]
    checks.at_most("hidden_weight: units", hidden, MOST_WIDE)
    checks.tensor("hidden_bias", hidden_bias, (hidden,), x.dtype, x.device)
    checks.tensor("last_weight", last_weight, ("N", hidden), torch.float32, x.device)
    outputs = last_weight.shape[0]
    checks.at_most("last_weight: outputs", outputs, MOST_OUTPUTS)
    if scalar and (outputs < 3 or outputs % 2 == 0):
        raise ValueError(f"last_weight: of a scalar the outputs must be 2 * size + 1, 3 or more, got {outputs}")
    checks.tensor("last_bias", last_bias, (outputs,), torch.float32, x.device)
    if torch.is_grad_enabled() and any(y.requires_grad for y in (x, hidden_weight, hidden_bias, last_weight, last_bias, *before)):
        raise ValueError("x: a gradient is wanted, and this operation has none; run it under torch.no_grad()")
    if not dispatch.runs_kernel(x):
        return
    if x.ndim == 2 and x.stride(1) != 1:
        raise ValueError(f"x: the numbers of a row must lie side by side, got strides {list(x.stride())}")
    if x.ndim == 4 and not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"x: must be in channels_last memory, got strides {list(x.stride())} for shape {list(x.shape)}")
