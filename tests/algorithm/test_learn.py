"""The loss, and one update."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

from speedyzero.batch import Batch, draw, gather_batch
from speedyzero.config import Config
from speedyzero.learn import losses, update
from speedyzero.nets import Prediction
from speedyzero.precision import half_weights, mixed_precision
from speedyzero.snapshot import fold, make_snapshot
from speedyzero_kernels import dispatch
from speedyzero_kernels.nstep import Targets
from speedyzero_kernels.support import to_scalar
from tests.algorithm.learn_support import CPU, TINY, drawn_positions, filled_ring, generator, new_learner

# The loss


class Toy(nn.Module):
    """A model in doubles that treats every sample alone: no BatchNorm, so a loop over samples is exact."""

    def __init__(self, actions: int = 3, width: int = 4, memory: int = 3, bins: int = 9):
        super().__init__()

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(0.5 * torch.randn(*shape, dtype=torch.float64))

        self.memory = memory
        self.w_represent, self.w_dynamics, self.w_action = weight(4, width), weight(width, width), weight(actions, width)
        self.w_memory, self.w_prefix = weight(width + memory, memory), weight(memory, bins)
        self.w_policy, self.w_value = weight(width, actions), weight(width, bins)
        self.w_project, self.w_predict = weight(width, 5), weight(5, 5)

    def represent(self, observation):
        return torch.tanh(observation.double().flatten(1) @ self.w_represent)

    def initial_hidden(self, batch):
        return torch.zeros(batch, self.memory, dtype=torch.float64)

    def advance(self, latent, action):
        return torch.tanh(latent @ self.w_dynamics + self.w_action[action])

    def unroll(self, latent, actions, between):
        latents = [latent]
        for action in actions.unbind(1):
            latents.append(between(self.advance(latents[-1], action)))
        return latents

    def prefix_features(self, latent):
        return torch.sin(latent)

    def remember(self, features, hidden):
        return torch.tanh(torch.cat((features, hidden), 1) @ self.w_memory)

    def prefix(self, hidden):
        return hidden @ self.w_prefix

    def predict(self, latent):
        return Prediction(latent @ self.w_policy, latent @ self.w_value)

    def projection(self, latent):
        return torch.tanh(latent @ self.w_project)

    def predictor(self, projected):
        return projected @ self.w_predict


def categorical_cross_entropy(logits, scalar, size=4):
    squashed = math.copysign(math.sqrt(abs(scalar) + 1) - 1, scalar) + 0.001 * scalar
    squashed = min(max(squashed, -size), size)
    low = min(math.floor(squashed), size - 1)
    logs = logits - logits.exp().sum().log()
    return -(1 - (squashed - low)) * logs[low + size] - (squashed - low) * logs[low + 1 + size]


def plain_loss(network, batch, config):
    """EfficientZero's loss, one sample and one step at a time: sum over the batch, and the parts."""
    goal, steps, size = batch.targets, config.unroll, batch.weights.shape[0]
    parts = {"value_prefix_loss": 0.0, "value_loss": 0.0, "policy_loss": 0.0, "consistency_loss": 0.0}
    whole = 0.0
    for b in range(size):
        own = dict.fromkeys(parts, 0.0)
        latent = network.represent(batch.observation[b : b + 1])
        hidden = network.initial_hidden(1)
        for k in range(steps + 1):
            if k > 0:
                if (k - 1) % config.lstm_horizon == 0:
                    hidden = network.initial_hidden(1)
                latent = network.advance(latent, goal.action[b, k - 1 : k])
                latent.register_hook(lambda gradient: gradient / 2)
                hidden = network.remember(network.prefix_features(latent), hidden)
                prefix = network.prefix(hidden)
                if goal.mask[b, k] == 1:
                    own["value_prefix_loss"] += categorical_cross_entropy(prefix[0], goal.prefix[b, k - 1].item())
                    real = network.projection(network.represent(batch.future[b * steps + k - 1][None]))[0].detach()
                    guess = network.predictor(network.projection(latent))[0]
                    own["consistency_loss"] -= (guess @ real) / (guess.norm() * real.norm())
            policy, value = network.predict(latent)
            if goal.mask[b, k] == 1:
                own["value_loss"] += categorical_cross_entropy(value[0], goal.value[b, k].item())
            if goal.policy_mask[b, k] == 1:
                logs = policy[0] - policy[0].exp().sum().log()
                own["policy_loss"] += -sum(goal.policy[b, k, a].item() * logs[a] for a in range(3))
        combined = (
            config.prefix_weight * own["value_prefix_loss"] + config.value_weight * own["value_loss"]
            + config.policy_weight * own["policy_loss"] + config.consistency_weight * own["consistency_loss"]
        )  # fmt: skip
        whole = whole + batch.weights[b].item() * combined / steps / size
        for name, part in own.items():
            parts[name] += part.item() / steps / size if isinstance(part, torch.Tensor) else 0.0
    return whole, parts


