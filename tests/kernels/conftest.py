"""Runs each test of an operation on each of its forms: the reference, the kernel (interpreted where there is no CUDA), some on numba."""

import math

import pytest
import torch
from triton import knobs

from speedyzero_kernels import dispatch

if knobs.runtime.interpret:
    from triton.runtime import interpreter

    _patch_language = interpreter._patch_lang
    _run_grid = interpreter.GridExecutor.__call__
    _patched: set[int] = set()

    def _patch_once(fn):
        """Triton patches its language at every call of a function within a kernel, most of its time; once a launch will do."""
        if _patched and id(fn.__globals__) in _patched:
            return None
        _patched.add(id(fn.__globals__))
        return _patch_language(fn)

    def _run_grid_afresh(self, *args, **kwargs):
        _patched.clear()
        return _run_grid(self, *args, **kwargs)

    interpreter._patch_lang = _patch_once
    interpreter.GridExecutor.__call__ = _run_grid_afresh


@pytest.fixture
def poisoned():
    """Memory that is allocated but not written holds NaN or the greatest integer, so that an output left out shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def run_kernels(monkeypatch) -> str:
    """Every public function launches its Triton kernel, whatever the device. Returns where to put tensors."""
    monkeypatch.setattr(dispatch, "runs_kernel", lambda x: x.device.type != "meta")
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["reference", "kernel"])
def form(request) -> str:
    """Which form of the operations a test runs on. The tests of an operation that has a numba function add `numba`."""
    return request.param


@pytest.fixture
def device(form, monkeypatch, poisoned) -> str:
    """Where a test puts its tensors, with the form under test forced on every public function."""
    if form != "numba":
        monkeypatch.setattr(dispatch, "runs_numba", lambda x: False)
    return run_kernels(monkeypatch) if form == "kernel" else "cpu"


@pytest.fixture(params=["reference", "kernel", "native"])
def tree_device(request, monkeypatch, poisoned) -> str:
    """`device` for trees, which have three forms; `native` works on the layout of the kernels."""
    if request.param == "reference":
        monkeypatch.setattr(dispatch, "tree_layout", lambda x: "reference")
    return run_kernels(monkeypatch) if request.param == "kernel" else "cpu"


@pytest.fixture
def fenced(monkeypatch):
    """Gives every tensor of `torch.empty` a fence of 64 sevens behind it; called, asserts that no fence was written to."""
    empty, fences = torch.empty, []

    def with_fence(*shape, **options):
        count = math.prod(shape)
        whole = empty(count + 64, **options)
        whole[count:] = 7
        fences.append(whole[count:])
        return whole[:count].view(shape)

    def check():
        assert all((fence == 7).all() for fence in fences)

    monkeypatch.setattr(torch, "empty", with_fence)
    return check
