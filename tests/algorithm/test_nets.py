import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from speedyzero.config import preset_config, resolve
from speedyzero.nets import ActionConv, Network, fold, make_snapshot, outline
from speedyzero.sizes import NetworkSpec, network_spec
from speedyzero_kernels.support import to_scalar

CPU = torch.device("cpu")


def small(height: int = 20, width: int = 20, in_channels: int = 2, actions: int = 3) -> NetworkSpec:
    return NetworkSpec(
        in_channels, height, width, actions, channels=6, stem_channels=4, head_channels=3, head_hidden=5, lstm=7,
        support=4, projection=8,
    )  # fmt: skip


def lived_in(spec: NetworkSpec, seed: int = 0) -> Network:
    """A network with weights, BatchNorm statistics and last layers of its own, none at its initial value."""
    torch.manual_seed(seed)
    network = Network(spec)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.3, 3)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    for head in (network.prefix_head, network.value_head, network.policy_head):
        nn.init.normal_(head.last.weight)
        nn.init.normal_(head.last.bias)
    return network.eval()


def atari_spec() -> NetworkSpec:
    config = resolve(preset_config("efficientzero"), image=True, atari=True)
    return network_spec(config, (3, 96, 96), 6)


# Every weight of EfficientZero for 4 frames of 3 x 96 x 96 and 6 actions; norms and biases follow from the outputs.
ATARI_WEIGHTS = {
    "representation.0.weight": (32, 12, 3, 3),
    "representation.2.first.weight": (32, 32, 3, 3),
    "representation.2.second.weight": (32, 32, 3, 3),
    "representation.3.first.weight": (64, 32, 3, 3),
    "representation.3.second.weight": (64, 64, 3, 3),
    "representation.3.skip.weight": (64, 32, 3, 3),
    "representation.4.first.weight": (64, 64, 3, 3),
    "representation.4.second.weight": (64, 64, 3, 3),
    "representation.6.first.weight": (64, 64, 3, 3),
    "representation.6.second.weight": (64, 64, 3, 3),
    "representation.8.first.weight": (64, 64, 3, 3),
    "representation.8.second.weight": (64, 64, 3, 3),
    "dynamics_conv.weight": (64, 65, 3, 3),
    "dynamics_block.first.weight": (64, 64, 3, 3),
    "dynamics_block.second.weight": (64, 64, 3, 3),
    "prefix_conv.weight": (16, 64, 1, 1),
    "prefix_lstm.weight_ih": (2048, 576),
    "prefix_lstm.weight_hh": (2048, 512),
    "prefix_head.hidden.weight": (32, 512),
    "prefix_head.last.weight": (601, 32),
    "prediction_block.first.weight": (64, 64, 3, 3),
    "prediction_block.second.weight": (64, 64, 3, 3),
    "value_conv.weight": (16, 64, 1, 1),
    "value_head.hidden.weight": (32, 576),
    "value_head.last.weight": (601, 32),
    "policy_conv.weight": (16, 64, 1, 1),
    "policy_head.hidden.weight": (32, 576),
    "policy_head.last.weight": (6, 32),
    "projection.0.weight": (1024, 2304),
    "projection.2.weight": (1024, 1024),
    "projection.4.weight": (1024, 1024),
    "predictor.0.weight": (512, 1024),
    "predictor.2.weight": (1024, 512),
}


def test_the_atari_network_has_the_layers_and_the_8_35_million_parameters_of_efficientzero():
    spec = atari_spec()
    network = Network(spec)
    weights = {name: tuple(p.shape) for name, p in network.named_parameters() if p.dim() > 1}
    assert weights == ATARI_WEIGHTS
    assert spec.board == (6, 6)
    assert spec.bins == 601
    assert sum(p.numel() for p in network.parameters()) == 8_346_584
    strides = [m.stride for m in network.representation.modules() if isinstance(m, nn.AvgPool2d)]
    assert strides == [2, 2]


