"""Optimiser steps on flat buffers, against torch.optim.SGD and LARS written one tensor at a time in f64."""

from itertools import pairwise
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speedyzero_kernels import lars

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's NumPy, of infinities

SHAPES = ((3, 4), (4,), (2, 3, 2, 2), (), (5, 1), (1, 1))
RATES = {"lr": 0.1, "momentum_factor": 0.9, "weight_decay": 0.01, "trust_coefficient": 0.02, "trust_clip": 1.0}
LARGE = ((33, 67), (1030,), (0, 3), (2, 2), (5, 601), (7,), (1, 1), (2, 1), (3000,), (4, 512), (1,))
SIZES = [1, 2, 3, 4, 5, 7, 1023, 1024, 1025, 2049]


def buffers(shapes=SHAPES, seed=0, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    size = sum(prod(shape) for shape in shapes)
    return *(torch.randn(size, generator=g).to(device) for _ in range(3)), lars.segments(shapes, device)


def looped(
    params, grads, momentum, shapes, plain, lr, momentum_factor, weight_decay, trust_coefficient, trust_clip, max_grad_norm, eps
):
    """One tensor at a time, in Python floats."""
    device = params.device
    w, g, v = (x.double().tolist() for x in (params, grads, momentum))
    norm = sum(x * x for x in g) ** 0.5
    scale = 1.0 if max_grad_norm is None or norm <= max_grad_norm else max_grad_norm / norm
    begin = 0
    for place, shape in enumerate(shapes):
        size = prod(shape)
        span, begin = range(begin, begin + size), begin + size
        decay = weight_decay if len(shape) >= 2 else 0.0
        step = [scale * g[i] + decay * w[i] for i in span]
        rate = 1.0
        if len(shape) >= 2:
            length = sum(w[i] * w[i] for i in span) ** 0.5
            rate = trust_coefficient * length / (sum(d * d for d in step) ** 0.5 + eps) if length > 0 and place != plain else 1.0
            rate = min(rate, trust_clip)
        for i, d in zip(span, step, strict=True):
            v[i] = momentum_factor * v[i] + rate * d
            w[i] -= lr * v[i]
    return torch.tensor(w).to(device), torch.tensor(v).to(device), norm


@given(st.lists(st.lists(st.integers(0, 60), max_size=3), min_size=1, max_size=12))
def test_chunks_hold_every_element_once_and_know_their_tensor(shapes):
    chunks = lars.segments(shapes, "cpu").chunks.tolist()
    ends = [0, *(start + size for start, size, *_ in chunks)]
    assert [start for start, *_ in chunks] == ends[:-1]
    assert ends[-1] == sum(prod(shape) for shape in shapes)
    assert all(size <= 1024 and (start % 1024 == 0 or row[0] == i) for i, (start, size, *row) in enumerate(chunks))
    heads = [i for i, row in enumerate(chunks) if row[2] == i]
    assert [sum(size for _, size, *_ in chunks[a:b]) for a, b in pairwise([*heads, len(chunks)])] == [prod(shape) for shape in shapes]
    assert [chunks[i][4] for i in heads] == [len(shape) > 1 for shape in shapes]
    assert all(row[2:] == chunks[row[2]][2:] and row[2] <= i < row[2] + row[3] for i, row in enumerate(chunks))


@pytest.mark.parametrize("numel", [1, 2**20, 2**20 + 1, 8_350_000, 2**31 - 1])
def test_there_are_at_most_about_a_thousand_chunks(numel):
    length = lars._chunk_length(numel)
    assert length % 1024 == 0
    assert -(-numel // length) <= 1024
    assert length == 1024 or numel / length > 512


@given(st.lists(st.lists(st.integers(1, 4), max_size=4), min_size=1, max_size=5), st.integers(0, 2**31),
       st.sampled_from([None, 0.5, 100.0]), st.sampled_from([0.05, 1.0, 1e6]), st.sampled_from([0.0, 0.1]), st.sampled_from([1e-9, 3.0]),
       st.integers(0, 5), st.integers(0, 5), st.booleans())  # fmt: skip
@settings(max_examples=40)
def test_three_steps_are_those_of_a_loop_over_tensors(device, shapes, seed, max_norm, clip, decay, eps, zeroed, plain, tensor):
    params, _, momentum, _ = buffers(shapes, seed, device)
    parts = lars.segments(shapes, device, [plain] if plain < len(shapes) else [])
    if zeroed < len(shapes):
        params.split([prod(shape) for shape in shapes])[zeroed].zero_()
    params.requires_grad_(tensor)
    g = torch.Generator().manual_seed(seed + 1)
    rates = RATES | {"trust_clip": clip, "weight_decay": decay, "max_grad_norm": max_norm, "trust_coefficient": 0.5, "eps": eps}
    for _ in range(3):
        grads = torch.randn(params.shape, generator=g).to(device) * (seed > 0)  # no gradient: it only decays and coasts
        want_w, want_v, want_norm = looped(params.detach(), grads, momentum, shapes, plain, **rates)
        lr = torch.tensor(rates["lr"], device=device) if tensor else rates["lr"]
        norm, skipped = lars.clipped_lars_step(params, grads, momentum, parts, **rates | {"lr": lr})
        torch.testing.assert_close(momentum, want_v, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(params.detach(), want_w, rtol=1e-4, atol=1e-5)
        assert norm.item() == pytest.approx(want_norm, rel=1e-5)
        assert not skipped


@pytest.mark.parametrize("max_norm", [None, 0.7, 1e3])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_sgd_is_torchs_sgd_after_clip_grad_norm(max_norm, tensor_lr, device):
    params, _, momentum, _ = buffers(device=device)
    momentum.zero_()
    reference = torch.nn.Parameter(params.clone())
    optimiser = torch.optim.SGD([reference], lr=0.05, momentum=0.9, weight_decay=0.01)
    for step in range(5):
        grads = torch.randn(params.shape, generator=torch.Generator().manual_seed(step)).to(device)
        reference.grad = grads.clone()
        length = torch.nn.utils.clip_grad_norm_([reference], max_norm or 1e9)
        optimiser.step()
        lr = torch.tensor(0.05, device=device) if tensor_lr else 0.05
        norm, skipped = lars.sgd_step(params, grads, momentum, lr, 0.9, 0.01, max_norm)
        torch.testing.assert_close(norm, length)
        assert not skipped
    torch.testing.assert_close(params, reference.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(momentum, optimiser.state[reference]["momentum_buffer"], rtol=1e-5, atol=1e-5)


def lars_step(w, g, v, parts, **change):
    return lars.clipped_lars_step(w, g, v, parts, **RATES | change)


def sgd_step(w, g, v, parts, **change):
    return lars.sgd_step(w, g, v, **{"lr": 0.1, "momentum_factor": 0.9, "weight_decay": 0.01} | change)


either_step = pytest.mark.parametrize("step", [lars_step, sgd_step])


@either_step
@pytest.mark.parametrize(("bad", "where"), [(float("nan"), 0), (float("inf"), 13), (-float("inf"), -1), (3e38, 13)])
@pytest.mark.parametrize("max_norm", [None, 5.0])
def test_a_gradient_norm_that_is_not_finite_changes_nothing(step, bad, max_norm, where, device):
    params, grads, momentum, parts = buffers(device=device)
    grads[where] = bad
    before, copy = (params.clone(), momentum.clone()), torch.zeros_like(params, dtype=torch.bfloat16)
    norm, skipped = step(params, grads, momentum, parts, max_grad_norm=max_norm, copy=copy)
    torch.testing.assert_close(copy.float(), params, rtol=2**-7, atol=0)
    assert torch.equal(params, before[0])
    assert torch.equal(momentum, before[1])
    assert skipped.item() == 1
    assert skipped.shape == norm.shape == ()
    assert not norm.isfinite()


@either_step
def test_a_step_that_is_not_ok_changes_nothing_and_one_that_is_takes_the_same_step(step, device):
    params, grads, momentum, parts = buffers(device=device)
    before, other = ((params.clone(), momentum.clone()) for _ in range(2))
    step(other[0], grads, other[1], parts)
    assert not torch.equal(other[0], before[0])
    for ok, want in ((False, before), (True, other)):
        norm, skipped = step(params, grads, momentum, parts, ok=torch.tensor(ok, device=device))
        assert (skipped.item(), norm.isfinite().item()) == (not ok, True)
        assert torch.equal(params, want[0])
        assert torch.equal(momentum, want[1])


def forms(step, w, g, v, parts, copy, **change):
    """The kernel's and the reference's new (params, momentum, norm, skipped) and copy, from the same old ones."""
    rates = {"lr": 0.1, "momentum_factor": 0.9, "weight_decay": 0.05, "copy": copy, **change}
    if step == "clipped_lars_step":
        rates = {"segments": parts, "trust_coefficient": 0.5, "trust_clip": 0.8} | rates
    results = []
    for form in ("kernel", "reference"):
        args = [x.clone() for x in (w, g, v)]
        rates["copy"] = None if copy is None else copy.clone()
        norm, skipped = getattr(lars, f"{step}_{form}")(*args, **rates)
        assert torch.equal(args[1], g)
        results.append((args[0], args[2], norm, skipped, rates["copy"]))
    return results


def assert_same(kernel, reference):
    for ours, theirs in zip(kernel[:4], reference[:4], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)
    if kernel[4] is not None:
        # The interpreter cuts digits off where the hardware rounds to even.
        close = {"rtol": 2**-7, "atol": 0} if kernel[4].device.type == "cpu" else {}
        torch.testing.assert_close(kernel[4].float(), kernel[0].bfloat16().float(), **close, equal_nan=True)
        torch.testing.assert_close(reference[4], reference[0].bfloat16(), rtol=0, atol=0, equal_nan=True)


NATIVE = "cuda" if torch.cuda.is_available() else "cpu"


def both_steps(test):
    return pytest.mark.usefixtures("poisoned")(pytest.mark.parametrize("step", ["clipped_lars_step", "sgd_step"])(test))


@both_steps
@pytest.mark.parametrize("shapes", [LARGE, *(((size,),) for size in SIZES), *(((3,), (size, 1), (2, 2)) for size in SIZES)])
def test_the_kernel_is_the_reference_for_all_sizes(step, shapes):
    *flat, parts = buffers(shapes, 3, NATIVE)
    assert_same(*forms(step, *flat, parts, torch.zeros_like(flat[0], dtype=torch.bfloat16), max_grad_norm=3.0))


@both_steps
@pytest.mark.parametrize(("block", "length"), [(16, 16), (16, 48)])
def test_the_kernel_is_the_reference_over_many_small_blocks_and_chunks(step, block, length, monkeypatch):
    monkeypatch.setattr(lars, "_BLOCK", block)
    monkeypatch.setattr(lars, "_chunk_length", lambda numel: length)
    *flat, parts = buffers(((3, 5), (7, 90), (1,), (33, 3), (601,), (2, 4), (20, 5)), 4, NATIVE)
    assert len(parts.chunks) > block  # so that each program reads the sums in several steps
    rates = {"trust_coefficient": 1e-2, "trust_clip": 1e6} if step == "clipped_lars_step" else {}  # no rate is clipped
    assert_same(*forms(step, *flat, parts, None, max_grad_norm=5.0, **rates))


@both_steps
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38, 1e-30])
@pytest.mark.parametrize("where", [(0, 0), (0, 13), (2, 2), (2, -1)])
def test_a_parameter_or_momentum_that_is_not_finite_spoils_what_the_reference_spoils(step, bad, where):
    *flat, parts = buffers(device=NATIVE)
    flat[where[0]][where[1]] = bad
    assert_same(*forms(step, *flat, parts, torch.zeros_like(flat[0], dtype=torch.bfloat16)))


@pytest.mark.usefixtures("poisoned")
def test_tiny_huge_and_cancelling_tensors_have_the_references_rates():
    *flat, parts = buffers(((2, 2), (3, 3), (4, 4), (2, 1)), device=NATIVE)
    scales = torch.tensor([1e-30] * 4 + [1e-15] * 9 + [1e15] * 16 + [1e25] * 2, device=NATIVE)
    flat[0] *= scales  # the first and the last norm leave f32's range when squared
    assert_same(*forms("clipped_lars_step", *flat, parts, None, weight_decay=0.0))
    w = torch.full((4096,), 3.0, device=NATIVE)  # the gradient all but cancels the decay: the rate keeps its digits
    parts = lars.segments([(64, 64)], NATIVE)
    assert_same(*forms("clipped_lars_step", w, -0.5 * w + 2.0**-12, torch.zeros_like(w), parts, None, weight_decay=0.5))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("seed", range(6))
def test_a_gradient_that_cancels_the_decay_has_a_finite_rate(seed):
    g = torch.Generator().manual_seed(seed)
    w = torch.randint(1, 2**16, (200,), generator=g) * 2.0 ** torch.randint(-12, 12, (200,), generator=g)
    w = w.to(NATIVE)  # 0.375 w is exact, but not the sums of squares: |g + decay w|^2 comes out as a little more or less than 0
    parts = lars.segments([(10, 20)], NATIVE)
    kernel, reference = forms("clipped_lars_step", w, -0.375 * w, torch.zeros_like(w), parts, None, weight_decay=0.375)
    assert torch.equal(kernel[0], w)
    assert_same(kernel, reference)


@both_steps
def test_buffers_that_start_anywhere_in_memory_are_stepped_alike(step):
    g = torch.Generator().manual_seed(0)
    flat = [torch.randn(52, generator=g).to(NATIVE)[offset : offset + 47] for offset in (1, 2, 3)]
    around = [x._base.clone() for x in flat]
    parts = lars.segments(SHAPES, NATIVE)
    _, reference = forms(step, *flat, parts, None)
    rates = {"segments": parts, "trust_coefficient": 0.5, "trust_clip": 0.8} if step == "clipped_lars_step" else {}
    getattr(lars, f"{step}_kernel")(*flat, lr=0.1, momentum_factor=0.9, weight_decay=0.05, **rates)
    torch.testing.assert_close(flat[0], reference[0])
    torch.testing.assert_close(flat[2], reference[1])
    for x, old in zip(flat, around, strict=True):
        old[x.storage_offset() : x.storage_offset() + 47] = x
        assert torch.equal(x._base, old), "nothing beside it is written"
