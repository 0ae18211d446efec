"""The rank correlation of the priorities in the ring with those that the snapshot would give now."""

import pytest
import torch

from speedyzero import act
from speedyzero.envs import describe
from speedyzero.loop import Trainer
from speedyzero.ring import eligible
from speedyzero.staleness import priority_rank_correlation, rank_correlation
from speedyzero_kernels.gather import observations


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1, 2, 3], [10, 20, 30], 1.0),
        ([1, 2, 3], [1e9, 0, -1], -1.0),
        ([1, 2, 2, 3], [1, 3, 2, 4], 4.5 / 22.5**0.5),  # ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4
        ([5, 5, 5], [1, 2, 3], None),
        ([1, 2, float("nan")], [1, 2, 3], None),
        ([1, 2, 3], [1, 2, float("inf")], None),
    ],
)
def test_a_rank_correlation_by_hand(a, b, expected):
    found = rank_correlation(torch.tensor(a, dtype=torch.float32), torch.tensor(b, dtype=torch.float32))
    assert found == (expected if expected is None else pytest.approx(expected))


def fresh_priorities(trainer: Trainer) -> torch.Tensor:
    """|v - z| of every slot [L, T] by loops, with values that the snapshot gives now."""
    ring, config, snapshot = trainer.state.ring, trainer.config, trainer.state.snapshot
    frames = observations(ring.frames, ring.first, torch.arange(ring.done.numel()), config.frame_stack, **snapshot.input_format)
    values = act.values(snapshot, frames).view_as(ring.value)
    found = torch.zeros_like(values)
    step = max(1, int(config.n_step_age * config.env_steps))
    for lane in range(ring.lanes):
        for slot in range(ring.slots):
            age = (trainer.slots - 1 - slot) % ring.slots
            n, target, ended = max(1, config.n_step - age * ring.lanes // step), 0.0, False
            for k in range(1, n + 1):
                here = (slot + k) % ring.slots
                target += 0.0 if ended else config.discount ** (k - 1) * float(ring.reward[lane, here])
                ended = ended or bool(ring.done[lane, here])
            target += 0.0 if ended else config.discount**n * float(values[lane, here])
            found[lane, slot] = (values[lane, slot] - target).abs()
    return found


def test_priorities_of_the_present_snapshot_correlate_fully_and_nothing_is_changed(tiny_config):
    trainer = Trainer(tiny_config(env_steps=800, ring_positions=200), describe("Catch-v0"), torch.device("cpu"))
    trainer.start()
    assert priority_rank_correlation(trainer.state) is None, "the ring is empty"
    while trainer.env_steps < 300 and (phase := trainer.phase()):
        trainer.step(phase)
    state, allowed = trainer.state, eligible(trainer.state.ring, trainer.config)
    assert allowed.sum() > 100
    stale = priority_rank_correlation(state)
    assert -1 <= stale < 0.99
    fresh = fresh_priorities(trainer)
    state.ring.priority.copy_(torch.where(allowed, fresh, torch.rand(fresh.shape)))
    before, drawn = {name: tensor.clone() for name, tensor in state.tensors().items()}, state.generator.get_state()
    assert priority_rank_correlation(state) == pytest.approx(1.0, abs=1e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.tensors().items())
    assert torch.equal(drawn, state.generator.get_state())
    state.ring.priority.copy_(1 / (fresh + 1))
    assert priority_rank_correlation(state) == pytest.approx(-1.0, abs=1e-3)
    state.refold()  # the snapshot moves on, and the priorities do not
    assert priority_rank_correlation(state) > -0.999
