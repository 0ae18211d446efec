"""BatchNorm with residual and ReLU, against nn.BatchNorm2d in float64: results, gradients, running statistics, and the order of sums."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from speedyzero_kernels.columns import Cut
from speedyzero_kernels.norm import batch_norm
from tests.kernels.conftest import run_kernels

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5, torch.float64: 1e-12}
NATIVE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def kernels(monkeypatch, poisoned):
    """The public function launches its kernels; memory that is not written holds NaN."""
    run_kernels(monkeypatch)


def make(shape, dtype, residual=True, seed=0, mean=0.5):
    """All that a call takes, by the argument's name, x and what follows it wanting gradients."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(NATIVE, dtype)

    def board(x):
        return x.contiguous(memory_format=layout).requires_grad_()

    channels = shape[1]
    return {
        "x": board(normal(*shape) * 2 + mean),
        "weight": (normal(channels, dtype=wide) * 0.3 + 1).requires_grad_(),
        "bias": normal(channels, dtype=wide).requires_grad_(),
        "running_mean": normal(channels, dtype=wide),
        "running_var": normal(channels, dtype=wide).abs(),
        **({"residual": board(normal(*shape))} if residual else {}),
    }


def outcome(arguments, upstream, **options):
    """Result, gradients by name and running statistics of a call that leaves its arguments alone."""
    mine = {name: x.detach().clone().requires_grad_(x.requires_grad) for name, x in arguments.items()}
    out = batch_norm(**mine, **options)
    out.backward(upstream)
    grads = {name: x.grad for name, x in mine.items() if x.requires_grad}
    return {"out": out.detach(), **grads, "running_mean": mine["running_mean"], "running_var": mine["running_var"]}


def in_float64(arguments, upstream, relu=True, momentum=0.1, eps=1e-5):
    """The same of nn.BatchNorm2d, add and ReLU in float64."""
    x, weight, bias, mean, var = (arguments[name].detach().double().cpu() for name in list(arguments)[:5])
    plain = (nn.BatchNorm2d if x.ndim == 4 else nn.BatchNorm1d)(x.shape[1], eps, momentum).double()
    plain.load_state_dict({"weight": weight, "bias": bias, "running_mean": mean, "running_var": var}, strict=False)
    x.requires_grad_()
    out = plain(x)
    found = {"x": x, "weight": plain.weight, "bias": plain.bias}
    if "residual" in arguments:
        found["residual"] = arguments["residual"].detach().double().cpu().requires_grad_()
        out = out + found["residual"]
    out = F.relu(out) if relu else out
    out.backward(upstream.double().cpu())
    return {
        "out": out.detach(), **{name: y.grad for name, y in found.items()},
        "running_mean": plain.running_mean, "running_var": plain.running_var,
    }  # fmt: skip


def assert_near(got, want, tolerance):
    assert got.keys() == want.keys()
    for name, theirs in want.items():
        ours = got[name].double().cpu()
        # A gradient is a sum in which much cancels: its size is that of the upstream gradient, about 1.
        worst = (ours - theirs).abs().max() / theirs.abs().max().clamp_min(1.0)
        assert worst < tolerance, f"{name}: worst error {worst:.1e}"


def upstream_of(arguments, seed=9):
    x = arguments["x"]
    generator = torch.Generator().manual_seed(seed)
    layout = torch.channels_last if x.ndim == 4 else torch.contiguous_format
    return torch.randn(x.shape, generator=generator).to(x.device, x.dtype).contiguous(memory_format=layout)


# Rows up to 2048 are one program's; the rest are of several chunks, the last one short, or of channels that fill no block.
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize(
    ("shape", "residual"),
    [((5, 6, 3, 4), True), ((5, 6, 3, 4), False), ((4, 3, 24, 25), True), ((4, 3, 24, 25), False), ((70, 20), False), ((2, 1), False)],
)
def test_the_kernels_give_what_batch_norm_gives_in_float64(shape, residual, relu, dtype):
    arguments = make(shape, dtype, residual)
    upstream = upstream_of(arguments)
    assert_near(outcome(arguments, upstream, relu=relu), in_float64(arguments, upstream, relu), TOLERANCE[dtype])


