"""A matrix of M rows and C columns shared out to the programs of a kernel that sums its columns.

The rows are cut into at most 128 chunks, the columns, which are channels, into blocks. Each program sums a chunk of a block; where there
is more than one chunk, two numbers a channel of each go through a table, which all programs of a second launch add up in one order.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

FEW_ROWS = 2048
"""Up to so many rows one program takes all of them."""
MOST_CHUNKS = 128
"""Each program of a second launch reads the sums of all chunks; 128 keep an H100 busy, of 132 processors, one each."""


@dataclass(frozen=True)
class Cut:
    """How M rows of C channels are shared out. Decides the order of the sums, so it may depend on the shape and the dtype alone."""

    block_m: int
    """Rows at once: a power of two."""
    block_c: int
    """Channels of a program: a power of two."""
    chunk: int
    """Rows of a program, a multiple of block_m; the last program may have fewer."""
    chunks: int
    """Programs beside each other along the rows; with 1 there is no first launch."""
    warps: int

    @classmethod
    def of(cls, rows: int, channels: int, item: int) -> "Cut":
        """For numbers of `item` bytes."""
        few = rows <= FEW_ROWS
        block_c = min(triton.next_power_of_2(channels), 16 if few else 64)
        # 16 KiB of each tensor: with all stages of three of them, what the shared memory of an A100 holds.
        block_m = min((8192 if few else 16384) // item // block_c, triton.next_power_of_2(rows))
        blocks = triton.cdiv(rows, block_m)
        each = blocks if few else triton.cdiv(blocks, MOST_CHUNKS)
        # 16 numbers of each tensor a thread: two loads of 16 bytes in bf16.
        return cls(block_m, block_c, each * block_m, triton.cdiv(blocks, each), max(1, block_m * block_c // 512))


@triton.jit
def span(rows, chunk, BLOCK_C: tl.constexpr):
    """First row of this program's chunk (64-bit: offsets may pass 2^31), how many rows it has, and its channels [BLOCK_C]."""
    first = tl.program_id(0).to(tl.int64) * chunk
    count = tl.minimum(rows - first, chunk).to(tl.int32)
    return first, count, tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def within(at, count, c, CHANNELS: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows [BLOCK_M] from `at` on, and which of the block [BLOCK_M, BLOCK_C] exist; the compiler drops a mask that is all true."""
    row = at + tl.arange(0, BLOCK_M)
    inside = tl.full([BLOCK_M, BLOCK_C], True, tl.int1)
    if not EVEN:
        inside = inside & (row < count)[:, None]
    if CHANNELS % BLOCK_C != 0:
        inside = inside & (c < CHANNELS)[None, :]
    return row, inside


@triton.jit
def write_sums(table, first, second, c, chunks, CHANNELS: tl.constexpr):
    """The two numbers a channel of this program's chunk into the table [2, chunks, C]."""
    at = table + tl.program_id(0) * CHANNELS + c
    tl.store(at, first, mask=c < CHANNELS)
    tl.store(at + chunks * CHANNELS, second, mask=c < CHANNELS)


@triton.jit
def read_sums(table, c, chunks, CHANNELS: tl.constexpr, BLOCK_P: tl.constexpr):
    """Both halves of the table for these channels, [BLOCK_P, BLOCK_C] each, zero past the last chunk."""
    p = tl.arange(0, BLOCK_P)
    there = (p < chunks)[:, None] & (c < CHANNELS)[None, :]
    at = table + p[:, None] * CHANNELS + c[None, :]
    return p, tl.load(at, mask=there, other=0.0), tl.load(at + chunks * CHANNELS, mask=there, other=0.0)
