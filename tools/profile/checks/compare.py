"""How far two tensors are from each other, in one number that can have a bound."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Elements compared at once: in float64 a complete ring would not fit.
CHUNK = 2**24


@dataclass(frozen=True)
class Deviation:
    """Of a tensor from what was expected, over all elements."""

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


def deviation(got: Tensor, expected: Tensor) -> Deviation:
    """Compare tensors of one shape, of any dtype and device. Raises ValueError if their shapes differ."""
    if got.shape != expected.shape:
        raise ValueError(f"shapes {tuple(got.shape)} and {tuple(expected.shape)} cannot be compared")
    differ, largest, relative, bitwise, rms = 0, 0.0, 0.0, True, None
    mine, theirs = (x.detach().reshape(-1).split(CHUNK) for x in (got, expected))
    for a, b in zip(mine, theirs, strict=True):
        b, one_dtype = b.to(a.device), a.dtype == b.dtype
        if one_dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)):
            continue
        rms = _rms(theirs) if rms is None else rms
        x, y = a.double(), b.double()
        same = (x == y) | (x.isnan() & y.isnan())
        apart = torch.where(same, 0.0, (x - y).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)
        # A difference relative to 0 is infinite, and a scale that is not finite bounds nothing.
        scale = (y.abs() + rms).nan_to_num(nan=0.0, posinf=0.0)
        differ += int((~same).sum())
        largest = max(largest, float(apart.max()))
        relative = max(relative, float(torch.where(apart > 0, apart / scale, 0.0).max()))
        bitwise &= not one_dtype and bool(same.all())  # zeros of two signs are equal numbers and other bits
    return Deviation(bitwise, differ, largest, relative)


def _rms(parts: tuple[Tensor, ...]) -> float:
    """Root mean square of the finite elements; 0 if there are none."""
    finite = [part.double()[part.isfinite()] for part in parts]
    count = sum(part.numel() for part in finite)
    return (sum(float(part.square().sum()) for part in finite) / count) ** 0.5 if count else 0.0
