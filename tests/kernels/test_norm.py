"""BatchNorm with residual and ReLU, against nn.BatchNorm2d in float64: results, gradients, running statistics, order of sums, shares."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from speedyzero_kernels.columns import Cut
from speedyzero_kernels.norm import batch_norm
from tests.capture import CaptureSafety
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


def in_shares(arguments, upstream, shares, **options):
    """`outcome` of every share of the rows. They take turns, once more for each call of `exchange`: what it gives is what the turn before
    gave it in all shares."""
    parts = [
        {name: y.detach().chunk(shares)[i] if y.shape == upstream.shape else y.detach() for name, y in arguments.items()}
        for i in range(shares)
    ]
    totals = []
    for turn in range(3):
        outcomes, given = [], []
        for part, mine in zip(parts, upstream.chunk(shares), strict=True):
            calls = []

            def exchange(sums, turn=turn, calls=calls):
                assert (sums.dtype, sums.shape) == (torch.float64, (2, upstream.shape[1]))
                if len(calls) < turn:
                    sums.copy_(totals[len(calls)])
                calls.append(sums.clone())

            wanted = {name: y.requires_grad_(arguments[name].requires_grad) for name, y in part.items()}
            outcomes.append(outcome(wanted, mine, exchange=exchange, shares=shares, **options))
            assert len(calls) == 2, "one message each way"
            given.append(calls)
        if turn < 2:
            totals.append(sum(calls[turn] for calls in given))
    return outcomes


def put_together(outcomes):
    """What shares found, as of their whole batch: rows in order, the sum of gradients of weight and bias, running statistics of one."""
    together = {}
    for name, first in outcomes[0].items():
        parts = [one[name] for one in outcomes]
        if name.startswith("running"):
            assert all(torch.equal(first, other) for other in parts), name
            together[name] = first
        else:
            together[name] = sum(parts) if name in ("weight", "bias") else torch.cat(parts)
    return together


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


# A share is one program's, of several chunks, or a single row.
@pytest.mark.parametrize(
    ("shape", "residual", "relu", "dtype"),
    [
        ((6, 6, 3, 4), True, True, torch.bfloat16), ((6, 6, 3, 4), False, True, torch.float32), ((70, 20), False, True, torch.float32),
        ((8, 3, 24, 25), True, True, torch.float32), ((8, 3, 24, 25), True, False, torch.float32),
        ((8, 18, 24, 25), False, True, torch.bfloat16), ((2, 5), False, False, torch.float64),
    ],
)  # fmt: skip
def test_two_shares_give_what_their_whole_batch_gives_in_float64(form, device, shape, residual, relu, dtype):
    arguments = {name: y.detach().to(device).requires_grad_(y.requires_grad) for name, y in make(shape, dtype, residual).items()}
    upstream = upstream_of(arguments)
    # The reference rounds three times.
    tolerance = TOLERANCE[dtype] * (3 if form == "reference" else 1)
    assert_near(put_together(in_shares(arguments, upstream, 2, relu=relu)), in_float64(arguments, upstream, relu), tolerance)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("relu", [True, False])
def test_three_shares_of_several_short_chunks_agree_with_float64(relu, monkeypatch):
    arguments = make((6, 6, 3, 3), torch.float64)
    upstream, options = upstream_of(arguments), {"relu": relu, "momentum": 0.3, "eps": 0.01}
    monkeypatch.setattr(Cut, "of", lambda *sizes: Cut(4, 4, 8, 3, 1))  # 8, 8 and 2 of a share's 18 rows
    got = put_together(in_shares(arguments, upstream, 3, **options))
    assert_near(got, in_float64(arguments, upstream, **options), 1e-12)


@pytest.mark.parametrize("rows", [64, 2304])
def test_of_shares_too_a_mean_far_from_zero_costs_the_variance_no_digits(device, rows):
    generator = torch.Generator().manual_seed(0)
    x = [(1000 + 0.1 * torch.randn(rows, 3, generator=generator)).to(device) for _ in range(2)]
    sums, running = [], [torch.zeros(3, device=device) for _ in range(2)]
    ones, zeros = torch.ones(3, device=device), torch.zeros(3, device=device)
    for turn in range(2):
        for mine in x:
            exchange = sums.append if turn == 0 else lambda mine: mine.copy_(sums[0] + sums[1])
            batch_norm(mine, ones, zeros, *running, momentum=1.0, exchange=exchange, shares=2)
    whole = torch.cat(x).double()
    torch.testing.assert_close(running[1].double(), whole.var(0), rtol=1e-4, atol=0)
    torch.testing.assert_close(running[0].double(), whole.mean(0), rtol=1e-6, atol=0)


def test_of_shares_a_channel_that_does_not_vary_has_no_variance_below_zero(device):
    """The difference of two equal sums, which the shares add up in any order, may round to less."""
    x = (0.1 * torch.arange(1.0, 65.0)).expand(6, 64).contiguous().to(device)
    weight, bias = torch.ones(64, device=device), torch.zeros(64, device=device)
    running = [torch.zeros(64, device=device) for _ in range(2)]
    batch_norm(x, weight, bias, *running, momentum=1.0, exchange=lambda sums: sums.mul_(3)[1].mul_(1 - 1e-15), shares=3)
    assert (running[1] >= 0).all()
    assert (running[1] < 1e-12).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_finite_in_one_share_shows_in_its_channel_of_all(device):
    arguments = {name: y.detach().to(device).requires_grad_(y.requires_grad) for name, y in make((4, 5, 4, 6), torch.float32).items()}
    with torch.no_grad():
        arguments["x"][3, 1, 2, 3] = torch.inf
    for one in in_shares(arguments, upstream_of(arguments), 2):
        assert one["out"][:, 1].isnan().all()
        assert one["out"][:, 2:].isfinite().all()
        assert not one["running_var"][1].isfinite()


def test_of_one_share_nothing_is_exchanged_and_of_several_nothing_waits_for_the_device(device):
    arguments = {name: y.detach().to(device).requires_grad_(y.requires_grad) for name, y in make((4, 5, 4, 6), torch.float32).items()}
    upstream, calls = upstream_of(arguments), []
    alone, given_ = outcome(arguments, upstream), outcome(arguments, upstream, exchange=calls.append)
    assert not calls
    assert all(torch.equal(alone[name], given_[name]) for name in alone)
    with CaptureSafety():
        outcome(arguments, upstream, exchange=calls.append, shares=2)
    assert len(calls) == 2


def test_shares_that_nothing_adds_up_are_refused():
    arguments = make((3, 5, 4, 6), torch.float32)
    for options, line in (({"shares": 2}, "exchange: must be given with 2 shares"), ({"shares": 0}, "shares: must be at least 1, got 0")):
        with pytest.raises(ValueError, match=line):
            batch_norm(**arguments, **options)
    one = {name: y.detach()[:1, :, :1, :1] if y.ndim == 4 else y for name, y in arguments.items()}
    with pytest.raises(ValueError, match="values of a channel: must be at least 2, got 1"):
        batch_norm(**one)
