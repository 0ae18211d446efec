"""Noise, and actions from a search."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from speedyzero.act import choose, choose_best, random_actions
from speedyzero.config import Config
from speedyzero.noise import gumbel, root_noise
from speedyzero.search import SearchResult

# 100 planned updates: 100 steps of 8 lanes at 8 updates an iteration.
CONFIG = Config(env_steps=100, lanes=8, updates_per_iteration=8)


def searched(visits: torch.Tensor, policy: torch.Tensor | None = None) -> SearchResult:
    count = visits.shape[0]
    policy = visits / visits.sum(1, keepdim=True) if policy is None else policy
    return SearchResult(visits.int(), torch.zeros(count), policy, torch.ones(count, dtype=torch.int32))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("updates", "power"), [(0, 1), (60, 2), (90, 4)])
def test_actions_are_drawn_in_proportion_to_visits_to_the_power_of_one_over_the_temperature(updates, power):
    visits, draws = torch.tensor([5, 10, 0, 3, 1]), 40_000
    actions = choose(CONFIG, searched(visits.expand(draws, 5)), torch.zeros(draws, 5), torch.tensor(updates), generator())
    assert actions.dtype == torch.int64
    share = torch.bincount(actions, minlength=5) / draws
    expected = visits.double() ** power / (visits.double() ** power).sum()
    assert share[2] == 0, "an unvisited action"
    assert ((share - expected).abs() <= 4 * (expected * (1 - expected) / draws).sqrt()).all()


def test_lanes_draw_independently_of_one_another():
    draws = 10_000
    actions = choose(CONFIG, searched(torch.ones(draws, 2)), torch.zeros(draws, 2), torch.tensor(0), generator())
    pairs = torch.bincount(2 * actions[::2] + actions[1::2], minlength=4) / (draws / 2)
    assert (pairs - 0.25).abs().max() < 0.03


def test_gumbel_plays_the_action_of_the_halving_that_its_noise_and_policy_favour():
    config = dataclasses.replace(CONFIG, search="gumbel")
    noise = torch.tensor([[0.0, 0.0, 9.0, 9.0], [2.0, 0.0, 9.0, 9.0]])  # log 0.5 - log 0.2 = 0.92 < 2
    result = searched(torch.tensor([[6, 6, 2, 2]] * 2), torch.tensor([[0.2, 0.5, 0.2, 0.1]] * 2))
    assert choose(config, result, noise, torch.tensor(0), generator()).tolist() == [1, 0]
    assert choose_best(config, result).tolist() == [1, 1]


def test_in_evaluation_the_most_visited_action_is_played():
    assert choose_best(CONFIG, searched(torch.tensor([[3, 9, 4], [8, 0, 8], [0, 0, 1]]))).tolist() == [1, 0, 2]


@pytest.mark.parametrize("alpha", [0.05, 0.3, 0.9, 1.0, 2.5])
def test_puct_noise_has_the_distribution_of_numpys_dirichlet(alpha):
    draws = 20_000
    noise = root_noise(dataclasses.replace(CONFIG, dirichlet_alpha=alpha), draws, 5, generator())
    assert (noise.shape, noise.dtype) == ((draws, 5), torch.float32)
    assert torch.allclose(noise.sum(1), torch.ones(draws), atol=1e-5)
    theirs = torch.from_numpy(np.random.default_rng(0).dirichlet([alpha] * 5, draws)).float().double()
    for of in (lambda shares: shares[:, 0], lambda shares: shares.amax(1), lambda shares: shares.square().sum(1)):
        a, b = of(noise.double()).sort().values, of(theirs).sort().values
        # Kolmogorov and Smirnov's distance of two samples of n stays below 1.95 sqrt(2 / n) in 999 of 1000 cases.
        at = torch.cat([a, b]).sort().values
        gap = (torch.searchsorted(a, at, right=True) - torch.searchsorted(b, at, right=True)).abs().max() / draws
        assert gap < 1.95 * math.sqrt(2 / draws)


@pytest.mark.parametrize(("alpha", "actions"), [(0.01, 4), (1e-3, 18), (1e-10, 6), (5e-324, 6)])
def test_dirichlet_noise_of_a_tiny_concentration_falls_to_one_action_and_to_each_alike(alpha, actions):
    draws = 20_000
    noise = root_noise(dataclasses.replace(CONFIG, dirichlet_alpha=alpha), draws, actions, generator())
    assert torch.allclose(noise.sum(1), torch.ones(draws), atol=1e-5)
    # Dirichlet of A equal alphas: mean 1 / A, variance (1 / A)(1 - 1 / A) / (A alpha + 1).
    mean = 1 / actions
    variance = mean * (1 - mean) / (actions * alpha + 1)
    assert (noise.mean(0) - mean).abs().max() < 5 * math.sqrt(variance / draws)
    assert torch.allclose(noise.var(0), torch.tensor(variance), rtol=0.08)
    assert (noise.amax(1) < mean + 1e-3).sum() == 0, "equal shares are what an underflow gives"


def test_dirichlet_noise_of_one_action_is_all_of_it_and_that_of_a_great_concentration_is_uniform():
    assert torch.equal(root_noise(CONFIG, 100, 1, generator()), torch.ones(100, 1))
    noise = root_noise(dataclasses.replace(CONFIG, dirichlet_alpha=1e30), 100, 4, generator())
    assert torch.allclose(noise, torch.tensor(0.25), atol=1e-6)


def test_gumbel_noise_has_the_moments_of_the_standard_gumbel_distribution():
    noise = root_noise(dataclasses.replace(CONFIG, search="gumbel"), 20_000, 4, generator())
    assert noise.isfinite().all()
    assert abs(noise.double().mean() - 0.57722) < 0.02  # Euler's constant
    assert abs(noise.double().var() - math.pi**2 / 6) < 0.04
    assert abs((noise < 0).double().mean() - math.exp(-1)) < 0.01  # the distribution function is exp(-exp(-x))
    assert torch.equal(gumbel(20_000, 4, generator()), noise), "of the generator alone"


def test_random_actions_are_uniform():
    actions = random_actions(30_000, 6, generator())
    assert actions.dtype == torch.int64
    assert (torch.bincount(actions, minlength=6) / 30_000 - torch.full((6,), 1 / 6)).abs().max() < 0.01
