"""Which of its forms an operation runs: the Triton kernel, the plain PyTorch reference, or, of those that have one, the numba function.

Every public function asks here.
"""

from typing import Literal

import torch
from torch import Tensor


def runs_kernel(x: Tensor) -> bool:
    """Whether an operation on `x` is a Triton kernel: on CUDA."""
    return x.is_cuda


def tree_layout(x: Tensor) -> Literal["kernel", "reference"]:
    """How trees that go with `x` lie in memory unless told: as the kernels want them, which is what `native` wants on a CPU too."""
    return "kernel" if x.device.type == "cpu" or runs_kernel(x) else "reference"


def tree_form(x: Tensor, layout: Literal["kernel", "reference"]) -> Literal["reference", "kernel", "native"]:
    """Which form an operation takes on trees of this layout that go with `x`."""
    if layout == "reference":
        return "reference"
    return "kernel" if runs_kernel(x) else "native"


def runs_numba(x: Tensor) -> bool:
    """Whether an operation on `x` that has a numba function runs it: on a CPU. Tensors without memory (meta, fake) take the reference."""
    return x.device.type == "cpu" and type(x) is Tensor


def board_format(x: Tensor) -> torch.memory_format:
    """How `[B, C, H, W]` tensors that go with `x` should lie in memory: channels last, which convolutions are faster on."""
    return torch.channels_last
