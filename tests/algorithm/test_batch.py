"""Drawing positions, and what is gathered at them."""

import dataclasses

import pytest
import torch

from speedyzero.batch import draw, gather_batch
from speedyzero.ring import allocate
from tests.algorithm.learn_support import CPU, TINY, filled_ring, generator

# Sampling


def test_only_allowed_positions_are_drawn_and_in_proportion_to_their_priority():
    config = dataclasses.replace(TINY, batch_size=40_000, priority_alpha=0.6)
    ring = filled_ring(config)
    allowed = torch.rand(ring.done.shape, generator=generator(1)) < 0.3
    index, weights = draw(ring, allowed, config, torch.tensor(0), generator())
    mass = (ring.priority * allowed).double().pow(0.6).view(-1)
    mass[(~allowed).view(-1)] = 0
    chance = mass / mass.sum()
    share = torch.bincount(index, minlength=80) / 40_000
    assert share[chance == 0].eq(0).all()
    assert (share - chance).abs().max() < 1e-3
    expected = (chance[index] * (chance > 0).sum()).pow(-0.4)
    assert torch.allclose(weights.double(), expected / expected.max(), rtol=1e-4)


def test_the_importance_weights_use_the_exponent_of_the_moment():
    config = dataclasses.replace(TINY, env_steps=100, batch_size=64)  # 400 planned updates
    ring = filled_ring(config)
    index, weights = draw(ring, ~ring.done, config, torch.tensor(200), generator())
    mass = ring.priority.double().view(-1)[index].pow(0.6)
    assert torch.allclose(weights.double(), (mass / mass.min()).pow(-0.7), rtol=1e-4)


def test_a_batch_holds_the_stacked_observations_of_the_position_and_of_the_k_that_follow():
    config = dataclasses.replace(TINY, ring_positions=20, unroll=3, frame_stack=2)
    ring = allocate(config.lanes, config.slots, (1, 1, 1), torch.float32, 3, CPU)
    ring.head.fill_(14)  # steps 4..13 in ten slots: slot s holds step s + 10 for s < 4, else s
    for slot in range(10):
        ring.frames[:, slot] = slot + 10 if slot < 4 else slot
    ring.frames[1] += 100
    ring.first[0, 8] = True
    batch = gather_batch(ring, torch.tensor([7, 18]), torch.ones(2), config, generator())
    assert batch.observation.flatten(1).tolist() == [[6, 7], [107, 108]]
    assert batch.future.flatten(1).tolist() == [[8, 8], [8, 9], [9, 10], [108, 109], [109, 110], [110, 111]]
    assert batch.targets.value.shape == (2, 4)


def test_the_targets_of_a_batch_are_numbers_worked_out_by_hand():
    config = dataclasses.replace(TINY, lanes=1, ring_positions=8, unroll=2, n_step=2, lstm_horizon=1, bootstrap="root")
    ring = allocate(config.lanes, config.slots, (1, 1, 1), torch.float32, 3, CPU)
    ring.head.fill_(8)
    ring.reward[0] = torch.tensor([0.0, 1, 2, 4, 8, 16, 32, 64])
    ring.root_value[0] = torch.tensor([0.0, 0, 10, 20, 30, 40, 0, 0])
    ring.action[0] = torch.tensor([2, 1, 0, 2, 1, 0, 2, 1])
    goal = gather_batch(ring, torch.tensor([1]), torch.ones(1), config, generator()).targets
    expected = [2 + 0.9 * 4 + 0.81 * 20, 4 + 0.9 * 8 + 0.81 * 30, 8 + 0.9 * 16 + 0.81 * 40]
    assert goal.value[0].tolist() == pytest.approx(expected, rel=1e-6)
    assert goal.prefix[0].tolist() == [2, 4], "the prefix starts anew at each step of horizon 1"
    assert goal.action[0].tolist() == [1, 0]


def test_each_branch_of_each_sample_has_one_intensity_for_all_of_its_frames():
    config = dataclasses.replace(TINY, augment=True, shift=1, intensity=0.05, unroll=3)
    ring = allocate(config.lanes, config.slots, (1, 2, 2), torch.float32, 3, CPU)
    ring.frames.fill_(1.0)
    count = 2000
    batch = gather_batch(ring, torch.full((count,), 20), torch.ones(count), config, generator())
    now, later = batch.observation.flatten(1), batch.future.reshape(count, 3 * 2 * 4)
    assert (now == now[:, :1]).all()
    assert (later == later[:, :1]).all()
    for intensity in (now[:, 0], later[:, 0]):
        assert 0.9 <= intensity.min() <= intensity.max() <= 1.1 + 1e-6
        assert abs(intensity.mean() - 1) < 0.005
        # A standard normal clamped to two deviations has a deviation of 0.96.
        assert abs(intensity.std() - 0.05 * 0.96) < 0.003
        assert abs((intensity > 1.0999).float().mean() - 0.0228) < 0.015
    assert abs(torch.corrcoef(torch.stack((now[:, 0], later[:, 0])))[0, 1]) < 0.1


def test_each_branch_of_each_sample_has_one_shift_uniform_over_all_offsets():
    config = dataclasses.replace(TINY, augment=True, shift=2, intensity=0.0, unroll=3)
    ring = allocate(config.lanes, config.slots, (1, 7, 7), torch.float32, 3, CPU)
    rows, columns = torch.meshgrid(torch.arange(7.0), torch.arange(7.0), indexing="ij")
    ring.frames.copy_((100 * rows + columns).expand(ring.frames.shape))
    count = 5000
    batch = gather_batch(ring, torch.full((count,), 20), torch.ones(count), config, generator())
    now = batch.observation[:, :, 3, 3]
    later = batch.future[:, :, 3, 3].reshape(count, 3 * 2)
    for centre in (now, later):
        assert (centre == centre[:, :1]).all()
        dy, dx = centre[:, 0].div(100, rounding_mode="floor").long() - 3, centre[:, 0].remainder(100).long() - 3
        both = torch.bincount((dy + 2) * 5 + dx + 2, minlength=25) / count
        assert both.shape == (25,)
        assert (both - 1 / 25).abs().max() < 0.015
    assert abs((now[:, 0] == later[:, 0]).float().mean() - 1 / 25) < 0.015


def test_without_augmentation_no_random_numbers_are_drawn():
    ring, random = filled_ring(TINY), generator(3)
    before = random.get_state()
    gather_batch(ring, torch.tensor([5, 6]), torch.ones(2), TINY, random)
    assert torch.equal(random.get_state(), before)
