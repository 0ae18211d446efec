"""A search learns nothing where there is nothing to learn: in a constant world its policy stays spread over the actions."""

import dataclasses

import pytest
import torch

from speedyzero.config import preset_config
from speedyzero.noise import root_noise
from speedyzero.search import SearchConfig, search

ACTIONS, ROOTS, ROUNDS, SIMULATIONS = 6, 64, 16, {"puct": 25, "gumbel": 16}
CASES = [(v, r) for v in (-0.6, 0.0, 0.6) for r in sorted({0.0, v * (1.0 - SearchConfig().discount)})]


def greatest_share(kind, value, reward, value_delta_min):
    """Largest share of an action after rounds of search, each learned to perfection.

    Every state has this value, every step this reward, and every node the policy that the last round's targets average to. The
    recurrent state holds the rewards since it last was reset, as the value prefix counts them.
    """
    config = SearchConfig(kind=kind, num_simulations=SIMULATIONS[kind], value_delta_min=value_delta_min)
    noises = dataclasses.replace(preset_config("cpu"), search=kind)
    generator, nothing = torch.Generator().manual_seed(0), torch.zeros(ROOTS, 1)
    values, policy = torch.full((ROOTS,), value), torch.full((ACTIONS,), 1.0 / ACTIONS)
    for _ in range(ROUNDS):
        logits = policy.clamp_min(1e-6).log().expand(ROOTS, ACTIONS)

        def model_step(latent, hidden, action, logits=logits):
            return latent, hidden + reward, hidden[:, 0] + reward, logits, values

        noise = root_noise(noises, ROOTS, ACTIONS, generator)
        policy = search(nothing, nothing, logits, values, model_step, config, noise).policy.mean(dim=0)
    return policy.max().item()


@pytest.mark.parametrize("kind", ["puct", "gumbel"])
def test_a_policy_stays_spread_where_all_actions_are_alike_and_the_published_ranges_make_much_of_nothing(kind):
    assert max(greatest_share(kind, value, reward, value_delta_min=0.5) for value, reward in CASES) <= 0.4
    assert max(greatest_share(kind, value, reward, value_delta_min=None) for value, reward in CASES) > 0.6
