"""Scalars as categories, against the published formulas, materialised targets and torch's own cross entropy."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from speedyzero_kernels import support

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's NumPy, of infinities

NATIVE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
reals = st.floats(-1e5, 1e5, width=32)


def published_inverse(y: float, e: float = 0.001) -> float:
    root = (math.sqrt(1 + 4 * e * (abs(y) + 1 + e)) - 1) / (2 * e)
    return math.copysign(root**2 - 1, y)


def row(x: float, size: int) -> list[float]:
    """The two-hot distribution of x, one bin at a time: each bin keeps one minus its distance, if that is positive."""
    y = math.copysign(math.sqrt(abs(x) + 1) - 1, x) + 0.001 * x
    y = min(max(y, -size), size)
    return [max(0.0, 1 - abs(y - b)) for b in range(-size, size + 1)]


def test_transform_keeps_infinities_and_the_digits_of_tiny_numbers():
    inf = float("inf")
    assert support.transform(torch.tensor([inf, -inf])).tolist() == [inf, -inf]
    x = torch.tensor([1e-20, -1e-12])
    torch.testing.assert_close(support.transform(x), x * 0.501, rtol=1e-6, atol=0)
    torch.testing.assert_close(support.inverse_transform(support.transform(x)), x, rtol=1e-6, atol=0)


@given(reals)
def test_inverse_transform_undoes_transform(x):
    wide, narrow = torch.tensor(x, dtype=torch.float64), torch.tensor(x)
    torch.testing.assert_close(support.inverse_transform(support.transform(wide)), wide, rtol=1e-13, atol=0)
    torch.testing.assert_close(support.inverse_transform(support.transform(narrow)), narrow, rtol=2e-6, atol=1e-44)


@given(st.floats(-300, 300))
def test_inverse_transform_is_the_published_closed_form(y):
    got = support.inverse_transform(torch.tensor(y, dtype=torch.float64)).item()
    assert got == pytest.approx(published_inverse(y), rel=1e-9, abs=1e-9)


def test_transform_and_its_inverse_can_be_differentiated():
    x = torch.tensor([-4.0, -0.5, 0.3, 20.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(support.transform, x)
    assert torch.autograd.gradcheck(support.inverse_transform, x)


def test_to_scalar_of_equal_logits_is_zero_and_of_a_certain_bin_is_its_scalar(device):
    assert support.to_scalar(torch.zeros(2, 601, device=device)).abs().max() < 1e-4
    logits = torch.full((3, 7), -1e9, device=device)
    logits[0, 0], logits[1, 3], logits[2, 5] = 0.0, 0.0, 0.0
    want = [published_inverse(-3), 0.0, published_inverse(2)]
    torch.testing.assert_close(support.to_scalar(logits).cpu(), torch.tensor(want))


def test_to_scalar_of_logits_inside_autocast_is_not_rounded_to_bf16(device):
    torch.manual_seed(0)
    logits = torch.randn(4, 601).to(device)
    with torch.autocast(device, torch.bfloat16):
        inside = support.to_scalar(logits)
    torch.testing.assert_close(inside, support.to_scalar(logits))


def test_two_hot_past_the_ends_is_the_last_bin():
    got = support.two_hot(torch.tensor([1e9, -1e9, float("inf"), -float("inf")]), 3)
    assert got.argmax(-1).tolist() == [6, 0, 6, 0]
    assert got.max(-1).values.tolist() == [1.0] * 4
    just_past = support.two_hot(torch.tensor([5.0, -5.0]), 1)  # h(5) = 1.454
    assert just_past.tolist() == [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=5), st.integers(1, 40))
@settings(deadline=None)
def test_two_hot_shares_one_between_the_two_nearest_bins(xs, size):
    got = support.two_hot(torch.tensor(xs, dtype=torch.float64), size)
    torch.testing.assert_close(got, torch.tensor([row(x, size) for x in xs], dtype=torch.float64), rtol=0, atol=1e-9)


@given(st.lists(reals, min_size=1, max_size=6), st.integers(1, 30), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_cross_entropy_and_its_gradient_are_those_of_a_materialised_target(device, xs, size, seed):
    torch.manual_seed(seed)
    ours = (4 * torch.randn(len(xs), 2 * size + 1)).to(device).requires_grad_()
    theirs = ours.detach().cpu().double().requires_grad_()
    upstream = torch.randn(len(xs))
    before = ours.detach().clone()
    got = support.cross_entropy(ours, torch.tensor(xs).to(device))
    rows = torch.tensor([row(x, size) for x in xs], dtype=torch.float64)
    want = functional.cross_entropy(theirs, rows, reduction="none")
    got.backward(upstream.to(device))
    want.backward(upstream.double())
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.grad.cpu().double(), theirs.grad, rtol=1e-4, atol=2e-5)
    assert torch.equal(ours.detach(), before)


def test_cross_entropy_passes_gradcheck_with_leading_dimensions(device):
    torch.manual_seed(0)
    logits = torch.randn(3, 2, 7, dtype=torch.float64).to(device).requires_grad_()
    target = torch.tensor([[0.0, 1.7], [-2.2, 1e6], [3.0, -1e6]], dtype=torch.float64).to(device)
    assert torch.autograd.gradcheck(lambda x: support.cross_entropy(x, target), logits)


def test_large_logits_give_finite_results(device):
    extreme = torch.tensor([[3e4, 3e4, -3e4], [-3e4, -3e4, -3e4]], device=device)
    torch.testing.assert_close(support.to_scalar(extreme).cpu(), torch.tensor([published_inverse(-0.5), 0.0]))
    logits = torch.tensor([[1e4, -1e4, 3e4]], device=device, requires_grad=True)
    loss = support.cross_entropy(logits, torch.tensor([-1e9], device=device))
    loss.sum().backward()
    assert loss.item() == pytest.approx(2e4)
    assert logits.grad.tolist() == [[-1.0, 0.0, 1.0]]


def both(op, reference, logits, *rest):
    """The kernel's and the reference's result, and gradient of the logits for an upstream gradient of both signs."""
    results = []
    for f in (op, reference):
        x = logits.clone().requires_grad_()
        out = f(x, *rest)
        upstream = torch.linspace(-1, 2, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
        out.backward(upstream)
        results.append((out.detach(), x.grad))
    return results


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """Of an output in this dtype. The interpreter cuts digits off bf16 where the hardware rounds."""
    return {
        torch.float64: {"rtol": 1e-12, "atol": 1e-12},
        torch.float32: {"rtol": 1e-5, "atol": 5e-6},
        torch.bfloat16: {"rtol": 2**-7, "atol": 1e-6},
        torch.float16: {"rtol": 2**-10, "atol": 1e-6},
    }[dtype]


SHAPES = [(3,), (1, 3), (2, 5), (5, 1, 31), (2, 33), (1, 511), (2, 513), (3, 2, 601), (1, 1023), (1, 1025), (1, 4095)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels_are_the_reference_for_all_shapes(dtype, shape):
    torch.manual_seed(0)
    logits = (3 * torch.randn(shape)).to(NATIVE, dtype)
    target = torch.randn(shape[:-1]).to(NATIVE, FLOATS[(FLOATS.index(dtype) + SHAPES.index(shape)) % 4]) * 20  # of any dtype, too
    got, want = support.to_scalar_kernel(logits), support.to_scalar_reference(logits)
    scale = 1 if dtype == torch.float64 else shape[-1]  # sums of so many bins cancel
    torch.testing.assert_close(got, want, rtol=tolerance(want.dtype)["rtol"], atol=scale * 1e-6)
    (loss, grad), (want_loss, want_grad) = both(support.cross_entropy_kernel, support.cross_entropy_reference, logits, target)
    torch.testing.assert_close(loss, want_loss, **tolerance(want_loss.dtype))
    torch.testing.assert_close(grad, want_grad, **tolerance(dtype))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("at_once", [2, 4])
@pytest.mark.parametrize(("rows", "bins"), [(1, 5), (2, 601), (7, 601), (7, 5)])
def test_a_program_may_take_several_rows(at_once, rows, bins, monkeypatch):
    torch.manual_seed(1)
    logits, target = torch.randn(rows, bins).to(NATIVE), torch.randn(rows).to(NATIVE) * 5
    monkeypatch.setattr(support, "_rows_at_once", lambda rows, bins: at_once)
    torch.testing.assert_close(support.to_scalar_kernel(logits), support.to_scalar_reference(logits), rtol=1e-5, atol=bins * 1e-6)
    together = both(support.cross_entropy_kernel, support.cross_entropy_reference, logits, target)
    for ours, theirs in zip(*together, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance(torch.float32))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("rows", [1, 3])
def test_no_kernel_writes_past_its_rows(rows, monkeypatch):
    monkeypatch.setattr(support, "_rows_at_once", lambda rows, bins: 4)
    logits, target = torch.randn(rows, 7).to(NATIVE), torch.randn(rows).to(NATIVE)
    scalar, loss, norm, upstream = (torch.full((rows + 5,), 9.0, device=NATIVE) for _ in range(4))
    grad = torch.full((rows + 5, 7), 9.0, device=NATIVE)
    support._launch(support._to_scalar_kernel, logits, scalar, rows)
    support._launch(support._loss_kernel, logits, target, loss, norm, rows)
    support._launch(support._grad_kernel, logits, target, norm, upstream, grad, rows, 1)
    for x in (scalar, loss, norm, grad):
        assert (x[rows:] == 9).all()
        assert not (x[:rows] == 9).any()


def test_only_many_short_rows_share_a_program():
    assert [support._rows_at_once(rows, 601) for rows in (1, 4104, 8191, 12288, 16416, 10**6)] == [1, 1, 1, 2, 4, 4]
    assert support._rows_at_once(10**6, 641) == 1


INF, NAN = float("inf"), float("nan")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_logits_and_targets_that_are_not_finite_give_what_the_reference_gives(dtype):
    rows = [
        [-INF, 1.0, 2.0, -1.0, -INF], [-INF, -INF, 0.5, -INF, -INF], [-INF] * 5, [INF, 0.0, 1.0, 0.0, 0.0], [INF] * 5,
        [NAN, 0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0, NAN], [NAN] * 5, [0.5, 1.0, 2.0, 3.0, 4.0],
    ]  # fmt: skip
    targets = [0.0, 0.7, -1.6, INF, -INF, NAN, 1e30]
    logits = torch.tensor([row for row in rows for _ in targets], dtype=dtype, device=NATIVE)
    target = torch.tensor(targets * len(rows), device=NATIVE)
    torch.testing.assert_close(support.to_scalar_kernel(logits), support.to_scalar_reference(logits), rtol=1e-5, atol=1e-5, equal_nan=True)
    kernel, reference = both(support.cross_entropy_kernel, support.cross_entropy_reference, logits, target)
    for ours, theirs in zip(kernel, reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-6, equal_nan=True)


def test_the_upstream_gradient_may_have_any_strides(device):
    torch.manual_seed(3)
    values, target, weight = torch.randn(3, 4, 5).to(device), torch.randn(3, 4).to(device), torch.randn(4, 3).to(device)
    one = torch.ones((), device=device).expand(3, 4)
    for upstream in (weight.t(), one):
        grads = []
        for form in (upstream, upstream.contiguous()):
            logits = values.clone().requires_grad_()
            support.cross_entropy(logits, target).backward(form)
            grads.append(logits.grad)
        assert torch.equal(*grads)


def test_no_rows_give_no_results(device):
    logits, target = torch.zeros(2, 0, 5, device=device, requires_grad=True), torch.zeros(2, 0, device=device)
    assert support.to_scalar(logits.detach()).shape == (2, 0)
    loss = support.cross_entropy(logits, target)
    assert loss.shape == (2, 0)
    loss.sum().backward()
    assert logits.grad.shape == (2, 0, 5)


def test_to_scalar_can_be_differentiated_whatever_the_device(device):
    torch.manual_seed(4)
    logits = torch.randn(2, 5, dtype=torch.float64).to(device).requires_grad_()
    assert torch.autograd.gradcheck(support.to_scalar, logits)
    with torch.no_grad():
        assert not support.to_scalar(logits).requires_grad
