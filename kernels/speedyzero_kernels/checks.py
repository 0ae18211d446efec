"""The checks that every public function makes of its arguments, with messages that begin with the argument's name."""

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def tensor(
    name: str,
    x: Tensor,
    shape: tuple[int | str, ...],
    dtypes: torch.dtype | tuple[torch.dtype, ...],
    device: torch.device | None = None,
    *,
    any_strides: bool = False,
) -> None:
    """Raise ValueError unless `x` is a contiguous tensor of this shape, of one of these dtypes, on this device.

    A string in `shape` stands for any size and is printed in its place; `any_strides` lets through what is not contiguous.
    """
    dtypes = (dtypes,) if isinstance(dtypes, torch.dtype) else dtypes
    # The usual case first: on a CPU these checks are a large part of an operation on a few roots.
    if x.shape == shape and x.dtype in dtypes and (device is None or x.device == device) and (any_strides or x.is_contiguous()):
        return
    fits = x.ndim == len(shape) and all(isinstance(want, str) or have == want for have, want in zip(x.shape, shape, strict=True))
    if not fits or x.dtype not in dtypes:
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        have = f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
        raise ValueError(f"{name}: expected {kinds} [{', '.join(map(str, shape))}], got {have}")
    if device is not None and x.device != device:
        raise ValueError(f"{name}: expected on {device}, got on {x.device}")
    if not any_strides and not x.is_contiguous():
        raise ValueError(f"{name}: must be contiguous, got strides {list(x.stride())} for shape {list(x.shape)}")


def at_least(name: str, number: int, least: int) -> None:
    """Raise ValueError unless `number` is `least` or more."""
    if number < least:
        raise ValueError(f"{name}: must be at least {least}, got {number}")


def at_most(name: str, number: int, most: int) -> None:
    """Raise ValueError unless `number` is `most` or less."""
    if number > most:
        raise ValueError(f"{name}: must be at most {most}, got {number}")
