"""How far two tensors are from each other, in one number that can have a bound."""

from dataclasses import asdict, dataclass

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

    def to_json(self) -> dict:
        return asdict(self)


def deviation(got: Tensor, expected: Tensor) -> Deviation:
    """Compare tensors of one shape, of any dtype and device. Raises ValueError if their shapes differ."""
    if got.shape != expected.shape:
        raise ValueError(f"shapes {tuple(got.shape)} and {tuple(expected.shape)} cannot be compared")
    a, b = got.detach().reshape(-1), expected.detach().reshape(-1)
    differ, largest, relative, bitwise = 0, 0.0, 0.0, True
    rms = None
    for mine, theirs in zip(a.split(CHUNK), b.split(CHUNK), strict=True):
        theirs, one_dtype = theirs.to(a.device), a.dtype == b.dtype
        if one_dtype and torch.equal(mine.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8)):
            continue
        rms = _rms(b) if rms is None else rms
        x, y = mine.double(), theirs.double()
        same = (x == y) | (x.isnan() & y.isnan())
        apart = torch.where(same, 0.0, (x - y).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)
        # A difference relative to 0 is infinite, and a scale that is not finite bounds nothing.
        scale = (y.abs() + rms).nan_to_num(nan=0.0, posinf=0.0)
        differ += int((~same).sum())
        largest = max(largest, float(apart.max()))
        relative = max(relative, float(torch.where(apart > 0, apart / scale, 0.0).max()))
        bitwise &= not one_dtype and bool(same.all())  # zeros of two signs are equal numbers and other bits
    return Deviation(bitwise, differ, largest, relative)


def _rms(x: Tensor) -> float:
    """Root mean square of the finite elements; 0 if there are none."""
    total, count = 0.0, 0
    for part in x.split(CHUNK):
        finite = part.double()
        finite = finite[finite.isfinite()]
        total, count = total + float(finite.square().sum()), count + finite.numel()
    return (total / count) ** 0.5 if count else 0.0
