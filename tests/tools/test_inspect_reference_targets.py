"""tools/inspect/reference_targets.py: windows of a small ring as on paper; a wrong tensor of an update is BAD."""

import dataclasses

import numpy as np
import pytest
import torch

from speedyzero import ring
from speedyzero.batch import Augmentation
from speedyzero.config import preset_config
from tests.tools.conftest import CPU, bad, batch_of, trained_run
from tools.inspect import findings, reference_targets


@pytest.fixture
def made():
    """A ring of one lane and 12 slots, 14 written: slots 0 and 1 are the newest. Episodes end at slots 4 and 9, their deaths."""
    config = dataclasses.replace(
        preset_config("cpu"), lanes=1, ring_positions=12, frame_stack=3, unroll=3, n_step=3, discount=0.5, lstm_horizon=2, clip_reward=True,
        env_steps=100, n_step_age=0.05, amp=False,
    )  # fmt: skip
    made = ring.allocate(config.lanes, config.slots, (1, 1, 1), torch.float32, 2, CPU)
    made.frames.copy_(torch.arange(12.0).view(1, 12, 1, 1, 1))
    made.reward.copy_(torch.tensor([[1, 0, 1, 0, -1, 0, 1, 1, 0, -1, 0, 1.0]]))
    made.value.copy_(torch.arange(12.0) * 8)
    made.done[0, [4, 9]] = True
    made.first[0, [5, 10]] = True
    made.head.fill_(14)
    return made, config


def test_a_window_over_an_end_is_worked_out_as_on_paper(made):
    raw = reference_targets.Raw(*made)
    # Slot 2 is 11 steps old and n_step_age is 5 transitions: n = 3 - 2 = 1. Slot 8, 5 steps old: 2. Slot 10, 3 steps old: 3.
    assert [raw.n(slot) for slot in (2, 8, 10)] == [1, 2, 3]
    steps = raw.window(0, 2)
    assert [step.slot for step in steps] == [2, 3, 4, 5]
    # z of 2: the reward 0 of slot 3 and half the value 24 there. z of 3: the -1 of the end, and no bootstrap. The end itself: 0.
    assert [(step.rewards, step.bootstrap) for step in steps] == [(0, 12), (-1, 0), (0, 0), (0, 0)]
    assert [step.counts for step in steps] == [True, True, True, False]
    assert [step.acts for step in steps] == [True, True, False, False]
    assert [step.prefix for step in steps] == [0, 0, -1, 0]
    # Of 8, whose n is 2: the -1 of the end, and nothing after it.
    assert [(step.rewards, step.bootstrap) for step in raw.window(0, 8)[:1]] == [(-1, 0)]


def test_a_window_over_the_end_of_the_lap_goes_on_at_slot_0(made):
    steps = reference_targets.Raw(*made).window(0, 10)
    assert [step.slot for step in steps] == [10, 11, 0, 1]
    # z of 10: rewards 1, 1, 0 of slots 11, 0, 1, at 1, 1/2 and 1/4, and 1/8 of the value 8 of slot 1.
    assert (steps[0].rewards, steps[0].bootstrap) == (1.5, 1)
    # The prefix sums slots 11 and 0, and starts from zero after two steps.
    assert [step.prefix for step in steps] == [0, 1, 2, 0]


def test_a_stack_is_oldest_first_and_repeats_the_first_frame(made):
    raw = reference_targets.Raw(*made)
    assert [raw.stack(0, slot).ravel().tolist() for slot in (8, 5, 6, 1)] == [[6, 7, 8], [5, 5, 5], [5, 5, 6], [11, 0, 1]]


def test_a_shift_replicates_the_border():
    frame = np.array([[[1.0, 2.0], [3.0, 4.0]]])
    assert reference_targets.shifted(frame, (0, 2), 1).tolist() == [[[2, 2], [2, 2]]]
    assert reference_targets.shifted(frame, (2, 1), 1).tolist() == [[[3, 4], [3, 4]]]


BROKEN_BATCHES = {
    "value": lambda goal: dataclasses.replace(goal, value=goal.value + 0.01),
    "prefix": lambda goal: dataclasses.replace(goal, prefix=goal.prefix.roll(1, 1) + 0.01),
    "mask": lambda goal: dataclasses.replace(goal, mask=1 - goal.mask),
    "policy mask": lambda goal: dataclasses.replace(goal, policy_mask=1 - goal.policy_mask),
    "policy": lambda goal: dataclasses.replace(goal, policy=goal.policy.flip(2)),
    "action": lambda goal: dataclasses.replace(goal, action=goal.action + 1),
}


@pytest.mark.parametrize("name", BROKEN_BATCHES)
def test_a_target_that_is_not_as_worked_out_by_hand_is_bad_and_named(state, name):
    index, batch, plain = batch_of(state)
    (text,) = bad(findings.target_findings(state, index, dataclasses.replace(batch, targets=BROKEN_BATCHES[name](batch.targets)), plain))
    wrong = text.partition("differing ")[2].split(", ")
    assert [line for line in wrong if not line.endswith(" 0")] == [line for line in wrong if line.rpartition(" ")[0] == name]


def test_observations_that_are_not_as_worked_out_by_hand_are_bad(tmp_path):
    state = trained_run(tmp_path / "run", iterations=44, frame_stack=2, augment=True, shift=2).state
    index, batch, plain = batch_of(state)
    drawn = batch.augmentation
    assert bad(findings.target_findings(state, index, batch, plain)) == []
    for named, wrong in (
        ("observation", (batch, dataclasses.replace(plain, observation=plain.observation.flip(1)))),
        ("observation", (batch, dataclasses.replace(plain, future=plain.future.roll(1, 0)))),
        ("augmentation", (dataclasses.replace(batch, augmentation=Augmentation(drawn.shift.flip(2), drawn.intensity)), plain)),
        ("augmentation", (dataclasses.replace(batch, augmentation=Augmentation(drawn.shift.flip(0), drawn.intensity)), plain)),
    ):
        (text,) = bad(findings.target_findings(state, index, *wrong))
        assert [name for name in ("observation", "augmentation") if f"{name} 0" not in text] == [named]
