import dataclasses

import pytest
import torch
from torch import nn

from speedyzero.optim import SGD, ClippedLARS, FlatClippedLARS, FlatParameters, RunningStatistics, make_optimizer
from speedyzero.sizes import network_spec
from speedyzero.state import make_network
from tests.algorithm.learn_support import TINY


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5))


def loss_of(model: nn.Module, seed: int) -> torch.Tensor:
    x = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
    return model(x).square().sum()


def test_parameters_and_gradients_are_views_of_the_flat_buffers_in_order():
    model = small_model()
    before = [p.detach().clone() for p in model.parameters()]
    flat = FlatParameters(model)
    start = 0
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
        assert parameter.data_ptr() == flat.values.data_ptr() + 4 * start
        assert parameter.grad.data_ptr() == flat.grads.data_ptr() + 4 * start
        start += parameter.numel()
    assert flat.values.numel() == flat.grads.numel() == flat.momentum.numel() == start
    loss_of(model, 1).backward()
    assert torch.equal(flat.grads, torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
    assert flat.grads.any(), "added into the buffer, not beside it"


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_any_dtype_and_layout_come_to_their_places_and_one_that_is_missing_is_zero(layout):
    model = small_model().to(memory_format=layout)
    flat, random = FlatParameters(model), torch.Generator().manual_seed(0)
    flat.grads.fill_(torch.nan)
    given = [torch.randn(p.shape, generator=random).to(torch.bfloat16 if p.dim() > 1 else torch.float32) for p in model.parameters()]
    flat.take([None if i == 1 else gradient for i, gradient in enumerate(given)])
    for i, (parameter, gradient) in enumerate(zip(model.parameters(), given, strict=True)):
        assert torch.equal(parameter.grad, gradient.float() if i != 1 else torch.zeros_like(parameter)), i


def test_the_halves_are_rounded_copies_of_the_weights_of_today_in_their_layout():
    model = small_model().to(memory_format=torch.channels_last)
    flat = FlatParameters(model)
    with torch.no_grad():
        model[0].weight.mul_(3.0)
    halves = flat.halves({"0.weight", "4.bias"})
    assert set(halves) == {"0.weight", "4.bias"}
    for name, half in halves.items():
        own = model.get_parameter(name)
        assert (half.stride(), half.requires_grad, half.is_leaf) == (own.stride(), True, True)
        assert torch.equal(half, own.bfloat16())
        assert half.data_ptr() % 16 == 0


@pytest.mark.parametrize("optimizer", [SGD, FlatClippedLARS])
def test_weights_that_lie_channels_last_keep_their_order_and_learn_the_same(optimizer):
    plain, last = small_model(), small_model().to(memory_format=torch.channels_last)
    rows = optimizer(plain, 0.1, 0.9, 1e-2), optimizer(last, 0.1, 0.9, 1e-2)
    weight = last[0].weight
    assert weight.stride() == weight.grad.stride() == (18, 1, 6, 2)
    assert torch.equal(weight, plain[0].weight)
    # In the buffer the two input channels of a pixel are neighbours.
    assert torch.equal(rows[1].flat.values[:2], weight[0, :, 0, 0])
    for step in range(3):
        for model, mine in zip((plain, last), rows, strict=True):
            mine.zero_grad()
            loss_of(model, step).backward()
            mine.step()
    for (name, a), b in zip(plain.named_parameters(), last.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(rows[1].flat.views(rows[1].flat.momentum)[name], rows[0].flat.views(rows[0].flat.momentum)[name])
    assert last[0].weight.stride() == (18, 1, 6, 2)


@pytest.mark.parametrize(
    ("kind", "module", "says"),
    [
        (FlatParameters, nn.ReLU(), "has no parameters"),
        (FlatParameters, nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).bfloat16()), "must be float32"),
        (FlatParameters, nn.Linear(2, 2).double(), "must be float32"),
        (RunningStatistics, nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "has no BatchNorm"),
    ],
)
def test_a_module_that_cannot_be_flattened_is_refused(kind, module, says):
    with pytest.raises(ValueError, match=says):
        kind(module)


def lars_by_hand(weight, grad, velocity, lr, momentum, decay, eta, clip):
    """One step of one tensor, in doubles."""
    if weight.dim() > 1:
        decayed = grad + decay * weight
        rate = min(eta * weight.norm().item() / (decayed.norm().item() + 1e-9), clip) if weight.norm() > 0 else min(1.0, clip)
        velocity = momentum * velocity + rate * decayed
    else:
        velocity = momentum * velocity + grad
    return weight - lr * velocity, velocity