def toy_batch(size: int, steps: int, seed: int = 0) -> Batch:
    """Random targets, those that a mask leaves out included."""
    random = generator(seed)
    ends = torch.arange(size) % (steps + 2)  # sample b dies at position b; the last kind lives on
    positions = torch.arange(steps + 1)
    policy = torch.rand(size, steps + 1, 3, generator=random)
    mask, policy_mask = (positions <= ends[:, None]).float(), (positions < ends[:, None]).float()
    return Batch(
        observation=torch.randn(size, 1, 2, 2, generator=random),
        future=torch.randn(size * steps, 1, 2, 2, generator=random),
        targets=Targets(
            value=4 * torch.randn(size, steps + 1, generator=random),
            prefix=4 * torch.randn(size, steps, generator=random),
            policy=policy / policy.sum(2, keepdim=True),
            action=torch.randint(3, (size, steps), generator=random),
            mask=mask,
            policy_mask=policy_mask,
        ),
        weights=torch.rand(size, generator=random),
    )


@pytest.mark.parametrize("horizon", [1, 2, 5])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_loss_its_parts_and_its_gradients_are_those_of_a_loop_over_samples_and_steps(steps, horizon):
    torch.manual_seed(0)
    mine = Toy()
    theirs = copy.deepcopy(mine)
    config = Config(unroll=steps, lstm_horizon=horizon, prefix_weight=1.5, policy_weight=0.75)
    batch = toy_batch(2 * (steps + 2), steps)
    batch.future.requires_grad_()
    loss, metrics, value = losses(mine, batch, config)
    expected, parts = plain_loss(theirs, batch, config)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert {name: metrics[name].item() for name in parts} == pytest.approx(parts, rel=1e-6)
    assert metrics["loss"].item() == loss.item()
    root = theirs.predict(theirs.represent(batch.observation)).value
    assert torch.allclose(value, to_scalar(root))
    assert not value.requires_grad
    loss.backward()
    assert batch.future.grad is None, "what really came next is a fixed target"
    expected.backward()
    for (name, a), b in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        assert b.grad.abs().sum() > 0, name
        assert torch.allclose(a.grad, b.grad, rtol=1e-7, atol=1e-12), name


def test_comparing_some_of_the_steps_weighs_them_as_all():
    torch.manual_seed(0)
    network, batch = Toy(), toy_batch(6, 3)
    only_consistency = {"prefix_weight": 0.0, "value_weight": 0.0, "policy_weight": 0.0}
    config = Config(unroll=3, **only_consistency)
    by_step, each = batch.future.unflatten(0, (6, 3)), []
    for step in (1, 2, 3):
        one = dataclasses.replace(batch, future=by_step[:, step - 1], compared=torch.tensor([step]))
        each.append(losses(network, one, config)[0])
    two = dataclasses.replace(batch, future=by_step[:, [2, 0]].flatten(0, 1), compared=torch.tensor([3, 1]))
    assert losses(network, batch, config)[0].item() == pytest.approx(sum(loss.item() for loss in each) / 3)
    assert losses(network, two, config)[0].item() == pytest.approx((each[2] + each[0]).item() / 2)


