"""What a run asks of the CPU and of the C library before it begins: threads, memory that is kept, whether bf16 pays."""

from __future__ import annotations

import ctypes
import os
import sys

import torch

from speedyzero.torchrun import on_this_machine

# glibc's names for the parameters of mallopt (malloc.h).
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
NEVER_TRIM = 2**31 - 1

MAX_CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
"""The environment's name for how many hardware queues the streams of a process are spread over: 8 by default, at most 32."""


def before_cuda() -> None:
    """Ask CUDA for a queue a stream, unless the user asked for a number: call it before anything asks CUDA whether there is a GPU.

    Streams that share a queue wait for each other: the emulators' branch of an iteration for the kernels beside it.
    """
    os.environ.setdefault(MAX_CONNECTIONS, "32")


def prepare(threads: int) -> None:
    """Set PyTorch's CPU threads and keep freed memory in the process: call it once, before anything large is allocated."""
    torch.set_num_threads(threads)
    keep_memory()


def keep_memory() -> bool:
    """Tell glibc's malloc not to give large blocks back to the system; returns whether it took that (False on another C library).

    By default a block over 32 MiB at most is mapped again for each use, and the kernel clears it page by page: a batch of observations
    cost 29,000 page faults.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER_TRIM))


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 by itself (AVX512-BF16 or AMX); elsewhere PyTorch emulates it, and fp32 is faster."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def usable_cores() -> int:
    """Cores that this process may run on, shared by the ranks on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // on_this_machine())