@pytest.mark.parametrize(("eta", "clip", "max_norm"), [(0.02, 1.0, None), (50.0, 1.0, 2.0), (0.5, 0.1, None)])
def test_clipped_lars_steps_every_tensor_by_its_own_clipped_rate(eta, clip, max_norm):
    model = small_model()
    with torch.no_grad():
        model[4].weight.zero_()  # a layer that starts at zero
    optimizer = FlatClippedLARS(model, 0.1, 0.9, 0.01, eta, clip, max_norm)
    weights = [p.detach().double().clone() for p in model.parameters()]
    velocities = [torch.zeros_like(w) for w in weights]
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        optimizer.flat.grads.copy_(torch.randn(optimizer.flat.grads.shape, generator=generator))
        norm = optimizer.flat.grads.double().norm()
        scale = 1 if max_norm is None else min(1, max_norm / norm)
        for i, parameter in enumerate(model.parameters()):
            grad = parameter.grad.double() * scale
            weights[i], velocities[i] = lars_by_hand(weights[i], grad, velocities[i], 0.1, 0.9, 0.01, eta, clip)
        assert torch.allclose(optimizer.step()[0].double(), norm)
        for parameter, weight in zip(model.parameters(), weights, strict=True):
            assert torch.allclose(parameter.double(), weight, rtol=1e-4, atol=1e-6)


