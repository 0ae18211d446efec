"""Heads in one launch, against float64 and against the layers one by one."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from speedyzero_kernels import dispatch
from speedyzero_kernels.head import head
from speedyzero_kernels.support import to_scalar_reference
from tests.kernels.test_resblock import assert_near, channels_last


def make(device, shape, channels, hidden, outputs, dtype=torch.float32, seed=0):
    """All that a head takes; `shape` of x, `channels` of the convolution, without effect on vectors."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size, scale=1.0, dtype=dtype):
        return (torch.randn(size, generator=generator) * scale).to(device=device, dtype=dtype)

    x = normal(*shape)
    inputs = shape[1]
    if x.ndim == 4:
        x, wide = channels_last(x), channels * shape[2:].numel()
        before = normal(channels, inputs, 1, 1, scale=inputs**-0.5), normal(channels)
    else:
        before, wide = (normal(inputs), normal(inputs)), inputs
    return {
        "x": x, "hidden_weight": normal(hidden, wide, scale=wide**-0.5), "hidden_bias": normal(hidden),
        "last_weight": normal(outputs, hidden, scale=hidden**-0.5, dtype=torch.float32),
        "last_bias": normal(outputs, dtype=torch.float32), "before": before,
    }  # fmt: skip


def in_float64(x, hidden_weight, hidden_bias, last_weight, last_bias, before, scalar):
    def wide(y):
        return y.double().cpu()

    weight, bias = map(wide, before)
    y = wide(x)
    y = torch.einsum("bihw,ci->bchw", y, weight[:, :, 0, 0]) + bias[:, None, None] if y.ndim == 4 else y * weight + bias
    y = F.relu(F.relu(y).flatten(1) @ wide(hidden_weight).t() + wide(hidden_bias))
    logits = y @ wide(last_weight).t() + wide(last_bias)
    return to_scalar_reference(logits) if scalar else logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scalar", [True, False])
@pytest.mark.parametrize(
    ("shape", "channels", "hidden", "outputs"),
    [((3, 5, 2, 3), 4, 6, 7), ((33, 64, 1, 2), 16, 32, 65), ((2, 70, 3, 1), 17, 33, 129), ((33, 5), 0, 6, 3), ((2, 130), 0, 32, 601)],
)
def test_a_head_is_that_of_float64(device, shape, channels, hidden, outputs, scalar, dtype):
    arguments = make(device, torch.Size(shape), channels, hidden, outputs, dtype)
    got = head(**arguments, scalar=scalar)
    assert got.shape == ((shape[0],) if scalar else (shape[0], outputs))
    # The inverse of h is about a square: it doubles what rounding did to a mean bin.
    want = in_float64(**arguments, scalar=scalar)
    size = 3 * want.abs().max().clamp_min(1.0) if scalar else 1.0
    assert_near((got / size).to(dtype) if dtype != torch.float32 else got / size, want / size, dtype)


@settings(max_examples=25)
@given(
    st.integers(1, 40), st.integers(1, 5), st.tuples(st.integers(1, 3), st.integers(1, 3)), st.integers(1, 18), st.integers(1, 20),
    st.integers(1, 70), st.booleans(),
)  # fmt: skip
def test_whatever_the_sizes_the_kernel_reads_and_writes_its_own_places(boards, inputs, side, channels, hidden, half, vectors):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "runs_kernel", lambda x: True)
        place = "cuda" if torch.cuda.is_available() else "cpu"
        shape = torch.Size((boards, inputs) if vectors else (boards, inputs, *side))
        arguments = make(place, shape, channels, hidden, 2 * half + 1)
        if vectors:  # rows within wider ones, as the LSTM's output lies beside its cell
            wider = torch.full((boards, inputs + 3), torch.nan, device=place)
            wider[:, :inputs] = arguments["x"]
            arguments["x"] = wider[:, :inputs]
        for scalar in (True, False):
            want = in_float64(**arguments, scalar=scalar)
            torch.testing.assert_close(head(**arguments, scalar=scalar).double().cpu(), want, rtol=2e-3, atol=2e-3)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_great_logits_and_what_is_not_finite_come_out_as_of_a_softmax(device):
    arguments = make(device, torch.Size((4, 6)), 0, 8, 129)
    arguments["last_bias"][[3, 100]] = 200.0  # in different blocks: a sum of exponentials without the greatest taken off overflows
    got = head(**arguments, scalar=True)
    torch.testing.assert_close(got.double().cpu(), in_float64(**arguments, scalar=True), rtol=1e-3, atol=1e-3)
    arguments["x"][2, 1] = torch.nan
    again = head(**arguments, scalar=True)
    assert again[2].isnan()
    assert torch.equal(again[[0, 1, 3]], got[[0, 1, 3]])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", {"x": torch.zeros(2, 3, 4)}),
        ("x: a gradient", {"x": torch.zeros(2, 5, 2, 3, requires_grad=True)}),
        ("before: weight", {"before": (torch.zeros(4, 6, 1, 1), torch.zeros(4))}),
        ("before: channels", {"before": (torch.zeros(129, 5, 1, 1), torch.zeros(129))}),
        ("hidden_weight", {"hidden_weight": torch.zeros(6, 23)}),
        ("hidden_bias", {"hidden_bias": torch.zeros(6).double()}),
        ("last_weight", {"last_weight": torch.zeros(7, 6).bfloat16()}),
        ("last_weight: of a scalar", {"last_weight": torch.zeros(8, 6)}),
        ("last_bias", {"last_bias": torch.zeros(8)}),
    ],
)
def test_a_bad_argument_is_named(name, change):
    arguments = make("cpu", torch.Size((2, 5, 2, 3)), 4, 6, 7)
    with pytest.raises(ValueError, match=f"^{name}"):
        head(**arguments | change, scalar=True)