def test_one_state_costs_the_flops_of_the_design():
    # Two operations a multiply-add. Representation, board by board: 48 x 48, 24 x 24, 12 x 12, 6 x 6.
    represent = 2 * 9 * (
        48 * 48 * (12 * 32 + 2 * 32 * 32)
        + 24 * 24 * (32 * 64 + 64 * 64 + 32 * 64 + 2 * 64 * 64)
        + 12 * 12 * 2 * 64 * 64
        + 6 * 6 * 2 * 64 * 64
    )  # fmt: skip
    blocks = 9 * 36 * (64 * 64 + 4 * 64 * 64)
    heads = 3 * 36 * 64 * 16 + (512 * 32 + 32 * 601) + (576 * 32 + 32 * 601) + (576 * 32 + 32 * 6)
    step = 2 * (blocks + heads + 4 * 512 * (576 + 512))
    plane = 2 * 9 * 36 * 64  # the training network's action plane; the snapshot has it cached

    network, snapshot = Network(atari_spec()).eval(), make_snapshot(atari_spec(), CPU)
    for net, extra in ((network, plane), (snapshot, 0)):
        with torch.no_grad():
            with FlopCounterMode(display=False) as counter:
                latent = net.represent(torch.zeros(1, 12, 96, 96))
            assert latent.shape == (1, 64, 6, 6)
            assert counter.get_total_flops() == represent
            with FlopCounterMode(display=False) as counter:
                net.predict(net.step(latent, net.initial_hidden(1), torch.zeros(1, dtype=torch.int64)).latent)
            assert counter.get_total_flops() == step + extra
    assert round(represent / 1e6) == 297
    assert round((step + plane) / 1e6, 1) == 18.2


@pytest.mark.parametrize(("height", "width"), [(1, 1), (10, 5), (16, 16), (4, 1)])
def test_small_boards_and_vectors_keep_their_size(height, width):
    spec = small(height, width)
    network = Network(spec)
    assert network.represent(torch.randn(2, 2, height, width)).shape == (2, 6, height, width)
    assert spec.board == (height, width)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 100), st.integers(17, 100), st.booleans())
def test_large_boards_are_halved_four_times_rounding_up(height, width, turned):
    height, width = (width, height) if turned else (height, width)
    spec = small(height, width)
    latent = Network(spec).represent(torch.zeros(2, 2, height, width))
    assert latent.shape == (2, 6, *spec.board)
    assert spec.board == (-(-height // 16), -(-width // 16))


def test_frames_of_84_pixels_give_a_latent_of_six():
    assert small(84, 84).board == (6, 6)  # 84, 42, 21, 11, 6


def test_a_vector_observation_goes_through_the_whole_network():
    config = resolve(preset_config("cpu"), image=False, atari=False)
    spec = network_spec(config, (4, 1, 1), 2)
    assert (spec.in_channels, spec.board) == (4, (1, 1))
    network = Network(spec)
    latent = network.represent(torch.randn(3, 4, 1, 1))
    transition = network.step(latent, network.initial_hidden(3), torch.tensor([0, 1, 1]))
    prediction = network.predict(transition.latent)
    assert prediction.policy.shape == (3, 2)
    assert prediction.value.shape == transition.prefix.shape == (3, 61)
    assert transition.hidden.shape == (3, 128)


@pytest.mark.parametrize("size", [5, 20])
def test_a_new_network_predicts_a_uniform_policy_and_zeros(size):
    torch.manual_seed(0)
    network = Network(small(size, size))
    for head in (network.prefix_head, network.value_head, network.policy_head):
        assert head.last.weight.eq(0).all()
        assert head.last.bias.eq(0).all()
    latent = network.represent(torch.randn(4, 2, size, size))
    _, _, prefix, policy, value = network.model_step(latent, network.initial_hidden(4), torch.tensor([0, 1, 2, 0]))
    assert policy.softmax(1).sub(1 / 3).abs().max() == 0
    assert prefix.abs().max() < 1e-6
    assert value.abs().max() < 1e-6


def test_the_action_convolution_is_a_convolution_over_a_plane_of_action_over_actions():
    torch.manual_seed(0)
    actions, batch = 4, 8
    layer = ActionConv(6, actions, (5, 3)).eval()
    layer.norm.running_mean.normal_()
    layer.norm.running_var.uniform_(0.5, 2)
    latent, action = torch.randn(batch, 6, 5, 3), torch.arange(batch) % actions
    plane = (action.float() / actions)[:, None, None, None].expand(batch, 1, 5, 3)
    textbook = layer.norm(F.conv2d(torch.cat((latent, plane), 1), layer.weight, padding=1))
    assert torch.allclose(layer(latent, action), F.relu(textbook + latent), atol=1e-5)


def test_the_action_plane_gets_the_gradient_that_the_textbook_convolution_gives_it():
    torch.manual_seed(0)
    layer = ActionConv(3, 4, (5, 3)).double()
    latent, action = torch.randn(6, 3, 5, 3).double(), torch.tensor([0, 1, 2, 3, 3, 1])
    plane = (action.double() / 4)[:, None, None, None].expand(6, 1, 5, 3)
    direction = torch.randn(6, 3, 5, 3).double()
    layer(latent, action).mul(direction).sum().backward()
    got = layer.weight.grad.clone()
    layer.weight.grad = None
    textbook = F.conv2d(torch.cat((latent, plane), 1), layer.weight, padding=1)
    F.relu(layer.norm(textbook) + latent).mul(direction).sum().backward()
    assert torch.allclose(got, layer.weight.grad)


@pytest.mark.parametrize("encoding", ["scalar", "one-hot"])
def test_a_plane_for_each_action_is_a_textbook_convolution_over_one_hot_planes(encoding):
    torch.manual_seed(0)
    layer = ActionConv(3, 4, (5, 3), encoding).double()
    assert layer.weight.shape == (3, 3 + (4 if encoding == "one-hot" else 1), 3, 3)
    if encoding == "one-hot":
        assert not layer.weight[:, 3:].any(), "no action differs from another before there is a reason"
        nn.init.normal_(layer.weight)
    latent, action = torch.randn(6, 3, 5, 3).double(), torch.tensor([0, 1, 2, 3, 3, 1])
    code = F.one_hot(action, 4).double() if encoding == "one-hot" else action[:, None].double() / 4
    planes = code[:, :, None, None].expand(-1, -1, 5, 3)
    direction = torch.randn(6, 3, 5, 3).double()
    got = layer(latent, action)
    got.mul(direction).sum().backward()
    mine, layer.weight.grad = layer.weight.grad.clone(), None
    textbook = F.relu(layer.norm(F.conv2d(torch.cat((latent, planes), 1), layer.weight, padding=1)) + latent)
    textbook.mul(direction).sum().backward()
    assert torch.allclose(got, textbook)
    assert torch.allclose(mine, layer.weight.grad)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 70), st.integers(17, 70))
