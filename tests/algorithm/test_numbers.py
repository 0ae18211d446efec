"""Numbers that go bad: the device skips the update as if it had never been, and keeps which batch it was."""

import copy
import dataclasses

import pytest
import torch

from speedyzero import learn
from speedyzero.learn import LEARN_METRICS, gather_batch, losses, observe, update
from speedyzero.nets import Network, fold, make_snapshot
from speedyzero.optim import ClippedLARS
from speedyzero.state import Averages
from tests.algorithm.test_learn import CPU, TINY, drawn_positions, filled_ring, generator, new_learner
from tests.capture import CaptureSafety


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
    assert isinstance(run.learner.optimizer, ClippedLARS) == (optimizer == "clipped-lars")
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

    def spy():
        finite.append(run.learner.optimizer.flat.grads[1:].isfinite().all())
        return step()

    step = run.learner.optimizer.step
    monkeypatch.setattr(learn, "losses", spoiled)
    monkeypatch.setattr(run.learner.optimizer, "step", spy)
    before = everything_learned(run.learner)
    run.take()
    assert finite == [True]
    assert run.learner.skipped == 1
    assert everything_learned(run.learner) == before


@pytest.mark.parametrize("optimizer", ["sgd", "clipped-lars"])
def test_of_a_good_update_the_guard_changes_not_a_bit(monkeypatch, optimizer):
    """Against the same steps one after the other, without any guard."""
    config = dataclasses.replace(TINY, optimizer=optimizer, augment=True, shift=1)
    run, theirs = Run(config), new_learner(config)
    for done in range(3):
        batch = gather_batch(run.ring, run.index, torch.ones(16), config, copy_of(run.random))
        run.take()
        theirs.optimizer.lr.copy_(learn.learning_rate(config, torch.tensor(done)))
        theirs.optimizer.zero_grad()
        losses(theirs.network, batch, config)[0].backward()
        theirs.optimizer.step()
    assert everything_learned(run.learner) == everything_learned(theirs)


def copy_of(random: torch.Generator) -> torch.Generator:
    other = torch.Generator()
    other.set_state(random.get_state())
    return other


def test_skipped_updates_are_counted_in_all_and_in_a_row():
    run, seen = Run(), []
    for spoil in (None, infinite_frames, missing_target, None, infinite_frames):
        run.take(spoil)
        seen.append((int(run.learner.skipped), int(run.learner.skipped_in_a_row), int(run.updates)))
    assert seen == [(0, 0, 1), (1, 1, 2), (2, 2, 3), (2, 0, 4), (3, 1, 5)]


# What is kept of it


@pytest.mark.parametrize("augment", [False, True])
def test_the_batch_of_the_last_skipped_update_is_kept_to_the_bit(augment):
    config = dataclasses.replace(TINY, augment=augment, shift=1, intensity=0.3)
    run = Run(config, updates=2**40)
    run.ring.head.fill_(2**35 + 80)
    weights = torch.linspace(0.1, 1, 16)

    def skip(at, spoil):
        """Skip an update on the positions `at`; its batch."""
        spoil(run.ring, at)
        batch = gather_batch(run.ring, at, weights, config, copy_of(run.random))
        update(run.learner, run.ring, at, weights, run.updates, config, run.random)
        return batch

    at = run.index
    skip(at.flip(0), infinite_frames)
    run.ring.frames.copy_(run.good.frames)
    batch = skip(at, frames_of_infinite_variance)
    kept = run.learner.evidence.read()
    assert (kept["update"], kept["head"]) == (2**40 + 2, 2**35 + 80)
    assert kept["loss"].isfinite()
    assert kept["grad_norm"].isnan()
    assert torch.equal(kept["index"], at)
    assert torch.equal(kept["weights"], weights)
    for name, tensor in vars(batch.targets).items():
        assert torch.equal(kept[f"targets.{name}"], tensor), name
        assert kept[f"targets.{name}"].dtype == tensor.dtype
    draws = learn.Augmentation(kept["augmentation.shift"], kept["augmentation.intensity"]) if augment else None
    observation, future = observe(run.ring, kept["index"], config, draws)
    assert torch.equal(observation, batch.observation)
    assert torch.equal(future, batch.future)
    assert ("augmentation.shift" in kept) == augment
    assert run.learner.skipped == 2

    run.ring.frames.copy_(run.good.frames)
    update(run.learner, run.ring, run.index.roll(3), weights, run.updates, config, run.random)
    assert run.learner.skipped == 2
    after = run.learner.evidence.read()
    assert all(torch.equal(after[name], kept[name]) for name in kept if name != "grad_norm"), "a good update leaves it"
    missing_target(run.ring, at)
    update(run.learner, run.ring, at, weights, run.updates, config, run.random)
    kept = run.learner.evidence.read()
    assert (kept["update"], int(run.learner.skipped)) == (2**40 + 4, 3)
    assert kept["loss"].isnan()
    assert kept["targets.value"].isnan().any()


