"""Optimiser steps on flat buffers, against torch.optim.SGD and LARS written one tensor at a time in f64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speedyzero_kernels import lars

SHAPES = ((3, 4), (4,), (2, 3, 2, 2), (), (5, 1), (1, 1))
RATES = {"lr": 0.1, "momentum_factor": 0.9, "weight_decay": 0.01, "trust_coefficient": 0.02, "trust_clip": 1.0}


def buffers(shapes=SHAPES, seed=0):
    g = torch.Generator().manual_seed(seed)
    parts = lars.segments(shapes, "cpu")
    size = parts.tensor.shape[0]
    return *(torch.randn(size, generator=g) for _ in range(3)), parts


def looped(params, grads, momentum, shapes, lr, momentum_factor, weight_decay, trust_coefficient, trust_clip,
           max_grad_norm=None, eps=1e-9):  # fmt: skip
    """One tensor at a time, in Python floats."""
    w, g, v = (x.double().tolist() for x in (params, grads, momentum))
    norm = sum(x * x for x in g) ** 0.5
    scale = 1.0 if max_grad_norm is None or norm <= max_grad_norm else max_grad_norm / norm
    begin = 0
    for shape in shapes:
        size = 1
        for d in shape:
            size *= d
        span, begin = range(begin, begin + size), begin + size
        decay = weight_decay if len(shape) >= 2 else 0.0
        step = [scale * g[i] + decay * w[i] for i in span]
        rate = 1.0
        if len(shape) >= 2:
            length = sum(w[i] * w[i] for i in span) ** 0.5
            rate = trust_coefficient * length / (sum(d * d for d in step) ** 0.5 + eps) if length > 0 else 1.0
            rate = min(rate, trust_clip)
        for i, d in zip(span, step, strict=True):
            v[i] = momentum_factor * v[i] + rate * d
            w[i] -= lr * v[i]
    return torch.tensor(w), torch.tensor(v), norm


def test_segments_lie_back_to_back():
    parts = lars.segments([(2, 3), (4,), (), torch.Size([1, 2])], "cpu")
    assert parts.start.tolist() == [0, 6, 10, 11]
    assert parts.size.tolist() == [6, 4, 1, 2]
    assert parts.tensor.tolist() == [0] * 6 + [1] * 4 + [2] + [3] * 2
    assert parts.is_matrix.tolist() == [True, False, False, True]


def test_one_matrix_and_one_bias_worked_by_hand():
    # |w| = 5, |g| = 10: lambda = 0.1 * 5 / 10 = 0.05; the bias has lambda 1
    params, grads = torch.tensor([3.0, 4.0, 7.0]), torch.tensor([6.0, 8.0, 2.0])
    momentum = torch.tensor([1.0, 0.0, 1.0])
    parts = lars.segments([(1, 2), (1,)], "cpu")
    norm, skipped = lars.clipped_lars_step(params, grads, momentum, parts, 0.5, 0.9, 0.0, 0.1, 1.0)
    torch.testing.assert_close(momentum, torch.tensor([0.9 + 0.3, 0.4, 0.9 + 2.0]))
    torch.testing.assert_close(params, torch.tensor([3 - 0.6, 4 - 0.2, 7 - 1.45]))
    assert norm.item() == pytest.approx(104**0.5)
    assert not skipped


def test_the_trust_ratio_is_clipped():
    params, grads, momentum = torch.tensor([30.0, 40.0]), torch.tensor([0.3, 0.4]), torch.zeros(2)
    parts = lars.segments([(1, 2)], "cpu")
    lars.clipped_lars_step(params, grads, momentum, parts, 1.0, 0.9, 0.0, 1.0, 0.25)  # ratio 100, clipped to 0.25
    torch.testing.assert_close(momentum, torch.tensor([0.075, 0.1]))


@pytest.mark.parametrize(("clip", "rate"), [(1.0, 1.0), (7.0, 1.0), (0.5, 0.5)])
def test_a_matrix_of_zeros_learns_at_the_plain_rate(clip, rate):
    params, grads, momentum = torch.zeros(4), torch.ones(4), torch.zeros(4)
    lars.clipped_lars_step(params, grads, momentum, lars.segments([(2, 2)], "cpu"), 1.0, 0.9, 0.1, 1e-3, clip)
    assert params.tolist() == [-rate] * 4


@given(st.lists(st.lists(st.integers(1, 4), max_size=4), min_size=1, max_size=5), st.integers(0, 2**31),
       st.sampled_from([None, 0.5, 100.0]), st.sampled_from([0.05, 1.0, 1e6]), st.sampled_from([0.0, 0.1]),
       st.integers(0, 5))  # fmt: skip
@settings(deadline=None, max_examples=80)
def test_three_steps_are_those_of_a_loop_over_tensors(shapes, seed, max_norm, clip, decay, zeroed):
    params, _, momentum, parts = buffers(shapes, seed)
    params[parts.tensor == zeroed] = 0
    g = torch.Generator().manual_seed(seed + 1)
    rates = RATES | {"trust_clip": clip, "weight_decay": decay, "max_grad_norm": max_norm, "trust_coefficient": 0.5}
    for _ in range(3):
        grads = torch.randn(params.shape, generator=g)
        want_w, want_v, want_norm = looped(params, grads, momentum, shapes, **rates)
        norm, skipped = lars.clipped_lars_step(params, grads, momentum, parts, **rates)
        torch.testing.assert_close(momentum, want_v, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(params, want_w, rtol=1e-4, atol=1e-5)
        assert norm.item() == pytest.approx(want_norm, rel=1e-5)
        assert not skipped


def test_no_matrix_at_all_is_plain_momentum_without_decay():
    params, grads, momentum, parts = buffers(((3,), (2,)))
    want = params - 0.1 * (0.9 * momentum + grads)
    lars.clipped_lars_step(params, grads, momentum, parts, **RATES)
    torch.testing.assert_close(params, want)


@pytest.mark.parametrize("max_norm", [None, 0.7, 1e3])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_sgd_is_torchs_sgd_after_clip_grad_norm(max_norm, tensor_lr):
    params, _, momentum, _ = buffers()
    momentum.zero_()
    reference = torch.nn.Parameter(params.clone())
    optimiser = torch.optim.SGD([reference], lr=0.05, momentum=0.9, weight_decay=0.01)
    for step in range(5):
        grads = torch.randn(params.shape, generator=torch.Generator().manual_seed(step))
        reference.grad = grads.clone()
        length = torch.nn.utils.clip_grad_norm_([reference], max_norm or 1e9)
        optimiser.step()
        lr = torch.tensor(0.05) if tensor_lr else 0.05
        norm, skipped = lars.sgd_step(params, grads, momentum, lr, 0.9, 0.01, max_norm)
        torch.testing.assert_close(norm, length)
        assert not skipped
    torch.testing.assert_close(params, reference.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(momentum, optimiser.state[reference]["momentum_buffer"], rtol=1e-5, atol=1e-5)


def lars_step(w, g, v, parts, **change):
    return lars.clipped_lars_step(w, g, v, parts, **RATES | change)


def sgd_step(w, g, v, parts, **change):
    return lars.sgd_step(w, g, v, **{"lr": 0.1, "momentum_factor": 0.9, "weight_decay": 0.01} | change)


@pytest.mark.parametrize("step", [lars_step, sgd_step])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("max_norm", [None, 5.0])
@pytest.mark.parametrize("where", [0, 13, -1])
def test_a_gradient_norm_that_is_not_finite_changes_nothing(step, bad, max_norm, where):
    params, grads, momentum, parts = buffers()
    grads[where] = bad
    before = params.clone(), momentum.clone()
    norm, skipped = step(params, grads, momentum, parts, max_grad_norm=max_norm)
    assert torch.equal(params, before[0])
    assert torch.equal(momentum, before[1])
    assert skipped.item() == 1
    assert skipped.shape == norm.shape == ()
    assert not norm.isfinite()


@pytest.mark.parametrize("step", [lars_step, sgd_step])
def test_a_zero_gradient_under_a_clip_only_decays_and_coasts(step):
    params, grads, momentum, parts = buffers()
    norm, skipped = step(params, torch.zeros_like(grads), momentum, parts, max_grad_norm=5.0)
    assert norm.item() == 0
    assert not skipped
    assert params.isfinite().all()
    assert momentum.isfinite().all()


@pytest.mark.parametrize("step", [lars_step, sgd_step])
def test_views_of_the_buffers_move_and_gradients_are_only_read(step):
    params, grads, momentum, parts = buffers()
    weight = torch.nn.Parameter(params[:12].view(3, 4))
    address, before, start = params.data_ptr(), grads.clone(), weight.detach().clone()
    step(params, grads, momentum, parts, max_grad_norm=0.1)
    assert torch.equal(grads, before)
    assert params.data_ptr() == address
    assert torch.equal(weight.detach(), params[:12].view(3, 4))
    assert not torch.equal(weight.detach(), start)


@pytest.mark.parametrize("step", [lars_step, sgd_step])
def test_a_tensor_rate_is_the_same_as_a_float_and_parameters_may_require_gradients(step):
    one, two = buffers(), buffers()
    two[0].requires_grad_()
    step(*one, lr=0.3)
    step(*two, lr=torch.tensor(0.3))
    torch.testing.assert_close(one[0], two[0].detach())


def test_with_a_clip_of_one_no_tensor_steps_further_than_sgd():
    params, grads, momentum, parts = buffers()
    for coefficient in (1e-3, 1.0, 1e3):
        w = params.clone()
        lars.clipped_lars_step(w, grads, torch.zeros_like(momentum), parts, 0.1, 0.9, 0.0, coefficient, 1.0)
        assert ((w - params).abs() <= 0.1 * grads.abs() + 1e-6).all()


FLAT = torch.zeros(34)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("params", {"params": torch.zeros(34, dtype=torch.float64)}),
        ("params", {"params": torch.zeros(2, 17)}),
        ("params", {"params": torch.zeros(68)[::2]}),
        ("grads", {"grads": torch.zeros(33)}),
        ("grads", {"grads": FLAT.half()}),
        ("grads", {"grads": FLAT.to("meta")}),
        ("momentum", {"momentum": torch.zeros(35)}),
        ("momentum", {"momentum": FLAT.to("meta")}),
        ("segments", {"segments": lars.segments([(2, 2)], "cpu")}),
        ("segments", {"segments": lars.segments([(34,)], "meta")}),
        ("lr", {"lr": torch.ones(1)}),
        ("lr", {"lr": torch.ones((), device="meta")}),
    ],
)
def test_a_bad_argument_is_named(name, change):
    good = {"params": FLAT.clone(), "grads": FLAT, "momentum": FLAT.clone(), "segments": lars.segments([(34,)], "cpu")}
    with pytest.raises(ValueError, match=f"^{name}:"):
        lars.clipped_lars_step(**good | RATES | change)


def test_no_shapes_are_an_error():
    with pytest.raises(ValueError, match=r"^shapes:"):
        lars.segments([], "cpu")


def test_nothing_waits_for_a_value_or_makes_a_tensor_on_another_device():
    params, grads, momentum = (x.to("meta") for x in buffers()[:3])  # meta tensors have no values to wait for
    parts, lr = lars.segments(SHAPES, "meta"), torch.zeros((), device="meta")
    norm, skipped = lars.clipped_lars_step(params, grads, momentum, parts, **RATES | {"lr": lr}, max_grad_norm=5.0)
    assert (norm.device.type, skipped.device.type) == ("meta", "meta")
    lars.sgd_step(params, grads, momentum, lr, 0.9, 1e-4, 5.0)
