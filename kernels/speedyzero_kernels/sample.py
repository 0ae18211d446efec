"""Prioritised sampling: which ring positions a batch learns from, and with what importance weight (step 5).

Proportional prioritisation of "Prioritized Experience Replay" (Schaul et al. 2016, section 3.3 and appendix B.2.1), with sums by block
in place of the sum tree: the ring is small enough to read anew, and priorities may then be written freely.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import checks, dispatch

MOST_SLOTS = 2**24
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def proportional_reference(
    priorities: Tensor, batch: int, alpha: float | Tensor, beta: float | Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """`proportional` in plain PyTorch: a prefix sum of all slots, and a binary search in it."""
    p = priorities.double()
    mass = torch.where((p > 0) & (p < float("inf")), p.pow(alpha), 0)
    upto = mass.cumsum(0)
    rank = (mass > 0).cumsum(0, dtype=torch.int32)  # exact, so it decides what the rounded sums must not
    some = rank[-1] > 0

    strata = torch.arange(batch, dtype=torch.float64, device=p.device)
    uniform = torch.rand(batch, dtype=torch.float64, device=p.device, generator=generator)
    point = (strata + uniform) * (upto[-1] / batch)
    hit = torch.searchsorted(upto, point, right=True).clamp_(max=p.shape[0] - 1)
    # A parallel scan rounds each entry apart, and a point may round up to the total: step back to a positive slot.
    indices = torch.searchsorted(rank, rank[hit].clamp_(min=1)) * some
    drawn = mass[indices]
    weights = (drawn / drawn.min()).pow(-beta)
    return indices, torch.where(some, weights, 0).float()


@triton.jit
def _double(x):
    if x.dtype.primitive_bitwidth < 32:  # the interpreter has no way from bf16 to f64 but through f32
        x = x.to(tl.float32)
    return x.to(tl.float64)


@triton.jit
def _mass(p, alpha):
    """p^alpha in f64; 0 for what is never drawn."""
    p = _double(p)
    real = (p > 0) & (p < float("inf"))
    mass = tl.exp(alpha * tl.log(tl.where(real, p, 1.0)))
    return tl.where(real & (mass > 0), mass, 0.0)


@triton.jit
def _block_mass_kernel(priorities, alpha, sums, count, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    p = tl.load(priorities + slot, mask=slot < count, other=0.0)
    tl.store(sums + block, tl.sum(_mass(p, _double(tl.load(alpha))), 0))


@triton.jit(do_not_specialize=["batch", "blocks"])
def _draw_kernel(
    priorities, alpha, sums, uniform, indices, drawn, count, batch, blocks, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    draw = tl.program_id(0)
    block = tl.arange(0, BLOCKS)
    size = tl.load(sums + block, mask=block < blocks, other=0.0)
    upto = tl.cumsum(size, 0)
    total = tl.sum(tl.where(block == BLOCKS - 1, upto, 0.0), 0)
    point = (draw + tl.load(uniform + draw)) * (total / batch)

    # Rounding may put the point past every sum, in a block or a slot without mass, or beyond the chosen block's end: only what has mass
    # may be chosen, and the last such one stands in where no sum exceeds the point.
    first = tl.min(tl.where((upto > point) & (size > 0), block, BLOCKS), 0)
    last = tl.max(tl.where(size > 0, block, 0), 0)
    chosen = tl.where(first < BLOCKS, first, last)
    point -= tl.sum(tl.where(block == chosen - 1, upto, 0.0), 0)

    slot = chosen * BLOCK + tl.arange(0, BLOCK)
    mass = _mass(tl.load(priorities + slot, mask=slot < count, other=0.0), _double(tl.load(alpha)))
    within = tl.cumsum(mass, 0)
    first = tl.min(tl.where((within > point) & (mass > 0), slot, count), 0)
    last = tl.max(tl.where(mass > 0, slot, 0), 0)
    index = tl.where(first < count, first, last)
    tl.store(indices + draw, index.to(tl.int64))
    tl.store(drawn + draw, tl.sum(tl.where(slot == index, mass, 0.0), 0))


@triton.jit(do_not_specialize=["batch"])
def _weight_kernel(drawn, beta, weights, batch, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    least = tl.full([BLOCK], float("inf"), tl.float64)
    for start in range(0, batch, BLOCK):  # each program anew: the masses are few, and another launch costs more
        least = tl.minimum(least, tl.load(drawn + start + lane, mask=start + lane < batch, other=float("inf")))
    least = tl.min(least, 0)
    draw = tl.program_id(0) * BLOCK + lane
    mass = tl.load(drawn + draw, mask=draw < batch, other=1.0)
    some = least > 0
    share = tl.log(tl.where(some, least, 1.0)) - tl.log(tl.where(some, mass, 1.0))
    weight = tl.where(some, tl.exp(_double(tl.load(beta)) * share), 0.0)
    tl.store(weights + draw, weight.to(tl.float32), mask=draw < batch)


def _block_size(slots: int) -> int:
    """Slots a block: a draw costs a scan of the block's masses, recomputed, and one of all the sums, about 8 times cheaper each."""
    block = 128
    while triton.cdiv(slots, block) > min(8 * block, 4096):
        block *= 2
    return block