def test_an_update_writes_the_priorities_of_exactly_its_batch_and_duplicates_keep_the_greatest():
    config = dataclasses.replace(TINY, augment=True, shift=1, intensity=0.3, batch_size=16)
    ring, learner, index = filled_ring(config), new_learner(config), drawn_positions()
    for head in (learner.network.value_head, learner.network.policy_head):
        nn.init.normal_(head.last.weight)
    ring.priority *= 100  # what was there must neither stay nor be mixed in
    before, network = ring.priority.clone().view(-1), copy.deepcopy(learner.network)
    updates = torch.tensor(7)
    random, same = generator(5), generator(5)
    metrics = update(learner, ring, index, torch.ones(16), updates, config, random)

    batch = gather_batch(ring, index, torch.ones(16), config, same)
    value = losses(network, batch, config)[2]
    error = (value - batch.targets.value[:, 0]).abs() + 1e-6
    greatest: dict[int, float] = {}
    for position, e in zip(index.tolist(), error.tolist(), strict=True):
        greatest[position] = max(greatest.get(position, 0.0), e)
    assert len(greatest) == 12
    assert error[1] != error[2], "augmented apart"
    for position in range(80):
        expected = greatest.get(position, before[position].item())
        assert ring.priority.view(-1)[position].item() == pytest.approx(expected, rel=1e-4)
    assert updates == 8
    assert metrics["train/priority"].item() == pytest.approx(error.mean().item(), rel=1e-4)
    assert metrics["train/value_abs_max"].item() == pytest.approx(value.abs().max().item(), rel=1e-4)


def test_updates_are_steps_of_sgd_on_the_gradient_of_the_loss():
    """Two of them: momentum goes on, the gradient of the first does not."""
    config = dataclasses.replace(TINY, lr_warmup=0.01, max_grad_norm=1.0)
    ring, learner = filled_ring(config), new_learner(config)
    network = copy.deepcopy(learner.network)
    sgd = torch.optim.SGD(network.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4)
    index, weights = drawn_positions(), torch.linspace(0.1, 1, 16)
    updates = torch.tensor(499)
    for step in (500, 501):
        metrics = update(learner, ring, index, weights, updates, config, generator())
        loss, _, _ = losses(network, gather_batch(ring, index, weights, config, generator()), config)
        sgd.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        sgd.param_groups[0]["lr"] = 0.05 * step / (0.01 * 400_000)
        sgd.step()
        for (name, mine), theirs in zip(learner.network.named_parameters(), network.parameters(), strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-7), name
        assert metrics["train/grad_norm"].item() == pytest.approx(norm.item(), rel=1e-4)
        assert metrics["train/learning_rate"].item() == pytest.approx(0.05 * step / 4000)
        assert metrics["losses/loss"].item() == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_mixed_precision_gives_every_part_the_gradient_of_full_precision_but_for_rounding(monkeypatch, kernels):
    """In the projection above all, which the batch passes under no_grad too: autocast keeps what it cast.

    On the kernels too, which are stricter about dtypes and layouts, and on CUDA are all that runs.
    """
    ring = filled_ring(TINY)
    gradients, values = [], []
    for amp in (False, True):
        monkeypatch.setattr(dispatch, "runs_kernel", lambda x, forced=amp and kernels: forced)
        config = dataclasses.replace(TINY, amp=amp)
        learner = new_learner(config)
        # The heads start at zero, and what lies before them would get no gradient.
        for name, parameter in learner.network.named_parameters():
            if "last.weight" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=generator())
        index, weights = drawn_positions(), torch.ones(16)
        batch = gather_batch(ring, index, weights, config, generator())
        assert batch.observation.dtype == batch.future.dtype == (torch.bfloat16 if amp else torch.float32)
        with mixed_precision(config.amp, weights):
            loss, _, _ = losses(learner.network, batch, config)
        loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in learner.network.named_parameters()})
        values.append(loss.item())
    assert values[0] != values[1]
    assert values[1] == pytest.approx(values[0], rel=0.02)
    for part in ("representation", "dynamics", "prefix", "prediction", "value", "policy", "projection", "predictor"):
        full, mixed = (torch.cat([g.flatten() for name, g in each.items() if name.startswith(part)]) for each in gradients)
        assert torch.nn.functional.cosine_similarity(full, mixed, dim=0) > 0.93, part
        assert mixed.norm().item() == pytest.approx(full.norm().item(), rel=0.15), part
    assert all(gradient.dtype == torch.float32 for gradient in gradients[1].values())


