"""Scalars as categories, against the published formulas, materialised targets and torch's own cross entropy."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from speedyzero_kernels import support

reals = st.floats(-1e5, 1e5, width=32)


def published_inverse(y: float, e: float = 0.001) -> float:
    root = (math.sqrt(1 + 4 * e * (abs(y) + 1 + e)) - 1) / (2 * e)
    return math.copysign(root**2 - 1, y)


def row(x: float, size: int) -> list[float]:
    """The two-hot distribution of x, one bin at a time: each bin keeps one minus its distance, if that is positive."""
    y = math.copysign(math.sqrt(abs(x) + 1) - 1, x) + 0.001 * x
    y = min(max(y, -size), size)
    return [max(0.0, 1 - abs(y - b)) for b in range(-size, size + 1)]


def test_transform_of_small_numbers_worked_by_hand():
    x = torch.tensor([0.0, 3.0, -8.0, 99.0])
    want = torch.tensor([0.0, 1.003, -2.008, 9.099])
    torch.testing.assert_close(support.transform(x), want)
    torch.testing.assert_close(support.inverse_transform(want), x, rtol=1e-6, atol=0)


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


def test_to_scalar_of_equal_logits_is_zero_and_of_a_certain_bin_is_its_scalar():
    assert support.to_scalar(torch.zeros(2, 601)).abs().max() < 1e-4
    logits = torch.full((3, 7), -1e9)
    logits[0, 0], logits[1, 3], logits[2, 5] = 0.0, 0.0, 0.0
    want = [published_inverse(-3), 0.0, published_inverse(2)]
    torch.testing.assert_close(support.to_scalar(logits), torch.tensor(want))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_to_scalar_is_the_inverse_of_the_expected_bin(dtype):
    torch.manual_seed(0)
    logits = (3 * torch.randn(5, 2, 41)).to(dtype)
    got = support.to_scalar(logits)
    assert got.dtype == torch.float32
    for i in range(5):
        for j in range(2):
            e = [math.exp(v) for v in logits[i, j].tolist()]
            mean = sum(w * b for w, b in zip(e, range(-20, 21), strict=True)) / sum(e)
            assert got[i, j].item() == pytest.approx(published_inverse(mean), rel=1e-4, abs=1e-4)


def test_to_scalar_of_logits_inside_autocast_is_not_rounded_to_bf16():
    torch.manual_seed(0)
    logits = torch.randn(4, 601)
    with torch.autocast("cpu", torch.bfloat16):
        inside = support.to_scalar(logits)
    torch.testing.assert_close(inside, support.to_scalar(logits))


def test_two_hot_of_three_worked_by_hand():
    got = support.two_hot(torch.tensor([3.0, -3.0]), 2)  # h(3) = 1.003
    torch.testing.assert_close(got, torch.tensor([[0, 0, 0, 0.997, 0.003], [0.003, 0.997, 0, 0, 0]]))


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
def test_cross_entropy_and_its_gradient_are_those_of_a_materialised_target(xs, size, seed):
    torch.manual_seed(seed)
    ours = (4 * torch.randn(len(xs), 2 * size + 1)).requires_grad_()
    theirs = ours.detach().double().requires_grad_()
    upstream = torch.randn(len(xs))
    got = support.cross_entropy(ours, torch.tensor(xs))
    rows = torch.tensor([row(x, size) for x in xs], dtype=torch.float64)
    want = functional.cross_entropy(theirs, rows, reduction="none")
    got.backward(upstream)
    want.backward(upstream.double())
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=2e-5)


def test_cross_entropy_of_equal_logits_is_the_log_of_the_bins():
    torch.testing.assert_close(
        support.cross_entropy(torch.zeros(2, 3, 601), torch.randn(2, 3)), torch.full((2, 3), math.log(601))
    )


def test_cross_entropy_passes_gradcheck_with_leading_dimensions_and_strides():
    torch.manual_seed(0)
    logits = torch.randn(3, 7, 2, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[0.0, 1.7], [-2.2, 1e6], [3.0, -1e6]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: support.cross_entropy(x.transpose(1, 2), target), logits)


def test_cross_entropy_of_large_logits_stays_finite():
    logits = torch.tensor([[1e4, -1e4, 3e4]], requires_grad=True)
    loss = support.cross_entropy(logits, torch.tensor([-1e9]))
    loss.sum().backward()
    assert loss.item() == pytest.approx(2e4)
    assert logits.grad.tolist() == [[-1.0, 0.0, 1.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cross_entropy_of_half_logits_sums_in_f32_and_returns_their_gradient(dtype):
    torch.manual_seed(0)
    half = torch.randn(4, 601).to(dtype).requires_grad_()
    full = half.detach().float().requires_grad_()
    target = torch.randn(4) * 10
    loss = support.cross_entropy(half, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, support.cross_entropy(full, target))
    loss.sum().backward()
    support.cross_entropy(full, target).sum().backward()
    assert half.grad.dtype == dtype
    torch.testing.assert_close(half.grad, full.grad.to(dtype))


def test_a_nan_target_gives_a_nan_loss_and_spoils_no_other_row():
    logits = torch.zeros(2, 5, requires_grad=True)
    loss = support.cross_entropy(logits, torch.tensor([float("nan"), 0.0]))
    loss.sum().backward()
    assert loss.isnan().tolist() == [True, False]
    torch.testing.assert_close(logits.grad[1], torch.tensor([0.2, 0.2, -0.8, 0.2, 0.2]))
    assert support.two_hot(torch.tensor([float("nan")]), 3).isnan().any()


def test_the_target_and_the_saved_logits_are_left_alone():
    logits, target = torch.randn(2, 5, requires_grad=True), torch.randn(2, requires_grad=True)
    before = logits.detach().clone()
    support.cross_entropy(logits, target).sum().backward()
    assert target.grad is None
    assert torch.equal(logits.detach(), before)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("x", lambda: support.transform(torch.arange(3))),
        ("y", lambda: support.inverse_transform(torch.arange(3))),
        ("logits", lambda: support.to_scalar(torch.zeros(2, 4))),
        ("logits", lambda: support.to_scalar(torch.zeros(2, 1))),
        ("logits", lambda: support.to_scalar(torch.zeros(()))),
        ("logits", lambda: support.to_scalar(torch.zeros(2, 5, dtype=torch.int64))),
        ("size", lambda: support.two_hot(torch.zeros(2), 0)),
        ("x", lambda: support.two_hot(torch.zeros(2, dtype=torch.int64), 3)),
        ("logits", lambda: support.cross_entropy(torch.zeros(2, 4), torch.zeros(2))),
        ("target", lambda: support.cross_entropy(torch.zeros(2, 5), torch.zeros(2, 1))),
        ("target", lambda: support.cross_entropy(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64))),
        ("target", lambda: support.cross_entropy(torch.zeros(2, 5), torch.zeros(2, device="meta"))),
    ],
)
def test_a_bad_argument_is_named(name, call):
    with pytest.raises(ValueError, match=f"^{name}:"):
        call()


def test_nothing_waits_for_a_value_or_makes_a_tensor_on_another_device():
    logits = torch.zeros(4, 601, device="meta", requires_grad=True)  # meta tensors have no values to wait for
    target = torch.zeros(4, device="meta")
    loss = support.cross_entropy(logits, target)
    loss.sum().backward()
    for out in (loss, logits.grad, support.to_scalar(logits), support.two_hot(target, 300)):
        assert out.device.type == "meta"
