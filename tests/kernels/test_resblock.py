"""Convolutions of small boards, against float64, a sum written out by hand, and what an impulse must become."""

import pytest
import torch
import torch.nn.functional as F

from speedyzero_kernels import dispatch, resblock
from speedyzero_kernels.resblock import Tile, conv3x3, default_tile

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
# Boards, inputs, outputs, height, width. Blocks have 32 rows in f32 and for odd channels, else 64, and 16 to 64 channels.
SHAPES = [
    (1, 1, 1, 1, 1),
    (3, 4, 4, 1, 1),
    (65, 16, 4, 1, 1),
    (1, 16, 16, 1, 7),
    (3, 17, 1, 7, 1),
    (3, 4, 16, 3, 5),
    (1, 1, 17, 6, 6),
    (3, 64, 64, 6, 6),
    (5, 65, 66, 3, 5),
    (1, 3, 65, 12, 12),
    (2, 16, 80, 12, 11),
    (1, 68, 20, 6, 6),
]


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
    assert_near(conv3x3(**arguments, relu=False), in_float64(**arguments, relu=False), dtype)


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


def test_convolution_of_a_board_worked_by_hand(device):
    """Board 1 2 / 3 4, taps 1 to 9 row by row: top left 5 x 1 + 6 x 2 + 8 x 3 + 9 x 4 = 77, and so on."""
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]], device=device)
    weight = torch.arange(1.0, 10.0, device=device).view(1, 1, 3, 3)
    bias, residual = torch.tensor([-60.0], device=device), torch.tensor([[[[0.5, 0.0], [0.0, -1.0]]]], device=device)
    assert conv3x3(x, weight, relu=False).flatten().tolist() == [77.0, 67.0, 47.0, 37.0]
    assert conv3x3(x, weight, bias, residual=residual).flatten().tolist() == [17.5, 7.0, 0.0, 0.0]


@pytest.mark.parametrize("board", [(4, 5), (1, 7), (5, 1), (2, 2)])
def test_an_impulse_stays_on_its_board(device, board):
    height, width = board
    kernel = torch.arange(1.0, 10.0).view(3, 3)
    count = height * width
    x = torch.zeros(2 * count, 1, height, width, device=device)
    for pixel in range(count):  # one board for each pixel, and behind it an empty one
        x.view(-1)[2 * pixel * count + pixel] = 1.0
    got = conv3x3(channels_last(x), kernel.view(1, 1, 3, 3).to(device), relu=False).cpu()
    assert not got[1::2].any()
    for pixel in range(count):
        row, column = divmod(pixel, width)
        want = torch.zeros(height + 2, width + 2)
        want[row : row + 3, column : column + 3] = kernel.flip(0, 1)
        assert torch.equal(got[2 * pixel, 0], want[1:-1, 1:-1])


def test_every_board_takes_the_map_of_its_action(device):
    maps = channels_last(torch.arange(2 * 3 * 2 * 2.0, device=device).view(2, 3, 2, 2) + 1)
    x = channels_last(torch.zeros(5, 2, 2, 2, device=device))
    weight = channels_last(torch.ones(3, 2, 3, 3, device=device))
    action = torch.tensor([1, 0, 0, 1, 1], device=device)
    assert torch.equal(conv3x3(x, weight, action_bias=maps, action=action), maps[action])


def test_an_action_outside_the_table_reads_the_nearest_map():
    arguments = make("cuda" if torch.cuda.is_available() else "cpu", 4, 2, 3, 2, 2)
    wild = torch.tensor([-1, 3, 2**40, -(2**62)], device=arguments["x"].device)
    near = torch.tensor([0, 2, 2, 0], device=arguments["x"].device)
    got = resblock.conv3x3_kernel(**arguments | {"action": wild})
    assert torch.equal(got, resblock.conv3x3_kernel(**arguments | {"action": near}))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_on_its_board(device, value):
    arguments = make(device, 3, 2, 3, 4, 4)
    clean = conv3x3(**arguments)
    arguments["x"][1] = value
    got = conv3x3(**arguments)
    assert torch.equal(got[::2], clean[::2])
    assert not got[1].isfinite().all()


def test_relu_lets_a_nan_through(device):
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


def test_the_arguments_are_left_alone(device):
    arguments = make(device, 2, 4, 4, 3, 3)
    before = {name: value.clone() for name, value in arguments.items()}
    conv3x3(**arguments)
    resblock.resblock(arguments["x"], arguments["weight"], arguments["bias"], arguments["weight"], arguments["bias"])
    assert all(torch.equal(arguments[name], before[name]) for name in before)


