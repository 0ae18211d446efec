"""Which phase comes next, how many positions it sweeps, and the rates that follow the updates."""

import dataclasses

import pytest
import torch

from speedyzero import schedule
from speedyzero.config import Config

ATARI = Config(env_steps=100_000, lanes=8, updates_per_iteration=8)
SHORT = Config(env_steps=100, lanes=8, updates_per_iteration=8)  # 100 planned updates


def test_the_phase_follows_from_the_counts(tiny_config):
    config = tiny_config(lanes=4, start_transitions=100, env_steps=400, ring_positions=200)
    end = config.total_updates
    for counts, phase in [
        (schedule.Counts(), "collect"),
        (schedule.Counts(env_steps=99, slots=24), "collect"),
        (schedule.Counts(env_steps=100, slots=25), "sweep"),
        (schedule.Counts(env_steps=100, slots=25, swept=95), "sweep"),
        (schedule.Counts(env_steps=100, slots=25, swept=96), "train"),  # the newest slot of each lane is searched when it acts
        (schedule.Counts(env_steps=396, updates=end, slots=99, swept=96), "train"),
        (schedule.Counts(env_steps=400, updates=end - 1, slots=100, swept=96), "learn"),
        (schedule.Counts(env_steps=400, updates=end, slots=100, swept=96), None),
    ]:
        assert schedule.next_phase(config, counts) == phase, counts
    assert schedule.next_phase(dataclasses.replace(config, refresh="sampled"), schedule.Counts(env_steps=100, slots=25)) == "train"


def test_a_sweep_uses_the_least_share_of_roots_that_keeps_its_period(tiny_config):
    config = tiny_config(lanes=1, ring_positions=8000, start_transitions=300, refresh_roots=800, env_steps=9000)
    for slots, roots in [(1, 100), (1000, 100), (1001, 200), (2000, 200), (2001, 400), (4000, 400), (4001, 800), (9999, 800)]:
        assert schedule.sweep_roots(config, slots) == roots
    assert schedule.sweep_roots(dataclasses.replace(config, refresh="sampled"), 9999) == 0


def test_the_iterations_of_a_run_take_all_its_steps_and_updates(tiny_config):
    config = tiny_config()
    phases = [phase for phase, _ in schedule.iterations(config)]
    assert sum(phase in ("collect", "train") for phase in phases) * config.lanes >= config.env_steps
    assert sum(phase in ("train", "learn") for phase in phases) * config.updates_per_iteration >= config.total_updates
    assert list(dict.fromkeys(phases)) == ["collect", "sweep", "train", "learn"]


def test_the_largest_search_of_each_phase(tiny_config):
    assert schedule.search_roots(tiny_config()) == {"sweep": 16, "train": 20, "learn": 16, "evaluation": 2}
    # 2 updates x 4 windows of 3 + 3 + 1 positions, and 4 lanes
    assert schedule.search_roots(tiny_config(refresh="sampled")) == {"train": 60, "learn": 56, "evaluation": 2}


@pytest.mark.parametrize(
    ("updates", "rate"),
    [(0, 0.0002), (499, 0.1), (999, 0.2), (1000, 0.2), (99_999, 0.2), (100_000, 0.02), (119_999, 0.02)],
)
def test_the_learning_rate_warms_up_over_a_hundredth_and_falls_to_a_tenth_after_the_planned_updates(updates, rate):
    got = schedule.learning_rate(ATARI, torch.tensor(updates))
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(rate, rel=1e-6)
    cold = schedule.learning_rate(dataclasses.replace(ATARI, lr_warmup=0.0), torch.tensor(updates))
    assert cold.item() == pytest.approx(0.2 if updates < 100_000 else 0.02)


@pytest.mark.parametrize(("updates", "beta"), [(0, 0.4), (50_000, 0.7), (100_000, 1.0), (120_000, 1.0)])
def test_the_importance_exponent_rises_to_one_over_the_planned_updates(updates, beta):
    assert schedule.importance_exponent(ATARI, torch.tensor(updates)).item() == pytest.approx(beta, rel=1e-6)


@pytest.mark.parametrize(("updates", "expected"), [(0, 1.0), (49, 1.0), (50, 0.5), (74, 0.5), (75, 0.25), (10_000, 0.25)])
def test_temperature_halves_at_half_and_at_three_quarters_of_the_planned_updates(updates, expected):
    assert schedule.temperature(SHORT, torch.tensor(updates)) == expected


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_step_of_the_unroll_is_compared_equally_often(count):
    config = Config(unroll=5, consistency_steps=count)
    compared = torch.cat([schedule.compared_steps(config, torch.tensor(updates)) for updates in range(10)])
    assert torch.bincount(compared, minlength=6).tolist() == [0] + [2 * count] * 5
    assert schedule.compared_steps(dataclasses.replace(config, consistency_steps=5), torch.tensor(0)) is None
