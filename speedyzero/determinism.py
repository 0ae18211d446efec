"""`--deterministic`: PyTorch refuses whatever may give other numbers in another run of the same seed.

On a CPU nothing that a run does is of that kind. On CUDA cuDNN's deterministic algorithms are always on (`graph.Graphs`); this adds
those of PyTorch's own operations, and memory of its own for cuBLAS. Its price on a GPU was not measured yet.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """The mode within the block, as it was after it. Begin it before the first matrix product on CUDA: cuBLAS reads its setting then."""
    if not wanted:  # and not a call to say so: that would import PyTorch's compiler, a second or two
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Every tensor is written before it is read: the tests poison what is not.
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
