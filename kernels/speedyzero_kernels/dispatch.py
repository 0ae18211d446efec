"""Which of its two forms an operation runs: the plain PyTorch reference, or the Triton kernel. Every public function asks here."""

import torch
from torch import Tensor


def runs_kernel(x: Tensor) -> bool:
    """Whether an operation on `x` is a Triton kernel: on CUDA. Everywhere else it is the reference."""
    return x.is_cuda


def board_format(x: Tensor) -> torch.memory_format:
    """How `[B, C, H, W]` tensors that go with `x` should lie in memory: channels last, which convolutions are faster on."""
    return torch.channels_last
