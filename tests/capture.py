"""What a CUDA graph cannot hold, watched for on a CPU: a dispatch mode that fails on it."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from speedyzero_kernels import dispatch

aten = torch.ops.aten
FORBIDDEN = {
    aten._local_scalar_dense, aten.nonzero, aten.nonzero_numpy, aten.masked_select, aten.unique_dim, aten.unique_consecutive, aten._unique,
    aten._unique2, aten.equal, aten.is_nonzero, aten.bincount, aten.histc,
}  # fmt: skip
BY_INDEX = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}


class CaptureSafety(TorchDispatchMode):
    """Raises AssertionError on an operation that waits for the device or whose result's shape depends on data.

    Under it the kernels' references run in place of the functions of numba, which only a CPU has.
    """

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __enter__(self):
        self._numba, dispatch.runs_numba = dispatch.runs_numba, lambda x: False
        return super().__enter__()

    def __exit__(self, *error):
        dispatch.runs_numba = self._numba
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        self.operations += 1
        if packet in FORBIDDEN:
            raise AssertionError(f"{packet}: a captured graph cannot hold this")
        if packet in BY_INDEX and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            raise AssertionError(f"{packet} by a mask: a captured graph cannot hold this")
        if packet is aten.repeat_interleave and "output_size" not in (kwargs or {}) and len(args) < 3 and not args[0].is_floating_point():
            raise AssertionError("repeat_interleave by a tensor: a captured graph cannot hold this")
        return func(*args, **(kwargs or {}))
