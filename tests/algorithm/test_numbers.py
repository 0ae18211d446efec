"""Numbers that go bad: the device skips the update as if it had never been."""

import copy
import dataclasses
import math

import pytest
import torch

from speedyzero import learn
from speedyzero.learn import LEARN_METRICS, losses, update
from speedyzero.optim import FlatClippedLARS
from speedyzero.snapshot import fold, make_snapshot
from speedyzero.state import Averages
from tests.algorithm.learn_support import CPU, TINY, drawn_positions, filled_ring, generator, new_learner


def everything_learned(learner) -> dict[str, bytes]:
    """Weights, running statistics and momentum, to the bit."""
    tensors = learner.network.state_dict() | {"momentum": learner.optimizer.flat.momentum}
    return {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()}


def infinite_frames(ring, index):
    ring.frames.view(-1, 9)[index[0], 4] = torch.inf


def frames_of_infinite_variance(ring, index):
    """Finite themselves, and what BatchNorm makes of them is zero: so are loss and gradient finite."""
    ring.frames.view(-1, 9)[index[0]] = 1e25


def missing_target(ring, index):
    ring.value.fill_(torch.nan)


BAD = [infinite_frames, frames_of_infinite_variance, missing_target]


class Run:
    """A learner that takes updates on one batch of a ring, from update `updates` on."""

    def __init__(self, config=TINY, updates=0):
        self.config, self.ring, self.learner = config, filled_ring(config), new_learner(config)
        self.index, self.updates, self.random = drawn_positions(), torch.tensor(updates), generator()
        self.good = copy.deepcopy(self.ring)

    def take(self, spoil=None) -> dict[str, torch.Tensor]:
        """An update, after `spoil` did its worst to the ring; the ring is whole again after it, its priorities aside."""
        if spoil:
            spoil(self.ring, self.index)
        metrics = update(self.learner, self.ring, self.index, torch.ones(16), self.updates, self.config, self.random)
        self.ring.frames.copy_(self.good.frames)
        self.ring.value.copy_(self.good.value)
        return metrics


@pytest.mark.parametrize("optimizer", ["sgd", "clipped-lars"])
@pytest.mark.parametrize("spoil", BAD)
def test_a_batch_that_is_not_finite_leaves_nothing_behind(spoil, optimizer):
    run = Run(dataclasses.replace(TINY, optimizer=optimizer))
    assert isinstance(run.learner.optimizer, FlatClippedLARS) == (optimizer == "clipped-lars")
    run.take()
    before, priorities = everything_learned(run.learner), run.ring.priority.clone()
    run.take(spoil)
    assert run.learner.skipped == 1
    assert everything_learned(run.learner) == before
    assert run.ring.priority.isfinite().all()
    # What has no finite value keeps the priority it had.
    assert torch.equal(run.ring.priority, priorities) == (spoil is not frames_of_infinite_variance)
    snapshot = make_snapshot(run.learner.network.spec, CPU)
    fold(run.learner.network, snapshot)
    assert all(weight.isfinite().all() for weight in snapshot.parameters())
    run.take()
    assert run.learner.skipped == 1
    after = everything_learned(run.learner)
    assert sum(after[name] == before[name] for name in after) == 0, "the next good one is learned from"


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_loss_that_is_not_finite_is_skipped_though_its_gradient_is(monkeypatch, bad):
    run, finite = Run(), []

    def spoiled(*args):
        loss, metrics, value = losses(*args)
        loss = loss + bad
        return loss, metrics | {"loss": loss.detach()}, value

    def spy(ok):
        finite.append(run.learner.optimizer.flat.grads.isfinite().all())
        return step(ok)

    step = run.learner.optimizer.step
    monkeypatch.setattr(learn, "losses", spoiled)
    monkeypatch.setattr(run.learner.optimizer, "step", spy)
    before = everything_learned(run.learner)
    run.take()
    assert finite == [True]
    assert run.learner.skipped == 1
    assert everything_learned(run.learner) == before


def test_skipped_updates_are_counted_in_all_and_in_a_row():
    run, seen = Run(), []
    for spoil in (None, infinite_frames, missing_target, None, infinite_frames):
        run.take(spoil)
        seen.append((int(run.learner.skipped), int(run.learner.skipped_in_a_row), int(run.updates)))
    assert seen == [(0, 0, 1), (1, 1, 2), (2, 2, 3), (2, 0, 4), (3, 1, 5)]


def test_the_metrics_of_skipped_updates_are_left_out():
    run, averages, every = Run(), Averages(LEARN_METRICS, CPU), []
    for spoil in (None, infinite_frames, None, missing_target, frames_of_infinite_variance):
        every.append(run.take(spoil))
        averages.add(every[-1])
    first, second = every[0], every[2]
    assert all(value.isnan() for skipped in (every[1], every[3], every[4]) for value in skipped.values())
    means = averages.drain()
    assert set(means) == set(LEARN_METRICS)
    assert means["losses/loss"] == pytest.approx((first["losses/loss"] + second["losses/loss"]).item() / 2)
    assert means["train/value_abs_max"] == max(first["train/value_abs_max"], second["train/value_abs_max"])
    averages.add(every[1])
    assert averages.drain() == {}, "a log interval of skipped updates alone"


def test_a_number_that_is_not_finite_is_left_out_though_the_update_is_not_skipped():
    # An infinite target is cut off at the end of the support: the loss is finite.
    run, averages = Run(), Averages(LEARN_METRICS, CPU)
    averages.add(run.take())
    priorities = run.ring.priority.clone()
    second = run.take(lambda ring, index: ring.value.fill_(torch.inf))
    averages.add(second)
    means = averages.drain()
    assert run.learner.skipped == 0
    assert second["train/value_target"].isinf()
    assert second["losses/loss"].isfinite()
    assert all(math.isfinite(mean) for mean in means.values())
    # Those whose target is finite still, past the end of their episode, have a new one.
    assert run.ring.priority.isfinite().all()
    assert (run.ring.priority == priorities).sum() > 64
