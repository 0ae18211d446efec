"""How far two tensors are from each other, in one number that a bound can be put on."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

# Elements compared at once: in float64, eight bytes each, a whole ring would not fit.
CHUNK = 2**24


@dataclass(frozen=True)
class Deviation:
    """Of what was got from what was expected, element by element."""

    bitwise: bool
    """Whether all are equal, bit for bit (as numbers, where the dtypes differ); NaN equals itself."""
    differ: int
    """Elements that are not equal."""
    largest: float
    """Greatest |got - expected|; infinite where only one is finite."""
    relative: float
    """Greatest |got - expected| / (|expected| + rms of the expected)."""

    def within(self, bound: float) -> bool:
        """Whether it is bitwise, or relatively at most the bound."""
        return self.bitwise or self.relative <= bound

    def to_json(self) -> dict:
        return asdict(self)


def deviation(got: Tensor, expected: Tensor) -> Deviation:
    """Compare tensors of one shape, of any dtype and device.

    Raises:
        ValueError: their shapes differ.
    """
    if got.shape != expected.shape:
        raise ValueError(f"shapes {tuple(got.shape)} and {tuple(expected.shape)} cannot be compared")
    a, b = got.detach().reshape(-1), expected.detach().reshape(-1)
    differ, largest, relative, bitwise = 0, 0.0, 0.0, True
    rms = None
    for begin in range(0, a.numel(), CHUNK):
        mine, theirs = a[begin : begin + CHUNK], b[begin : begin + CHUNK].to(a.device)
        if _same_bits(mine, theirs):
            continue
        rms = _rms(b) if rms is None else rms
        x, y = mine.double(), theirs.double()
        same = (x == y) | (x.isnan() & y.isnan())
        apart = torch.where(same, 0.0, (x - y).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)
        # A scale of 0 is a deviation of an infinite share, and one that is not finite bounds nothing.
        scale = (y.abs() + rms).nan_to_num(nan=0.0, posinf=0.0)
        share = torch.where(apart > 0, apart / scale, 0.0)
        differ += int((~same).sum())
        largest = max(largest, float(apart.max()))
        relative = max(relative, float(share.max()))
        # Zeros of two signs are equal numbers and other bits.
        bitwise &= mine.dtype != theirs.dtype and bool(same.all())
    return Deviation(bitwise, differ, largest, relative)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype:
        return bool((a.double() == b.double()).all())
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _rms(x: Tensor) -> float:
    """Root mean square of the finite elements; 0 if there are none."""
    total, count = 0.0, 0
    for part in x.split(CHUNK):
        finite = part.double()
        finite = finite[finite.isfinite()]
        total, count = total + float(finite.square().sum()), count + finite.numel()
    return (total / count) ** 0.5 if count else 0.0
