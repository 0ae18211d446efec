"""Which of its two forms an operation runs: the plain PyTorch reference, or the Triton kernel. Every public function asks here."""

from torch import Tensor


def runs_kernel(x: Tensor) -> bool:
    """Whether an operation on `x` is a Triton kernel: on CUDA. Everywhere else it is the reference."""
    return x.is_cuda