@pytest.mark.parametrize("residual", [True, False])
def test_the_reference_is_batch_norm_add_and_relu(residual):
    arguments = {name: x.detach().cpu().requires_grad_(x.requires_grad) for name, x in make((5, 6, 3, 4), torch.float64, residual).items()}
    upstream = upstream_of(arguments)
    options = {"momentum": 0.3, "eps": 0.01}
    assert_near(outcome(arguments, upstream, **options), in_float64(arguments, upstream, **options), 1e-12)


@pytest.mark.usefixtures("kernels")
@settings(max_examples=20)
@given(
    st.data(), st.integers(1, 4), st.tuples(st.integers(1, 3), st.integers(1, 4)), st.integers(1, 6), st.sampled_from([2, 4, 8, 16]),
    st.sampled_from([1, 4, 8]), st.integers(1, 3), st.booleans(), st.booleans(),
)  # fmt: skip
def test_however_the_rows_are_cut_the_kernels_agree_with_float64(data, boards, side, channels, block_m, block_c, blocks, relu, residual):
    vectors = data.draw(st.booleans(), label="vectors")
    shape = (boards * side[0] * side[1], channels) if vectors else (boards, channels, *side)
    rows = boards * side[0] * side[1]
    if rows < 2:
        return
    arguments = make(shape, torch.float64, residual)
    if vectors:  # rows within wider ones, as the LSTM's output lies beside its cell
        extra = data.draw(st.integers(0, 3), label="extra")
        wider = torch.full((rows, channels + extra), torch.nan, dtype=torch.float64, device=NATIVE)
        wider[:, :channels] = arguments["x"].detach()
        arguments["x"] = wider[:, :channels]
        arguments["x"].requires_grad_()
    chunks = -(-rows // (blocks * block_m))
    cut = Cut(block_m, block_c, blocks * block_m, chunks, 1)
    upstream = upstream_of(arguments)
    options = {"momentum": 0.3, "eps": 0.01}
    want = in_float64(arguments, upstream, relu, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cut, "of", lambda *sizes: cut)
        if vectors:
            x = arguments["x"]
            given_ = {name: y.detach().clone().requires_grad_(y.requires_grad) for name, y in arguments.items() if name != "x"}
            out = batch_norm(x, **given_, relu=relu, **options)
            out.backward(upstream)
            got = {"out": out.detach(), "x": x.grad, **{n: y.grad for n, y in given_.items() if y.requires_grad}}
            got |= {name: given_[name] for name in ("running_mean", "running_var")}
        else:
            got = outcome(arguments, upstream, relu=relu, **options)
    assert_near(got, want, 1e-11)


@given(st.integers(2, 2**25), st.integers(1, 4096), st.sampled_from([2, 4, 8]))
@example(2048, 32, 2)
@example(2049, 32, 2)
def test_the_chunks_hold_every_row_and_are_few(rows, channels, item):
    cut = Cut.of(rows, channels, item)
    assert (cut.chunks - 1) * cut.chunk < rows <= cut.chunks * cut.chunk
    assert cut.chunk % cut.block_m == 0
    assert cut.chunks <= 128
    assert cut.chunks == 1 or rows > 2048
    assert cut.block_m * cut.block_c * item <= 2**14


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("shape", [(3, 5, 4, 6), (4, 3, 24, 25)])
def test_the_same_numbers_give_the_same_bits(shape):
    arguments = make(shape, torch.float32)
    upstream = upstream_of(arguments)
    once, again = outcome(arguments, upstream), outcome(arguments, upstream)
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("rows", [64, 2304])
def test_a_mean_far_from_zero_costs_the_variance_no_digits(rows):
    """As the mean of the squares less the square of the mean, in f32, this variance would be noise."""
    arguments = make((rows, 3), torch.float32, residual=False)
    with torch.no_grad():
        arguments["x"].mul_(0.1).add_(1000.0)
        arguments["running_var"].zero_()
    batch_norm(**arguments, momentum=1.0)
    x = arguments["x"].detach().double()
    torch.testing.assert_close(arguments["running_var"].double(), x.var(0), rtol=1e-4, atol=0)
    torch.testing.assert_close(arguments["running_mean"].double(), x.mean(0), rtol=1e-6, atol=0)


@pytest.mark.usefixtures("kernels")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("shape", [(3, 5, 4, 6), (4, 3, 24, 25)])
def test_what_is_not_finite_shows_in_its_channel_and_nowhere_else(shape, value):
    arguments = make(shape, torch.float32)
    upstream = upstream_of(arguments)
    clean = outcome(arguments, upstream)
    with torch.no_grad():
        arguments["x"][1, 1, 2, 3] = value
    got = outcome(arguments, upstream)
    others = [c for c in range(shape[1]) if c != 1]
    for name, tensor in got.items():
        axis = 1 if tensor.ndim == 4 else 0
        kept = torch.tensor(others, device=tensor.device)
        assert torch.equal(tensor.index_select(axis, kept), clean[name].index_select(axis, kept)), name
    assert got["out"][:, 1].isnan().all(), "a NaN passes ReLU"
    assert not got["running_var"][1].isfinite()


@pytest.mark.usefixtures("kernels")
def test_without_a_gradient_the_result_and_the_running_statistics_are_the_same_and_nothing_is_kept():
    arguments = make((3, 5, 4, 6), torch.float32)
    want = outcome(arguments, upstream_of(arguments))
    with torch.no_grad():
        out = batch_norm(**arguments)
    assert not out.requires_grad
    assert torch.equal(out, want["out"])
    assert torch.equal(arguments["running_mean"], want["running_mean"])
    assert torch.equal(arguments["running_var"], want["running_var"])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("residual", "relu", "boards"), [(False, True, 1), (True, False, 1), (True, True, 2)])