def test_the_copies_in_half_precision_give_the_loss_and_the_gradients_that_autocast_gives():
    config = dataclasses.replace(TINY, amp=True)
    ring, learner = filled_ring(config), new_learner(config)
    network, flat = learner.network, learner.optimizer.flat
    # On a CPU autocast leaves the LSTM's state in fp32; on CUDA it is bf16, as the copies make it.
    network.initial_hidden = lambda batch: torch.zeros(batch, 2 * config.lstm)
    for head in (network.value_head, network.policy_head, network.prefix_head):
        nn.init.normal_(head.last.weight, std=0.1, generator=generator())
    index, weights = drawn_positions(), torch.ones(16)
    batch = gather_batch(ring, index, weights, config, generator())
    own = dict(network.named_parameters())
    with mixed_precision(True, weights):
        loss, _, _ = losses(network, batch, config)
    loss.backward()
    by_autocast = flat.grads.clone()
    flat.grads.fill_(torch.nan)
    with mixed_precision(True, weights), half_weights(learner, True) as leaves:
        again, _, _ = losses(network, batch, config)
    flat.take(torch.autograd.grad(again, leaves))
    assert torch.equal(again, loss)
    for (name, mine), theirs in zip(flat.views(flat.grads).items(), flat.views(by_autocast).values(), strict=True):
        # Of the dynamics' first weight autocast casts the gradient of each step, then adds; the copy's are added, then cast.
        bound = 0.02 * theirs.abs().max() if name == "dynamics_conv.weight" else 0.0
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=float(bound), msg=lambda text, name=name: f"{name}: {text}")
    # BatchNorms and last layers stay as they are, and so does the network after the block.
    full = {name for name, leaf in zip(own, leaves, strict=True) if leaf.dtype == torch.float32}
    assert full == {name for name in own if "norm." in name or ".last." in name}
    assert all(parameter is own[name] for name, parameter in network.named_parameters())


def test_learning_from_a_ring_of_two_states_finds_their_analytic_values():
    # A -> B pays 1, B -> A pays 0; n = 5 and discount 1/2; the cached values are v(A) = -32, v(B) = 32:
    # z(A) = 1 + 1/4 + 1/16 + v(B) / 32 = 2.3125, z(B) = 1/2 + 1/8 + v(A) / 32 = -0.375.
    config = dataclasses.replace(
        TINY, env_steps=40, n_step_age=10.0, frame_stack=1, unroll=1, n_step=5, discount=0.5, batch_size=16, channels=8,
        projection=8, lr=0.1, priority_alpha=0.0, consistency_weight=0.5,
    )  # fmt: skip
    ring = filled_ring(config, shape=(2, 1, 1), actions=2, ends=0.0)
    state = (torch.arange(40) + torch.tensor([[0], [1]])) % 2  # 0: A, 1: B
    ring.frames.copy_(nn.functional.one_hot(state, 2)[..., None, None])
    ring.reward.copy_(state)
    ring.value.copy_(torch.where(state == 0, -32.0, 32.0))
    ring.policy.copy_(torch.tensor([0.75, 0.25]).expand(ring.policy.shape))
    learner = new_learner(config, (2, 1, 1), actions=2)
    allowed = (torch.arange(40) < 32).expand(2, 40)
    updates, random = torch.tensor(0), generator()
    for _ in range(200):  # 160 are planned: the last 40 have a tenth of the learning rate
        index, weights = draw(ring, allowed, config, updates, random)
        update(learner, ring, index, weights, updates, config, random)

    snapshot = make_snapshot(learner.network.spec, CPU)
    fold(learner.network, snapshot)
    with torch.no_grad():
        latent = snapshot.represent(torch.eye(2)[:, :, None, None])
        root = snapshot.predict(latent)
        _, _, prefix, _, value = snapshot.model_step(latent, snapshot.initial_hidden(2), torch.tensor([0, 1]))
    assert to_scalar(root.value).tolist() == pytest.approx([2.3125, -0.375], abs=0.25)
    assert value.tolist() == pytest.approx([-0.375, 2.3125], abs=0.3)
    assert prefix.tolist() == pytest.approx([1.0, 0.0], abs=0.15)
    assert root.policy.softmax(1)[:, 0].tolist() == pytest.approx([0.75, 0.75], abs=0.02)