def proportional_kernel(
    priorities: Tensor, batch: int, alpha: float | Tensor, beta: float | Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """`proportional` in three launches: the mass of each block, the draws, the weights."""
    slots, device = priorities.shape[0], priorities.device
    alpha, beta = (
        x if isinstance(x, Tensor) else torch.full((), x, dtype=torch.float64, device=device) for x in (alpha, beta)
    )
    uniform = torch.rand(batch, dtype=torch.float64, device=device, generator=generator)
    block = _block_size(slots)
    blocks = triton.cdiv(slots, block)
    sums = torch.empty(blocks, dtype=torch.float64, device=device)
    indices = torch.empty(batch, dtype=torch.int64, device=device)
    drawn = torch.empty(batch, dtype=torch.float64, device=device)
    weights = torch.empty(batch, dtype=torch.float32, device=device)

    _block_mass_kernel[(blocks,)](priorities, alpha, sums, slots, BLOCK=block, num_warps=min(block // 128, 8))
    padded = max(32, triton.next_power_of_2(blocks))
    _draw_kernel[(batch,)](
        priorities, alpha, sums, uniform, indices, drawn, slots, batch, blocks, BLOCK=block, BLOCKS=padded,
        num_warps=min(max(block, padded) // 128, 8),
    )  # fmt: skip
    lanes = min(1024, max(32, triton.next_power_of_2(batch)))
    _weight_kernel[(triton.cdiv(batch, lanes),)](drawn, beta, weights, batch, BLOCK=lanes, num_warps=min(triton.cdiv(lanes, 128), 8))
    return indices, weights


def proportional(
    priorities: Tensor, batch: int, alpha: float | Tensor, beta: float | Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Draw one index per stratum with P(i) = p_i^alpha / sum p^alpha, and its importance weight.

    M denotes the number of slots, at most 2**24. Masses p^alpha and their sums are f64.

    priorities: [M] floating, contiguous. NaN, infinite, zero and negative ones are never drawn, whatever alpha is.
    alpha, beta: floats or 0-d floating tensors on the priorities' device; alpha in 0..1 (0 is uniform over the positive slots),
        beta >= 0.
    generator: of the priorities' device, or None for the default one; it gives `batch` f64 uniforms.

    Returns indices [batch] int64, ascending up to rounding (draw j is the slot that holds the point (j + uniform) / batch of the total
    mass, up to the rounding of f64 sums, so slots may repeat), and weights [batch] f32, (count * P(i))^-beta over the largest of the
    batch, count being the number of positive slots (it cancels). With nothing positive: indices 0 and weights 0. The kernel gives the
    same draws every time for the same priorities and uniforms.

    Raises ValueError if priorities is not a contiguous floating vector with 1 to 2**24 entries, batch < 1, alpha or beta is a tensor that
    is not 0-d and floating or is on another device, or the generator is of another device.
    Bytes moved by the kernel: priorities read once; a draw reads 8 B of each block's sum, at most 4096 of them, and one block of
    priorities, 128 to 4096, both as a rule from the L2 cache.
    """
    checks.tensor("priorities", priorities, ("M",), FLOATS)
    checks.at_least("priorities", priorities.shape[0], 1)
    checks.at_most("priorities", priorities.shape[0], MOST_SLOTS)
    checks.at_least("batch", batch, 1)
    for name, value in (("alpha", alpha), ("beta", beta)):
        if isinstance(value, Tensor):
            checks.tensor(name, value, (), FLOATS, priorities.device)
    if generator is not None and generator.device.type != priorities.device.type:
        raise ValueError(f"generator: of {generator.device}, but priorities is on {priorities.device}")
    form = proportional_kernel if dispatch.runs_kernel(priorities) else proportional_reference
    return form(priorities, batch, alpha, beta, generator)