def test_the_backward_pass_keeps_the_input_and_the_result_only_if_a_residual_hides_its_sign(residual, relu, boards):
    arguments, kept = make((3, 5, 4, 6), torch.bfloat16, residual), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = batch_norm(**arguments, relu=relu)
    large = [x for x in kept if x.ndim == 4]
    assert len(large) == boards
    assert large[0].data_ptr() == arguments["x"].data_ptr()
    assert boards == 1 or large[1].data_ptr() == out.data_ptr()
    assert sum(x.numel() for x in kept if x.ndim < 4) == 4 * 5


@pytest.mark.usefixtures("kernels")
def test_the_upstream_gradient_may_have_any_layout():
    arguments = make((3, 5, 4, 6), torch.float32)
    upstream = upstream_of(arguments)
    want = outcome(arguments, upstream)
    got = outcome(arguments, upstream.contiguous())
    assert all(torch.equal(got[name], want[name]) for name in want)
    one = torch.ones((), device=NATIVE)
    spread, whole = outcome(arguments, one.expand(3, 5, 4, 6)), outcome(arguments, torch.ones(3, 5, 4, 6, device=NATIVE))
    assert all(torch.equal(spread[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", lambda a: {"x": a["x"][0]}),
        ("x", lambda a: {"x": a["x"].long()}),
        ("x: values of a channel", lambda a: {"x": a["x"][:1, :, :1, :1], "residual": a["residual"][:1, :, :1, :1]}),
        ("x: channels", lambda a: {"x": a["x"][:, :0], "residual": a["residual"][:, :0]}),
        ("x", lambda a: {"x": a["x"].contiguous()}),
        ("residual", lambda a: {"residual": a["residual"].contiguous()}),
        ("residual", lambda a: {"residual": a["residual"].double()}),
        ("residual", lambda a: {"residual": a["residual"][:, :4]}),
        ("weight", lambda a: {"weight": a["weight"].double()}),
        ("bias", lambda a: {"bias": a["bias"][:4]}),
        ("running_mean", lambda a: {"running_mean": a["running_mean"].repeat_interleave(2)[::2]}),
        ("running_var", lambda a: {"running_var": a["running_var"].to("meta")}),
    ],
)
@pytest.mark.usefixtures("kernels")
def test_a_bad_argument_is_named(name, change):
    arguments = make((3, 5, 4, 6), torch.float32)
    with pytest.raises(ValueError, match=f"^{name}:"):
        batch_norm(**arguments | change(arguments))


@pytest.mark.usefixtures("kernels")
def test_the_rows_of_vectors_must_not_be_strided_within():
    arguments = make((6, 4), torch.float32, residual=False)
    with pytest.raises(ValueError, match=r"^x: the numbers of a row"):
        batch_norm(**arguments | {"x": arguments["x"].detach().t().contiguous().t()})
