"""Which of its forms an operation runs: the plain PyTorch reference, or the Triton kernel. Every public function asks here.

The operations on trees have a third form, for a CPU: `native`.
"""

from typing import Literal

import torch
from torch import Tensor


def runs_kernel(x: Tensor) -> bool:
    """Whether an operation on `x` is a Triton kernel: on CUDA. Everywhere else it is the reference."""
    return x.is_cuda


def tree_layout(x: Tensor) -> Literal["kernel", "reference"]:
    """How trees that go with `x` lie in memory unless told: as the kernels want them, which is what `native` wants on a CPU too."""
    return "kernel" if x.device.type == "cpu" or runs_kernel(x) else "reference"


def tree_form(x: Tensor, layout: Literal["kernel", "reference"]) -> Literal["reference", "kernel", "native"]:
    """Which form an operation takes on trees of this layout that go with `x`."""
    if layout == "reference":
        return "reference"
    return "kernel" if runs_kernel(x) else "native"


def board_format(x: Tensor) -> torch.memory_format:
    """How `[B, C, H, W]` tensors that go with `x` should lie in memory: channels last, which convolutions are faster on."""
    return torch.channels_last
