from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from speedyzero import layers, nets
from speedyzero.config import preset_config, resolve
from speedyzero.nets import ActionConv, Network, outline
from speedyzero.sizes import NetworkSpec, network_spec
from speedyzero.snapshot import fold, make_snapshot
from speedyzero_kernels import dispatch
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


def test_the_atari_network_has_the_8_35_million_parameters_of_efficientzero():
    assert sum(p.numel() for p in Network(atari_spec()).parameters()) == 8_346_584


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


@pytest.mark.parametrize(
    ("height", "width", "kind", "board"),
    [
        (1, 1, "efficientzero", (1, 1)), (10, 5, "efficientzero", (10, 5)), (16, 16, "compact", (16, 16)),  # small ones keep their size
        (96, 96, "efficientzero", (6, 6)), (84, 84, "efficientzero", (6, 6)), (17, 1, "efficientzero", (2, 1)),
        (33, 50, "efficientzero", (3, 4)), (64, 64, "compact", (8, 8)), (9, 33, "compact", (2, 5)),  # a 16th or an 8th, rounded up
    ],
)  # fmt: skip
def test_the_board_of_the_latent(height, width, kind, board):
    spec = replace(small(height, width), representation=kind)
    assert Network(spec).represent(torch.zeros(2, 2, height, width)).shape == (2, 6, *board)
    assert spec.board == board


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


@pytest.mark.parametrize("encoding", ["scalar", "one-hot"])
def test_the_first_convolution_of_the_dynamics_is_a_textbook_one_over_the_latent_and_the_actions_planes(encoding):
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


def test_mixed_precision_stays_bf16_through_the_dynamics():
    """One fp32 factor of the action plane would turn all that follows it into fp32."""
    network = lived_in(small(5, 5))
    with torch.autocast("cpu", torch.bfloat16):
        latent = network.represent(torch.randn(2, network.spec.in_channels, 5, 5))
        following = network.advance(latent, torch.tensor([1, 2]))
        prediction = network.predict(following)
    assert latent.dtype == following.dtype == torch.bfloat16
    assert prediction.value.dtype == prediction.policy.dtype == torch.float32


def test_the_lstm_state_is_output_and_cell_of_a_textbook_lstm_over_the_prefix_features():
    network = lived_in(small(5, 5))
    lstm = nn.LSTM(3 * 25, 7)
    cell = network.prefix_lstm
    with torch.no_grad():
        for mine, theirs in zip(lstm.parameters(), (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh), strict=True):
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


def test_an_unroll_is_one_step_after_the_other_with_something_between():
    network, actions = lived_in(small(5, 5)), torch.tensor([[0, 1, 2], [2, 2, 1]])
    latent = torch.randn(2, 6, 5, 5)
    latents, wanted = network.unroll(latent, actions, lambda x: x / 2), [latent]
    for k in range(3):
        wanted.append(network.advance(wanted[-1], actions[:, k]) / 2)
    assert len(latents) == 4
    assert all(torch.equal(a, b) for a, b in zip(latents, wanted, strict=True))


def test_the_lstm_over_all_features_at_once_is_the_lstm_step_by_step_and_so_are_its_gradients():
    network, steps, horizon, batch = lived_in(small(5, 5)), 7, 3, 4
    weights = list(network.prefix_lstm.parameters())
    features, upstream = torch.randn(steps * batch, 75, requires_grad=True), torch.randn(steps * batch, 7)
    one_by_one, hidden = [], None
    for k, each in enumerate(features.split(batch)):
        hidden = network.remember(each, network.initial_hidden(batch) if k % horizon == 0 else hidden)
        one_by_one.append(hidden[:, :7])
    found = []
    for outputs in (one_by_one, network.outputs(features, batch, horizon)):
        outputs = torch.cat(outputs)
        found.append([outputs, *torch.autograd.grad(outputs, [features, *weights], upstream)])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("encoding", ["scalar", "one-hot"])
def test_the_maps_of_all_steps_as_a_product_are_those_that_an_index_finds_and_so_is_their_gradient(monkeypatch, encoding):
    network = lived_in(replace(small(5, 4), action_encoding=encoding))
    conv, actions = network.dynamics_conv, torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]])
    upstream, found = torch.randn(4, 2, 6, 5, 4), []
    for kernel in (False, True):
        monkeypatch.setattr(dispatch, "runs_kernel", lambda x, kernel=kernel: kernel)
        parts = conv.split(actions)
        weights, maps = zip(*parts, strict=True)
        assert all(torch.equal(weight, conv.weight[:, :6]) for weight in weights)
        found.append((maps := torch.stack(maps), *torch.autograd.grad(maps, [conv.weight], upstream)))
    assert parts[0][1].is_contiguous(memory_format=torch.channels_last), "as the convolution's result lies"
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-5)


def test_on_the_kernels_a_step_of_the_search_is_that_of_the_layers_one_by_one(monkeypatch):
    spec = small(5, 4)
    snapshot = make_snapshot(spec, CPU)
    fold(lived_in(spec), snapshot)
    latent = torch.randn(3, 6, 5, 4).contiguous(memory_format=torch.channels_last)
    arguments = latent, torch.randn(3, 14), torch.tensor([0, 2, 1])
    want = snapshot.model_step(*arguments)
    monkeypatch.setattr(dispatch, "runs_kernel", lambda x: True)
    made = []
    monkeypatch.setattr(nets, "read_out", lambda *given, **more: made.append(given[0]) or layers.read_out(*given, **more))
    for mine, theirs in zip(snapshot.model_step(*arguments), want, strict=True):
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert len(made) == 3
    assert not make_snapshot(replace(spec, head_hidden=129), CPU).fused_heads


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
        for step in ("step", "model_step"):
            mine, theirs = (getattr(net, step)(latent, hidden, action) for net in (snapshot, network))
            for got, wanted in zip(mine, theirs, strict=True):
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


def test_with_mixed_precision_a_snapshot_is_bf16_but_for_the_last_layer_of_every_head():
    spec = small(5, 5)
    network, snapshot = lived_in(spec), make_snapshot(spec, CPU, amp=True)
    fold(network, snapshot)
    x = torch.rand(3, 2, 5, 5)
    with torch.no_grad():
        got, wanted = snapshot.represent(x.bfloat16()), network.represent(x)
        value = snapshot.predict(got).value
    assert (got.dtype, snapshot.initial_hidden(2).dtype, value.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert (got.float() - wanted).norm() < 0.03 * wanted.norm()
    assert torch.equal(snapshot.value_head.last.weight, network.value_head.last.weight)


def test_the_outline_of_a_network_has_the_shapes_of_the_network_and_no_memory():
    hollow, whole = outline(small()).state_dict(), Network(small()).state_dict()
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in hollow.items()} == {n: (t.shape, t.dtype) for n, t in whole.items()}
    assert {tensor.device.type for tensor in hollow.values() if tensor.numel() > 1} == {"meta"}
    assert torch.ones(1).device.type == "cpu"