def test_the_compact_representation_ends_at_an_eighth_of_the_side_rounded_up(height, width):
    spec = replace(small(height, width), representation="compact")
    assert Network(spec).represent(torch.zeros(2, 2, height, width)).shape == (2, 6, *spec.board)
    assert spec.board == (-(-height // 8), -(-width // 8))


def test_mixed_precision_stays_bf16_through_the_dynamics():
    """One fp32 factor of the action plane would turn all that follows it into fp32."""
    network = lived_in(small(5, 5))
    with torch.autocast("cpu", torch.bfloat16):
        latent = network.represent(torch.randn(2, network.spec.in_channels, 5, 5))
        following = network.advance(latent, torch.tensor([1, 2]))
        prediction = network.predict(following)
    assert latent.dtype == following.dtype == torch.bfloat16
    assert prediction.value.dtype == prediction.policy.dtype == torch.float32


def test_the_latent_is_added_to_the_first_convolution_of_the_dynamics_before_its_relu():
    network = lived_in(small(5, 5))
    latent, action = torch.randn(2, 6, 5, 5), torch.tensor([1, 2])
    entered = []
    network.dynamics_block.register_forward_hook(lambda module, inputs, output: entered.append(inputs[0]))
    network.step(latent, network.initial_hidden(2), action)
    conv = network.dynamics_conv
    plane = (action / network.spec.actions)[:, None, None, None].expand(2, 1, 5, 5)
    textbook = conv.norm(F.conv2d(torch.cat((latent, plane), 1), conv.weight, padding=1))
    assert torch.allclose(entered[0], F.relu(textbook + latent), atol=1e-6)


def test_the_lstm_state_is_output_and_cell_of_a_textbook_lstm_over_the_prefix_features():
    network = lived_in(small(5, 5))
    lstm = nn.LSTM(3 * 25, 7)
    cell = network.prefix_lstm
    with torch.no_grad():
        for mine, theirs in zip(
            lstm.parameters(), (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh), strict=True
        ):
            mine.copy_(theirs)
    latent, hidden = torch.randn(2, 6, 5, 5), network.initial_hidden(2)
    assert hidden.eq(0).all()
    features = []
    for action in (torch.tensor([0, 1]), torch.tensor([2, 2]), torch.tensor([1, 0])):
        latent, hidden, prefix = network.step(latent, hidden, action)
        features.append(F.relu(network.prefix_conv(latent)).flatten(1))
        outputs, (output, memory) = lstm(torch.stack(features))
        assert torch.allclose(hidden, torch.cat((output[0], memory[0]), 1), atol=1e-5)
        assert torch.allclose(prefix, network.prefix_head(F.relu(network.prefix_norm.norm(outputs[-1]))), atol=1e-4)


@pytest.mark.parametrize("size", [1, 5, 20])
@pytest.mark.parametrize("kind", [{}, {"representation": "compact", "action_encoding": "one-hot"}])
def test_the_snapshot_computes_what_the_network_computes_in_evaluation(size, kind):
    spec = replace(small(size, size), **kind)
    network, snapshot = lived_in(spec), make_snapshot(spec, CPU)
    fold(network, snapshot)
    observation, action = torch.rand(5, 2, size, size), torch.tensor([0, 1, 2, 0, 1])
    with torch.no_grad():
        latent, mine = network.represent(observation), snapshot.represent(observation)
        assert torch.allclose(mine, latent, rtol=1e-5, atol=1e-5)
        for got, wanted in zip(snapshot.predict(latent), network.predict(latent), strict=True):
            assert wanted.abs().max() > 0.1
            assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-5)
        hidden = torch.randn(5, 14)
        for got, wanted in zip(
            snapshot.step(latent, hidden, action), network.step(latent, hidden, action), strict=True
        ):
            assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-5)
        for got, wanted in zip(
            snapshot.model_step(latent, hidden, action), network.model_step(latent, hidden, action), strict=True
        ):
            assert got.shape == wanted.shape
            assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_the_model_step_of_the_search_is_a_step_and_its_prediction_as_scalars():
    network = lived_in(small(5, 5))
    latent, hidden, action = torch.randn(4, 6, 5, 5), torch.randn(4, 14), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        step = network.step(latent, hidden, action)
        policy, value = network.predict(step.latent)
        wanted = (step.latent, step.hidden, to_scalar(step.prefix), policy, to_scalar(value))
        for got, want in zip(network.model_step(latent, hidden, action), wanted, strict=True):
            assert torch.equal(got, want)