def normed_model() -> nn.Module:
    """Two BatchNorms of odd sizes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5))


def bits(state: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in state.items()}


def test_running_statistics_are_views_under_their_names_and_learned_as_before():
    mine, theirs = normed_model(), normed_model()
    statistics = RunningStatistics(mine)
    live = mine.state_dict()
    assert list(live) == list(theirs.state_dict())
    for seed in range(3):
        loss_of(mine, seed)
        loss_of(theirs, seed)
        # Taken before the passes: `state_dict` gives what lives on, not copies.
        assert bits(live) == bits(theirs.state_dict())
    expected = torch.cat([theirs[i].get_buffer(name) for i in (1, 5) for name in ("running_mean", "running_var")])
    assert torch.equal(statistics.values[statistics.values != 0], expected)
    assert all(mine.get_buffer(name).data_ptr() % 64 == statistics.kept.data_ptr() % 64 for name, _ in mine.named_buffers())
    assert live["1.num_batches_tracked"] == live["5.num_batches_tracked"] == 3


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1.0])
def test_what_a_forward_pass_left_in_the_statistics_is_taken_back_only_if_it_is_wanted(bad):
    model = normed_model()
    statistics = RunningStatistics(model)
    loss_of(model, 0)
    statistics.keep()
    before = bits(model.state_dict())
    model(torch.full((6, 2, 4, 4), bad))
    after = bits(model.state_dict())
    assert statistics.values.isfinite().all() == (bad == 1.0)
    statistics.restore(torch.tensor(False))
    assert bits(model.state_dict()) == after != before
    statistics.restore(torch.tensor(True))
    assert bits(model.state_dict()) == before


def test_the_config_names_the_optimiser_and_its_settings():
    lr = torch.zeros(())
    config = dataclasses.replace(TINY, momentum=0.5, weight_decay=0.01, max_grad_norm=3.0)
    sgd = make_optimizer(nn.Linear(2, 2), config, lr)
    assert isinstance(sgd, SGD)
    assert (sgd.lr is lr, sgd.momentum, sgd.weight_decay, sgd.max_grad_norm) == (True, 0.5, 0.01, 3.0)
    config = dataclasses.replace(config, optimizer="clipped-lars", trust_coefficient=0.3, trust_clip=0.7)
    lars = make_optimizer(nn.Linear(2, 2), config, lr)
    assert isinstance(lars, FlatClippedLARS)
    assert (lars.lr is lr, lars.momentum, lars.weight_decay, lars.max_grad_norm) == (True, 0.5, 0.01, 3.0)
    assert (lars.trust_coefficient, lars.trust_clip) == (0.3, 0.7)
    assert not lars.segments.plain


def test_the_last_layers_of_a_network_which_start_at_zero_take_the_plain_rate():
    network = make_network(network_spec(TINY, (1, 3, 3), 3), 0, torch.device("cpu"))
    lars = make_optimizer(network, dataclasses.replace(TINY, optimizer="clipped-lars"), torch.zeros(()))
    names = [name for name, _ in network.named_parameters()]
    plain = {names[place] for place in lars.segments.plain}
    assert plain == {"prefix_head.last.weight", "value_head.last.weight", "policy_head.last.weight"}
    assert plain == {name for name, weight in network.named_parameters() if weight.dim() > 1 and not weight.any()}


def taught(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, begin: int = 0, after=lambda: None) -> list[torch.Tensor]:
    for seed in range(begin, begin + steps):
        model.zero_grad()  # the module's own, which sets to None
        loss_of(model, seed).backward()
        optimizer.step()
        after()
    return [p.detach().clone() for p in model.parameters()]


def assert_alike(theirs: nn.Module, flat: FlatClippedLARS, mine: nn.Module, optimizer: ClippedLARS) -> None:
    """Two copies of a module come to the same weights in four steps, one by each optimiser."""
    for seed in range(4):
        flat.zero_grad()
        loss_of(theirs, seed).backward()
        flat.step()
    for a, b in zip(taught(mine, optimizer, 4), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


LARS = {"momentum": 0.9, "weight_decay": 0.01, "trust_coefficient": 0.5, "trust_clip": 0.8}


def test_the_public_clipped_lars_takes_the_steps_of_the_flat_one():
    theirs, mine = small_model(), small_model()
    for model in (theirs, mine):
        model[4].weight.data.zero_()
    flat = FlatClippedLARS(theirs, 0.1, **LARS)
    optimizer = ClippedLARS(mine.parameters(), 0.1, **LARS)
    assert_alike(theirs, flat, mine, optimizer)
    assert all(p.grad is not None for p in mine.parameters())
    optimizer.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in mine.parameters())


@pytest.mark.parametrize("clip", [0.8, 1.0, 30.0])
def test_a_plain_layer_is_a_group_of_infinite_trust(clip):
    theirs, mine = small_model(), small_model()
    for model in (theirs, mine):
        model[4].weight.data.mul_(1e-3)  # so small that its own rate would be
    flat = FlatClippedLARS(theirs, 0.1, **LARS | {"trust_clip": clip}, plain={"4.weight"})
    plain = {"params": [mine[4].weight], "trust_coefficient": torch.inf, "trust_clip": min(1.0, clip)}
    others = {"params": [p for p in mine.parameters() if p is not mine[4].weight]}
    optimizer = ClippedLARS([plain, others], 0.1, **LARS | {"trust_clip": clip})
    assert_alike(theirs, flat, mine, optimizer)
    assert mine[4].weight.norm() > 0.01


def test_each_group_of_clipped_lars_has_its_own_options():
    groups, alone = small_model(), [small_model(), small_model()]
    other = {"lr": 0.3, "momentum": 0.5, "weight_decay": 0.2, "trust_coefficient": 0.01, "trust_clip": 0.1, "eps": 1.0}
    options = [LARS | {"lr": 0.1}, other]
    optimizer = ClippedLARS([{"params": groups[0].parameters(), **options[0]}, {"params": groups[4].parameters(), **options[1]}])
    loss_of(groups, 0).backward()
    optimizer.step()
    for layer, model, given in zip((0, 4), alone, options, strict=True):
        loss_of(model, 0).backward()
        ClippedLARS(model[layer].parameters(), **given).step()
        for a, b in zip(groups[layer].parameters(), model[layer].parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("tensor", [False, True])
def test_a_scheduler_sets_the_rate_of_clipped_lars(tensor):
    scheduled, by_hand = small_model(), small_model()
    optimizer = ClippedLARS(scheduled.parameters(), torch.tensor(0.1) if tensor else 0.1, **LARS)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)
    hand = ClippedLARS(by_hand.parameters(), 0.1, **LARS)
    got, want = taught(scheduled, optimizer, 4, after=scheduler.step), taught(by_hand, hand, 2)
    hand.param_groups[0]["lr"] = 0.01
    for a, b in zip(got, taught(by_hand, hand, 2, begin=2), strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.equal(got[0], want[0])


def test_clipped_lars_goes_on_from_its_state_dict(tmp_path):
    whole, broken = small_model(), small_model()
    want = taught(whole, ClippedLARS(whole.parameters(), 0.1, **LARS), 5)
    optimizer = ClippedLARS(broken.parameters(), 0.1, **LARS)
    taught(broken, optimizer, 3)
    torch.save([broken.state_dict(), optimizer.state_dict()], tmp_path / "saved.pt")
    other = small_model(seed=1)
    resumed = ClippedLARS(other.parameters(), 5.0)
    for target, state in zip((other, resumed), torch.load(tmp_path / "saved.pt", weights_only=True), strict=True):
        target.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(taught(other, resumed, 2, begin=3), want, strict=True))


def test_clipped_lars_calls_its_closure_with_gradients_and_returns_the_loss():
    one, two = small_model(), small_model()
    optimizer = ClippedLARS(one.parameters(), 0.1, **LARS)
    want = loss_of(small_model(), 0)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(one, 0)
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert loss.item() == want.item()
    assert all(torch.equal(a, b) for a, b in zip(taught(two, ClippedLARS(two.parameters(), 0.1, **LARS), 1), one.parameters(), strict=True))


def test_clipped_lars_moves_nothing_that_is_frozen_or_has_no_gradient():
    model = small_model()
    optimizer = ClippedLARS(model.parameters(), 0.1, **LARS)
    before = taught(model, optimizer, 1)
    model[0].requires_grad_(False)  # its gradients and momentum are still there
    model[4].bias.grad = None
    model[4].weight.grad.fill_(1.0)
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert moved == [False, False, True, True, True, False]


@pytest.mark.parametrize(
    "bad",
    [{"lr": -1.0}, {"momentum": 1.0}, {"momentum": -0.1}, {"weight_decay": -1e-4}, {"trust_coefficient": 0.0}, {"trust_clip": 0.0},
     {"eps": -1.0}, {"lr": float("nan")}],
)  # fmt: skip
def test_an_option_of_clipped_lars_out_of_range_is_named(bad):
    with pytest.raises(ValueError, match=f"^{next(iter(bad))}: "):
        ClippedLARS([{"params": small_model().parameters(), **bad}])


def test_clipped_lars_refuses_a_sparse_gradient():
    table = nn.Embedding(3, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        ClippedLARS(table.parameters()).step()
