"""Which of its forms an operation runs: the Triton kernel, the plain PyTorch reference, or, of the few that have one, the numba function.

Every public function asks here.
"""

import torch
from torch import Tensor


def runs_kernel(x: Tensor) -> bool:
    """Whether an operation on `x` is a Triton kernel: on CUDA."""
    return x.is_cuda


def runs_numba(x: Tensor) -> bool:
    """Whether an operation on `x` that has a numba function runs it: on a CPU. Tensors without memory (meta, fake) take the reference."""
    return x.device.type == "cpu" and type(x) is Tensor


def board_format(x: Tensor) -> torch.memory_format:
    """How `[B, C, H, W]` tensors that go with `x` should lie in memory: channels last for the kernels, contiguous for the reference."""
    return torch.channels_last if runs_kernel(x) else torch.contiguous_format