def test_folding_copies_in_place_and_leaves_the_network_alone():
    spec = small()
    snapshot = make_snapshot(spec, CPU)
    tensors = {name: tensor.data_ptr() for name, tensor in snapshot.state_dict(keep_vars=True).items()}
    for seed in (0, 1):
        network = lived_in(spec, seed)
        before = copy.deepcopy(network.state_dict())
        fold(network, snapshot)
        assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
        with torch.no_grad():
            x = torch.rand(2, 2, 20, 20)
            assert torch.allclose(snapshot.represent(x), network.represent(x), rtol=1e-4, atol=1e-5)
    assert {name: tensor.data_ptr() for name, tensor in snapshot.state_dict(keep_vars=True).items()} == tensors
    assert not any(parameter.requires_grad for parameter in snapshot.parameters())


def test_a_snapshot_can_be_of_lower_precision_than_its_network():
    spec = small(5, 5)
    network, snapshot = lived_in(spec), make_snapshot(spec, CPU).bfloat16()
    fold(network, snapshot)
    x = torch.rand(3, 2, 5, 5)
    with torch.no_grad():
        got, wanted = snapshot.represent(x.bfloat16()), network.represent(x)
    assert got.dtype == torch.bfloat16
    assert (got.float() - wanted).norm() < 0.03 * wanted.norm()
    assert snapshot.initial_hidden(2).dtype == torch.bfloat16


@pytest.mark.parametrize("spec", [small(), small(5, 5)])
def test_the_outline_of_a_network_has_the_shapes_of_the_network_and_no_memory(spec):
    hollow, whole = outline(spec).state_dict(), Network(spec).state_dict()
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in hollow.items()} == {n: (t.shape, t.dtype) for n, t in whole.items()}
    assert {tensor.device.type for tensor in hollow.values() if tensor.numel() > 1} == {"meta"}
    assert torch.ones(1).device.type == "cpu"