def test_the_result_has_the_layout_of_the_input(device):
    arguments = make(device, 2, 4, 5, 3, 3)
    assert conv3x3(**arguments).is_contiguous(memory_format=torch.channels_last)


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


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", lambda a: {"x": a["x"].double()}),
        ("x", lambda a: {"x": a["x"][0]}),
        ("x", lambda a: {"x": a["x"][:0]}),
        ("x", lambda a: {"x": a["x"][:, :, :, ::2]}),
        ("x", lambda a: {"x": channels_last(torch.zeros(2, 4, 13, 3))}),
        ("x", lambda a: {"x": channels_last(torch.zeros(2, 4, 3, 13))}),
        ("x", lambda a: {"x": channels_last(torch.zeros(2, 4, 0, 3))}),
        ("x", lambda a: {"x": torch.empty(2**27 // 9 + 1, 8, 4, 4, device="meta", memory_format=torch.channels_last)}),
        ("x", lambda a: {"x": a["x"].clone().requires_grad_()}),
        ("weight", lambda a: {"weight": a["weight"].half()}),
        ("weight", lambda a: {"weight": a["weight"][:, :3]}),
        ("weight", lambda a: {"weight": a["weight"][:, :, :2]}),
        ("weight", lambda a: {"weight": a["weight"][:0]}),
        ("weight", lambda a: {"weight": a["weight"].to("meta")}),
        ("weight", lambda a: {"weight": a["weight"].transpose(2, 3)}),
        ("weight", lambda a: {"weight": channels_last(torch.zeros(513, 4, 3, 3))}),
        ("weight", lambda a: {"weight": a["weight"].clone().requires_grad_()}),
        ("weight", lambda a: {"x": channels_last(torch.zeros(2, 513, 3, 3)), "weight": channels_last(torch.zeros(5, 513, 3, 3))}),
        ("bias", lambda a: {"bias": a["bias"][:4]}),
        ("bias", lambda a: {"bias": a["bias"].half()}),
        ("bias", lambda a: {"bias": a["bias"].to("meta")}),
        ("bias", lambda a: {"bias": torch.zeros(10)[::2]}),
        ("action_bias", lambda a: {"action_bias": a["action_bias"][:, :4]}),
        ("action_bias", lambda a: {"action_bias": a["action_bias"][:, :, :2]}),
        ("action_bias", lambda a: {"action_bias": a["action_bias"][:0]}),
        ("action_bias", lambda a: {"action_bias": a["action_bias"].half()}),
        ("action_bias", lambda a: {"action_bias": a["action_bias"][:, :, :, ::2]}),
        ("action", lambda a: {"action": None}),
        ("action", lambda a: {"action_bias": None}),
        ("action", lambda a: {"action": a["action"].int()}),
        ("action", lambda a: {"action": a["action"][:1]}),
        ("residual", lambda a: {"residual": a["residual"][:1]}),
        ("residual", lambda a: {"residual": a["x"]}),
        ("residual", lambda a: {"residual": a["residual"].half()}),
        ("residual", lambda a: {"residual": a["residual"].transpose(2, 3)}),
    ],
)
def test_a_bad_argument_is_named(device, name, change):
    arguments = make("cpu", 2, 4, 5, 3, 3)
    with pytest.raises(ValueError, match=f"^{name}:"):
        conv3x3(**arguments | change(arguments))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", {"x": torch.zeros(2, 4, 13, 3)}),
        ("weight1", {"weight1": torch.zeros(5, 3, 3, 3)}),
        ("weight2", {"weight2": torch.zeros(4, 4, 3, 3)}),
        ("weight2", {"weight2": torch.zeros(5, 5, 3, 3)}),
        ("bias1", {"bias1": torch.zeros(4)}),
        ("bias2", {"bias2": torch.zeros(5)}),
    ],
)
def test_a_bad_argument_of_a_block_is_named(name, change):
    good = {"x": torch.zeros(2, 4, 3, 3), "weight1": torch.zeros(5, 4, 3, 3), "bias1": torch.zeros(5)}
    good |= {"weight2": torch.zeros(4, 5, 3, 3), "bias2": torch.zeros(4)}
    assert resblock.resblock(**good).shape == (2, 4, 3, 3)
    with pytest.raises(ValueError, match=f"^{name}:"):
        resblock.resblock(**good | change)


def test_small_batches_are_cut_finer():
    few, many = (default_tile(boards * 36, 64, 64, torch.bfloat16) for boards in (256, 4104))
    assert (few.block_m, many.block_m) == (64, 128)
    assert (many.block_n, many.block_k) == (64, 64)
