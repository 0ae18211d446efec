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


def test_to_scalar_of_equal_logits_is_zero_and_of_a_certain_bin_is_its_scalar(device):
    assert support.to_scalar(torch.zeros(2, 601, device=device)).abs().max() < 1e-4
    logits = torch.full((3, 7), -1e9, device=device)
    logits[0, 0], logits[1, 3], logits[2, 5] = 0.0, 0.0, 0.0
    want = [published_inverse(-3), 0.0, published_inverse(2)]
    torch.testing.assert_close(support.to_scalar(logits).cpu(), torch.tensor(want))


def test_to_scalar_of_large_logits_stays_finite(device):
    logits = torch.tensor([[3e4, 3e4, -3e4], [-3e4, -3e4, -3e4]], device=device)
    torch.testing.assert_close(support.to_scalar(logits).cpu(), torch.tensor([published_inverse(-0.5), 0.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_to_scalar_is_the_inverse_of_the_expected_bin(dtype, device):
    torch.manual_seed(0)
    logits = (3 * torch.randn(5, 2, 41)).to(device, dtype)
    got = support.to_scalar(logits)
    assert got.dtype == torch.float32
    for i in range(5):
        for j in range(2):
            e = [math.exp(v) for v in logits[i, j].tolist()]
            mean = sum(w * b for w, b in zip(e, range(-20, 21), strict=True)) / sum(e)
            assert got[i, j].item() == pytest.approx(published_inverse(mean), rel=1e-4, abs=1e-4)


def test_to_scalar_of_logits_inside_autocast_is_not_rounded_to_bf16(device):
    torch.manual_seed(0)
    logits = torch.randn(4, 601).to(device)
    with torch.autocast(device, torch.bfloat16):
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
def test_cross_entropy_and_its_gradient_are_those_of_a_materialised_target(device, xs, size, seed):
    torch.manual_seed(seed)
    ours = (4 * torch.randn(len(xs), 2 * size + 1)).to(device).requires_grad_()
    theirs = ours.detach().cpu().double().requires_grad_()
    upstream = torch.randn(len(xs))
    got = support.cross_entropy(ours, torch.tensor(xs).to(device))
    rows = torch.tensor([row(x, size) for x in xs], dtype=torch.float64)
    want = functional.cross_entropy(theirs, rows, reduction="none")
    got.backward(upstream.to(device))
    want.backward(upstream.double())
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.grad.cpu().double(), theirs.grad, rtol=1e-4, atol=2e-5)


def test_cross_entropy_of_equal_logits_is_the_log_of_the_bins(device):
    got = support.cross_entropy(torch.zeros(2, 3, 601, device=device), torch.randn(2, 3).to(device))
    torch.testing.assert_close(got.cpu(), torch.full((2, 3), math.log(601)))


def test_cross_entropy_passes_gradcheck_with_leading_dimensions(device):
    torch.manual_seed(0)
    logits = torch.randn(3, 2, 7, dtype=torch.float64).to(device).requires_grad_()
    target = torch.tensor([[0.0, 1.7], [-2.2, 1e6], [3.0, -1e6]], dtype=torch.float64).to(device)
    assert torch.autograd.gradcheck(lambda x: support.cross_entropy(x, target), logits)


def test_cross_entropy_of_large_logits_stays_finite(device):
    logits = torch.tensor([[1e4, -1e4, 3e4]], device=device, requires_grad=True)
    loss = support.cross_entropy(logits, torch.tensor([-1e9], device=device))
    loss.sum().backward()
    assert loss.item() == pytest.approx(2e4)
    assert logits.grad.tolist() == [[-1.0, 0.0, 1.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cross_entropy_of_half_logits_sums_in_f32_and_returns_their_gradient(dtype, device):
    torch.manual_seed(0)
    half = torch.randn(4, 601).to(device, dtype).requires_grad_()
    full = half.detach().float().requires_grad_()
    target = torch.randn(4).to(device) * 10
    loss = support.cross_entropy(half, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, support.cross_entropy(full, target))
    loss.sum().backward()
    support.cross_entropy(full, target).sum().backward()
    assert half.grad.dtype == dtype
    torch.testing.assert_close(half.grad, full.grad.to(dtype))


def test_a_nan_target_gives_a_nan_loss_and_spoils_no_other_row(device):
    logits = torch.zeros(2, 5, device=device, requires_grad=True)
    loss = support.cross_entropy(logits, torch.tensor([float("nan"), 0.0], device=device))
    loss.sum().backward()
    assert loss.isnan().tolist() == [True, False]
    torch.testing.assert_close(logits.grad[1].cpu(), torch.tensor([0.2, 0.2, -0.8, 0.2, 0.2]))
    assert support.two_hot(torch.tensor([float("nan")]), 3).isnan().any()


def test_the_target_and_the_saved_logits_are_left_alone(device):
    logits, target = torch.randn(2, 5, device=device, requires_grad=True), torch.randn(2, device=device, requires_grad=True)
    before = logits.detach().clone()
    support.cross_entropy(logits, target).sum().backward()
    assert target.grad is None
    assert torch.equal(logits.detach(), before)


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
    target = torch.randn(shape[:-1]).to(NATIVE) * 20
    got, want = support.to_scalar_kernel(logits), support.to_scalar_reference(logits)
    scale = 1 if dtype == torch.float64 else shape[-1]  # sums of so many bins cancel
    torch.testing.assert_close(got, want, rtol=tolerance(want.dtype)["rtol"], atol=scale * 1e-6)
    (loss, grad), (want_loss, want_grad) = both(support.cross_entropy_kernel, support.cross_entropy_reference, logits, target)
    torch.testing.assert_close(loss, want_loss, **tolerance(want_loss.dtype))
    torch.testing.assert_close(grad, want_grad, **tolerance(dtype))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("at_once", [2, 4])
@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("bins", [5, 601])
def test_a_program_may_take_several_rows(at_once, rows, bins, monkeypatch):
    torch.manual_seed(1)
    logits, target = torch.randn(rows, bins).to(NATIVE), torch.randn(rows).to(NATIVE) * 5
    alone = both(support.cross_entropy_kernel, support.cross_entropy_reference, logits, target)
    scalar = support.to_scalar_kernel(logits)
    monkeypatch.setattr(support, "_rows_at_once", lambda rows, bins: at_once)
    together = both(support.cross_entropy_kernel, support.cross_entropy_reference, logits, target)
    torch.testing.assert_close(support.to_scalar_kernel(logits), scalar)
    for ours, theirs in zip((*together[0], *alone[0]), (*together[1], *alone[1]), strict=True):
        torch.testing.assert_close(ours, theirs)


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


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("target_dtype", FLOATS)
def test_a_target_of_any_floating_dtype_will_do(dtype, target_dtype):
    torch.manual_seed(2)
    logits, target = torch.randn(3, 7).to(NATIVE, dtype), torch.tensor([0.3, -4.6, 2.7]).to(NATIVE, target_dtype)
    kernel, reference = both(support.cross_entropy_kernel, support.cross_entropy_reference, logits, target)
    for ours, theirs in zip(kernel, reference, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance(ours.dtype))


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
    torch.testing.assert_close(
        support.to_scalar_kernel(logits), support.to_scalar_reference(logits), rtol=1e-5, atol=1e-5, equal_nan=True
    )
    kernel, reference = both(support.cross_entropy_kernel, support.cross_entropy_reference, logits, target)
    for ours, theirs in zip(kernel, reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-6, equal_nan=True)


@given(st.lists(st.one_of(st.floats(width=32), st.integers(-40, 40).map(float)), min_size=1, max_size=5), st.integers(1, 9))
@settings(max_examples=60)
def test_the_two_bins_of_the_kernel_are_those_of_two_hot(poisoned, xs, size):
    target = torch.tensor(xs).to(NATIVE)
    logits = torch.zeros(len(xs), 2 * size + 1, device=NATIVE, requires_grad=True)
    support.cross_entropy_kernel(logits, target).sum().backward()
    softmax = 1 / (2 * size + 1)
    torch.testing.assert_close(softmax - logits.grad, support.two_hot(target, size), rtol=1e-5, atol=1e-5, equal_nan=True)


def test_the_upstream_gradient_may_have_any_strides(device):
    torch.manual_seed(3)
    values, target, weight = torch.randn(3, 4, 5).to(device), torch.randn(3, 4).to(device), torch.randn(4, 3).to(device)
    grads = []
    for upstream in (weight.t(), weight.t().contiguous(), torch.ones((), device=device).expand(3, 4), torch.ones(3, 4, device=device)):
        logits = values.clone().requires_grad_()
        support.cross_entropy(logits, target).backward(upstream)
        grads.append(logits.grad)
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[2], grads[3])
    logits = values.clone().requires_grad_()
    support.cross_entropy(logits, target)[:, ::2].sum().backward()
    assert torch.equal(logits.grad[:, ::2], grads[2][:, ::2])
    assert not logits.grad[:, 1::2].any()


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


def test_rows_lie_where_they_lie_in_memory_and_nothing_else_is_written(device):
    torch.manual_seed(5)
    store = torch.randn(1 + 4 * 7).to(device)
    logits, target = store[1:].view(4, 7), torch.randn(5).to(device)[1:]
    torch.testing.assert_close(support.to_scalar(logits), support.to_scalar(logits.clone()))
    torch.testing.assert_close(support.cross_entropy(logits, target), support.cross_entropy(logits.clone(), target.clone()))


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("x", lambda: support.transform(torch.arange(3))),
        ("y", lambda: support.inverse_transform(torch.arange(3))),
        ("logits", lambda: support.to_scalar(torch.zeros(2, 4))),
        ("logits", lambda: support.to_scalar(torch.zeros(2, 1))),
        ("logits", lambda: support.to_scalar(torch.zeros(()))),
        ("logits", lambda: support.to_scalar(torch.zeros(2, 5, dtype=torch.int64))),
        ("logits", lambda: support.to_scalar(torch.zeros(2, 4097))),
        ("logits", lambda: support.to_scalar(torch.zeros(5, 2).t())),
        ("size", lambda: support.two_hot(torch.zeros(2), 0)),
        ("x", lambda: support.two_hot(torch.zeros(2, dtype=torch.int64), 3)),
        ("logits", lambda: support.cross_entropy(torch.zeros(2, 4), torch.zeros(2))),
        ("logits", lambda: support.cross_entropy(torch.zeros(2, 4097), torch.zeros(2))),
        ("logits", lambda: support.cross_entropy(torch.zeros(3, 2, 5).transpose(0, 1), torch.zeros(2, 3))),
        ("target", lambda: support.cross_entropy(torch.zeros(2, 3, 5), torch.zeros(3, 2).t())),
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
