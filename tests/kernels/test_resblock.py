"""Convolutions of small boards, against float64, a sum written out by hand, and what an impulse must become."""

import pytest
import torch
import torch.nn.functional as F

from speedyzero_kernels import dispatch, resblock
from speedyzero_kernels.resblock import Tile, conv3x3, default_tile

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
# Boards, inputs, outputs, height, width. Blocks have 32 rows in f32 and for odd channels, else 64, and 16 to 64 channels.
SHAPES = [
    (1, 1, 1, 1, 1), (3, 4, 4, 1, 1), (65, 16, 4, 1, 1), (1, 16, 16, 1, 7), (3, 17, 1, 7, 1), (3, 4, 16, 3, 5), (1, 1, 17, 6, 6),
    (3, 64, 64, 6, 6), (5, 65, 66, 3, 5), (1, 3, 65, 12, 12), (2, 16, 80, 12, 11), (1, 68, 20, 6, 6),
]  # fmt: skip


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.to(memory_format=torch.channels_last)


def make(device, boards, inputs, outputs, height, width, dtype=torch.float32, actions=3, seed=0):
    """All that a convolution takes, by the argument's name."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        x = (torch.randn(shape, generator=generator) * scale).to(device=device, dtype=dtype)
        return channels_last(x) if x.ndim == 4 else x

    return {
        "x": normal(boards, inputs, height, width),
        "weight": normal(outputs, inputs, 3, 3, scale=(9 * inputs) ** -0.5),
        "bias": normal(outputs),
        "action_bias": normal(actions, outputs, height, width),
        "action": torch.randint(actions, (boards,), generator=generator).to(device),
        "residual": normal(boards, outputs, height, width),
    }


def in_float64(x, weight, bias=None, action_bias=None, action=None, residual=None, relu=True):
    out = F.conv2d(x.double().cpu(), weight.double().cpu(), None if bias is None else bias.double().cpu(), padding=1)
    if action_bias is not None:
        out = out + action_bias.double().cpu()[action.cpu()]
    if residual is not None:
        out = out + residual.double().cpu()
    return out.relu() if relu else out


def assert_near(got, want, dtype):
    assert got.dtype == dtype
    assert got.shape == want.shape
    # The terms have a size of about 1, and a sum of few may cancel.
    error = (got.double().cpu() - want).norm() / want.norm().clamp_min(want.numel() ** 0.5)
    assert error < TOLERANCE[dtype], f"relative error {error:.1e}"
    # The norm alone would let a single wrong element of many pass.
    worst = (got.double().cpu() - want).abs().max() / want.abs().max().clamp_min(1.0)
    assert worst < 3 * TOLERANCE[dtype], f"worst error {worst:.1e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_convolution_is_that_of_float64(device, shape, dtype):
    arguments = make(device, *shape, dtype)
    before = {name: value.clone() for name, value in arguments.items()}
    got = conv3x3(**arguments, relu=False)
    assert_near(got, in_float64(**arguments, relu=False), dtype)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(arguments[name], before[name]) for name in before)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    "names", [(), ("bias",), ("action_bias", "action"), ("residual",), ("bias", "residual"), ("action_bias", "action", "residual")]
)
def test_every_option_can_be_left_out(device, names, relu):
    arguments = {name: value for name, value in make(device, 7, 5, 9, 3, 4).items() if name in ("x", "weight", *names)}
    assert_near(conv3x3(**arguments, relu=relu), in_float64(**arguments, relu=relu), torch.float32)


@pytest.mark.parametrize("tile", [Tile(16, 16, 16, 1, 1), Tile(32, 64, 16, 4, 2), Tile(128, 16, 64, 4, 3)])
def test_a_tile_changes_the_work_and_not_the_result(device, tile):
    arguments = make(device, 3, 36, 20, 5, 5)
    assert_near(conv3x3(**arguments, tile=tile), in_float64(**arguments), torch.float32)


def test_an_action_outside_the_table_reads_the_nearest_map():
    arguments = make("cuda" if torch.cuda.is_available() else "cpu", 4, 2, 3, 2, 2)
    wild = torch.tensor([-1, 3, 2**40, -(2**62)], device=arguments["x"].device)
    near = torch.tensor([0, 2, 2, 0], device=arguments["x"].device)
    got = resblock.conv3x3_kernel(**arguments | {"action": wild})
    assert torch.equal(got, resblock.conv3x3_kernel(**arguments | {"action": near}))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_on_its_board_and_passes_the_relu(device, value):
    arguments = make(device, 3, 2, 3, 4, 4)
    clean = conv3x3(**arguments)
    arguments["x"][1] = value
    got = conv3x3(**arguments)
    assert torch.equal(got[::2], clean[::2])
    assert not got[1].isfinite().all()
    arguments = make(device, 1, 2, 3, 4, 4)
    arguments["residual"][0, 1, 2, 3] = torch.nan
    assert conv3x3(**arguments).isnan().nonzero().tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (3, 16, 16, 6, 6), (5, 17, 4, 3, 5), (2, 4, 33, 1, 7)])
def test_a_residual_block_is_two_convolutions(device, shape, dtype):
    boards, inputs, outputs, height, width = shape
    first, second = make(device, *shape, dtype), make(device, boards, outputs, inputs, height, width, dtype, seed=1)
    got = resblock.resblock(first["x"], first["weight"], first["bias"], second["weight"], second["bias"])
    middle = in_float64(first["x"], first["weight"], first["bias"]).to(dtype)
    want = in_float64(middle, second["weight"], second["bias"], residual=first["x"])
    assert_near(got, want, dtype)
    without = resblock.resblock(first["x"], first["weight"], None, second["weight"], None)
    middle = in_float64(first["x"], first["weight"]).to(dtype)
    assert_near(without, in_float64(middle, second["weight"], residual=first["x"]), dtype)


@pytest.mark.parametrize("weight_format", [torch.contiguous_format, torch.channels_last])
def test_the_reference_keeps_a_contiguous_layout(weight_format):
    arguments = {name: value.contiguous() for name, value in make("cpu", 2, 4, 5, 3, 3).items()}
    arguments["weight"] = arguments["weight"].to(memory_format=weight_format)
    got = conv3x3(**arguments)
    assert got.is_contiguous()
    assert_near(got, in_float64(**arguments), torch.float32)


def test_a_layout_that_a_size_of_one_leaves_open_is_either(device):
    one_pixel = {name: value.contiguous() for name, value in make(device, 3, 4, 5, 1, 1).items()}
    one_pixel["weight"] = channels_last(one_pixel["weight"])
    assert_near(conv3x3(**one_pixel), in_float64(**one_pixel), torch.float32)
    one_channel = {name: value.contiguous() for name, value in make(device, 3, 1, 1, 4, 2).items()}
    assert_near(conv3x3(**one_channel), in_float64(**one_channel), torch.float32)


@pytest.mark.parametrize("name", ["x", "weight", "action_bias", "residual"])
def test_the_kernel_wants_channels_last(monkeypatch, name):
    arguments = make("cpu", 2, 4, 5, 3, 3)
    conv3x3(**arguments | {name: arguments[name].contiguous()})
    monkeypatch.setattr(dispatch, "runs_kernel", lambda x: True)
    with pytest.raises(ValueError, match=f"^{name}: must be in channels_last memory"):
        conv3x3(**arguments | {name: arguments[name].contiguous()})


def test_small_batches_are_cut_finer():
    few, many = (default_tile(boards * 36, 64, 64, torch.bfloat16) for boards in (256, 4104))
    assert (few.block_m, many.block_m) == (64, 128)
    assert (many.block_n, many.block_k) == (64, 64)