def test_what_was_read_of_the_evidence_does_not_change_with_it():
    run = Run()
    run.take(infinite_frames)
    kept = run.learner.evidence.read()
    run.take(infinite_frames)
    assert (kept["update"], run.learner.evidence.read()["update"]) == (1, 2)


# Metrics


def test_the_metrics_of_a_skipped_update_are_those_of_the_last_one_that_was_not():
    run = Run()
    averages, every = Averages(LEARN_METRICS, CPU), []
    for spoil in (None, infinite_frames, None, missing_target, frames_of_infinite_variance):
        every.append(run.take(spoil))
        averages.add(every[-1])
    first, second = every[0], every[2]
    assert first["losses/loss"] != second["losses/loss"]
    for name in LEARN_METRICS:
        values = [metrics[name].item() for metrics in every]
        assert values == [first[name].item()] * 2 + [second[name].item()] * 3, name
    means = averages.drain()
    assert means["losses/loss"] == pytest.approx((2 * first["losses/loss"] + 3 * second["losses/loss"]).item() / 5)
    assert means["train/value_abs_max"] == max(first["train/value_abs_max"], second["train/value_abs_max"])


def test_a_number_that_is_not_finite_is_left_out_though_the_update_is_not_skipped():
    # An infinite target is cut off at the end of the support: the loss is finite.
    run = Run()
    first, priorities = run.take(), run.ring.priority.clone()
    second = run.take(lambda ring, index: ring.value.fill_(torch.inf))
    assert run.learner.skipped == 0
    assert second["train/value_target"] == first["train/value_target"]
    assert second["losses/loss"] != first["losses/loss"]
    # Those whose target is finite still, past the end of their episode, have a new one.
    assert run.ring.priority.isfinite().all()
    assert (run.ring.priority == priorities).sum() > 64


def test_a_log_interval_of_skipped_updates_alone_has_no_metrics():
    config = dataclasses.replace(TINY, log_interval=2, updates_per_iteration=2)
    run = Run(config)
    seen = [run.take(spoil)["losses/loss"] for spoil in [None] + [infinite_frames] * 5 + [None]]
    assert [bool(loss.isfinite()) for loss in seen] == [True, True, True, True, False, False, True]
    assert seen[3] == seen[0] != seen[6]


# Capture


@pytest.mark.parametrize("spoil", [None, infinite_frames])
def test_an_update_that_is_skipped_could_be_captured_and_moves_nothing(spoil):
    config = dataclasses.replace(TINY, augment=True, shift=1)
    run = Run(config)

    def places():
        learner = run.learner
        tensors = learner.network.state_dict() | {name: x for name, x in vars(learner).items() if isinstance(x, torch.Tensor)}
        tensors |= {"words": learner.evidence.words, "kept": learner.statistics.kept, "values": learner.statistics.values}
        return {name: (tensor.data_ptr(), tensor.shape, tensor.stride()) for name, tensor in tensors.items()}

    before = places()
    assert len(before) > 60
    if spoil:
        spoil(run.ring, run.index)
    with CaptureSafety():
        update(run.learner, run.ring, run.index, torch.ones(16), run.updates, config, run.random)
    assert run.learner.skipped == (spoil is not None)
    assert places() == before


def test_the_names_of_what_is_saved_are_those_of_the_network():
    learner = new_learner(TINY)
    assert list(learner.network.state_dict()) == list(Network(learner.network.spec).state_dict())
