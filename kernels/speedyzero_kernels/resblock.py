"""3x3 convolutions of small boards with all that follows them: bias, residual, ReLU (steps 2 and 3: the network of the search).

The residual block of He et al. 2016, section 3.3, its BatchNorms folded into the convolutions (Ioffe and Szegedy 2015, section 3.1).
The dynamics' constant action plane is a bias map per action (MuZero, Nature 2020, appendix E has the plane).

The kernel is an implicit matrix product. Channels-last, the pixels of all boards are the rows of one matrix `[B * H * W, I]`, so a
tap of the convolution is the same matrix, shifted by dy * W + dx rows, zero where a tap leaves its board: no board is padded, and
blocks of rows do not care where a board begins.

`B` boards, `I` and `O` input and output channels, `H x W` the board.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import checks, dispatch

LARGEST_SIDE = 12
MOST_CHANNELS = 512
# Offsets are 32-bit numbers of elements, and the last block of rows reaches a little past the end.
MOST_ELEMENTS = 2**30
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Tile:
    """How the kernel cuts its work. Changes the time and, by the blocks of input channels, the rounding."""

    block_m: int
    """Pixels of a program: a power of two from 16."""
    block_n: int
    """Output channels of a program: a power of two from 16."""
    block_k: int
    """Input channels of a step, 9 x ceil(I / block_k) steps: a power of two from 16."""
    num_warps: int
    num_stages: int
    """Steps whose loads are under way at once."""


TILES = (
    Tile(64, 64, 64, 4, 1),
    Tile(64, 64, 64, 4, 2),
    Tile(64, 64, 64, 4, 3),
    Tile(64, 64, 64, 4, 4),
    Tile(128, 64, 64, 4, 1),
    Tile(128, 64, 64, 4, 2),
    Tile(128, 64, 64, 4, 3),
    Tile(128, 64, 64, 4, 4),
    Tile(128, 64, 64, 8, 3),
    Tile(256, 64, 64, 8, 1),
    Tile(256, 64, 64, 8, 2),
    Tile(256, 64, 64, 8, 3),
)
"""What a benchmark may try for 64 channels in bf16."""


def conv3x3_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    action_bias: Tensor | None = None,
    action: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = True,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """`conv3x3` in plain PyTorch; `tile` is without effect."""
    out = F.conv2d(x, weight, bias, padding=1)
    if action_bias is not None:
        out += action_bias[action]
    if residual is not None:
        out += residual
    if relu:
        out.relu_()
    return out if _is_channels_last(x) else out.contiguous()


def _is_channels_last(x: Tensor) -> bool:
    # Sizes of 1 count for nothing: a board of one pixel or a tensor of one channel is in both layouts.
    return x.is_contiguous(memory_format=torch.channels_last)


@triton.jit(do_not_specialize=["rows", "actions"])
def _conv3x3_kernel(
    x, weight, bias, action_bias, action, residual, out, rows, actions,
    BIAS: tl.constexpr, ACTION_BIAS: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    # Programs of the same pixels are neighbours, so that only the first of them reads those from memory.
    blocks_n: tl.constexpr = (OUTPUTS + BLOCK_N - 1) // BLOCK_N
    m = tl.program_id(0) // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    pixel = m % (H * W)
    py, px = pixel // W, pixel % W
    # Bit t: does tap t of this pixel lie on its board?
    on_board = tl.zeros([BLOCK_M], tl.int32)
    for t in tl.static_range(9):
        y, z = py + (t // 3 - 1), px + (t % 3 - 1)
        on_board |= ((m < rows) & (y >= 0) & (y < H) & (z >= 0) & (z < W)).to(tl.int32) << t
    if ACTION_BIAS:
        chosen = tl.load(action + m // (H * W), mask=m < rows, other=0)
        chosen = tl.minimum(tl.maximum(chosen, 0), actions - 1).to(tl.int32)

    steps_k: tl.constexpr = (INPUTS + BLOCK_K - 1) // BLOCK_K
    x_tile = x + m[:, None] * INPUTS + k[None, :]
    weight_tile = weight + n[None, :] * (9 * INPUTS) + k[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(9 * steps_k):
        tap, begin = step // steps_k, step % steps_k * BLOCK_K
        inside = ((on_board >> tap) & 1) != 0
        if INPUTS % BLOCK_K == 0:
            x_mask, weight_mask = inside[:, None], (n < OUTPUTS)[None, :]
        else:
            x_mask, weight_mask = inside[:, None] & (begin + k < INPUTS)[None, :], (n < OUTPUTS)[None, :] & (begin + k < INPUTS)[:, None]
        # Every row is read by nine taps: kept in the first-level cache, eight of these reads stay within the SM.
        a = tl.load(x_tile + (((tap // 3 - 1) * W + tap % 3 - 1) * INPUTS + begin), mask=x_mask, other=0.0, cache_modifier=".ca")
        b = tl.load(weight_tile + (tap * INPUTS + begin), mask=weight_mask, other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")

    written = (m < rows)[:, None] & (n < OUTPUTS)[None, :]
    at = m[:, None] * OUTPUTS + n[None, :]
    if BIAS:
        total += tl.load(bias + n, mask=n < OUTPUTS, other=0.0).to(tl.float32)[None, :]
    if ACTION_BIAS:
        plane = (chosen * (H * W) + pixel)[:, None] * OUTPUTS + n[None, :]
        total += tl.load(action_bias + plane, mask=written, other=0.0).to(tl.float32)
    if RESIDUAL:
        total += tl.load(residual + at, mask=written, other=0.0).to(tl.float32)
    if RELU:
        total = tl.where(total < 0.0, 0.0, total)  # NaN stays NaN
    tl.store(out + at, total.to(out.dtype.element_ty), mask=written)


def default_tile(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> Tile:
    """The tile of a convolution of `rows` = B * H * W pixels: a function of the shapes alone."""
    block_n = min(max(triton.next_power_of_2(outputs), 16), 64)
    block_k = min(max(triton.next_power_of_2(inputs), 16), 64)
    if dtype == torch.float32:  # no tensor cores: small blocks, for the products of a step are all in registers
        return Tile(32, min(block_n, 32), min(block_k, 32), 4, 2)
    if inputs % 4 or outputs % 4:  # loads of an element each, whose many addresses fill the registers
        return Tile(32, min(block_n, 32), min(block_k, 32), 4, 2)
    # Two programs for each of 132 SMs before the blocks grow.
    small = rows * triton.cdiv(outputs, block_n) < 2 * 132 * 128
    return Tile(64 if small else 128, block_n, block_k, 4, 4 if small else 3)


def conv3x3_kernel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    action_bias: Tensor | None = None,
    action: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = True,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """`conv3x3` as one launch."""
    boards, inputs, height, width = x.shape
    outputs, rows = weight.shape[0], boards * height * width
    tile = tile or default_tile(rows, inputs, outputs, x.dtype)
    out = torch.empty((boards, outputs, height, width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    _conv3x3_kernel[(triton.cdiv(rows, tile.block_m) * triton.cdiv(outputs, tile.block_n),)](
        x, weight, x if bias is None else bias, x if action_bias is None else action_bias, x if action is None else action,
        x if residual is None else residual, out, rows, 1 if action_bias is None else action_bias.shape[0],
        BIAS=bias is not None, ACTION_BIAS=action_bias is not None, RESIDUAL=residual is not None, RELU=relu,
        H=height, W=width, INPUTS=inputs, OUTPUTS=outputs, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        WIDEN=triton.knobs.runtime.interpret,  # the interpreter multiplies the bits of bf16 as integers
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    action_bias: Tensor | None = None,
    action: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = True,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """3x3 convolution of stride 1 and padding 1, plus biases, plus residual, then ReLU. For inference: no gradient.

    Layout: on CUDA every `[..., H, W]` tensor is in channels-last memory; elsewhere x decides: channels-last or contiguous.

    Args:
      x: `[B, I, H, W]` bf16, f16 or f32, sides of at most 12, at most 512 channels. Sums are f32 whatever the dtype.
      weight: `[O, I, 3, 3]`, as all that follows in x's dtype; at most 512 channels.
      bias: `[O]`.
      action_bias: `[A, O, H, W]`, a map for each of A actions; needs `action`.
      action: `[B]` int64, the map that a board takes, from 0 to A - 1. Beyond these the kernel takes the nearest, while the
        reference raises IndexError or counts from the end, as indexing does.
      residual: `[B, O, H, W]`, added before the ReLU.
      relu: whether negative results become 0.
      tile: how the kernel cuts its work; None lets the shapes decide (`default_tile`).

    Returns:
      `[B, O, H, W]` in x's dtype and layout.

    Bytes moved: B * H * W * (I + O, and O more with a residual) elements, the weights and the action maps, which caches keep.
    Operations: 18 * B * H * W * I * O.

    Raises:
      ValueError: a wrong shape, dtype, device or layout, sizes beyond those above, B, H, W or channels of 0, x, out or
        action_bias of more than 2^30 elements, one of action_bias and action without the other, or a gradient wanted.
    """
    boards, _, height, width = _check_board(x)
    _check_conv(x, "weight", weight, "bias", bias, x.shape[1])
    outputs = weight.shape[0]
    if (action_bias is None) != (action is None):
        raise ValueError("action: must be given with action_bias, and only with it")
    if action_bias is not None:
        checks.tensor("action_bias", action_bias, ("A", outputs, height, width), x.dtype, x.device, any_strides=True)
        _check_memory("action_bias", action_bias, x)
        checks.at_least("action_bias: actions", action_bias.shape[0], 1)
        checks.at_most("action_bias: elements", action_bias.numel(), MOST_ELEMENTS)
        checks.tensor("action", action, (boards,), torch.int64, x.device)
    if residual is not None:
        checks.tensor("residual", residual, (boards, outputs, height, width), x.dtype, x.device, any_strides=True)
        _check_memory("residual", residual, x)
    convolve = conv3x3_kernel if dispatch.runs_kernel(x) else conv3x3_reference
    return convolve(x, weight, bias, action_bias, action, residual, relu, tile=tile)


def resblock(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, *, tile: Tile | None = None
) -> Tensor:
    """relu(conv(relu(conv(x, weight1) + bias1), weight2) + bias2 + x), both convolutions as in `conv3x3`: two launches.

    x: `[B, I, H, W]`. weight1: `[O, I, 3, 3]`, bias1: `[O]`. weight2: `[I, O, 3, 3]`, bias2: `[I]`. dtypes, layouts, limits and what
    is raised are those of `conv3x3`. Returns `[B, I, H, W]`. Bytes moved: B * H * W * (3 I + 2 O) elements and the weights.
    """
    _check_board(x)
    _check_conv(x, "weight1", weight1, "bias1", bias1, x.shape[1])
    _check_conv(x, "weight2", weight2, "bias2", bias2, weight1.shape[0], x.shape[1])
    convolve = conv3x3_kernel if dispatch.runs_kernel(x) else conv3x3_reference
    return convolve(convolve(x, weight1, bias1, tile=tile), weight2, bias2, residual=x, tile=tile)


def _check_board(x: Tensor) -> torch.Size:
    checks.tensor("x", x, ("B", "I", "H", "W"), DTYPES, any_strides=True)
    _check_memory("x", x, x)
    checks.at_least("x: boards", x.shape[0], 1)
    for name, side in zip(("height", "width"), x.shape[2:], strict=True):
        checks.at_least(f"x: {name}", side, 1)
        checks.at_most(f"x: {name}", side, LARGEST_SIDE)
    checks.at_most("x: elements", x.numel(), MOST_ELEMENTS)
    return x.shape


def _check_conv(x: Tensor, name: str, weight: Tensor, bias_name: str, bias: Tensor | None, inputs: int, outputs: int | str = "O") -> None:
    checks.tensor(name, weight, (outputs, inputs, 3, 3), x.dtype, x.device, any_strides=True)
    _check_memory(name, weight, x)
    for channels in weight.shape[:2]:
        checks.at_least(f"{name}: channels", channels, 1)
        checks.at_most(f"{name}: channels", channels, MOST_CHANNELS)
    checks.at_most(f"{name}: elements of the output", x.numel() // x.shape[1] * weight.shape[0], MOST_ELEMENTS)
    if bias is not None:
        checks.tensor(bias_name, bias, (weight.shape[0],), x.dtype, x.device)
        _check_memory(bias_name, bias, x)


def _check_memory(name: str, y: Tensor, x: Tensor) -> None:
    """Layout of `y` in an operation on `x`, and that it wants no gradient."""
    if y.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: wants a gradient, and this operation has none; run it under torch.no_grad()")
    if y.ndim != 4 or _is_channels_last(y):
        return
    if dispatch.runs_kernel(x):
        raise ValueError(f"{name}: must be in channels_last memory, got strides {list(y.stride())} for shape {list(y.shape)}")
    if not y.is_contiguous():
        raise ValueError(f"{name}: must be contiguous or channels_last, got strides {list(y.stride())} for shape {list(y.shape)}")
