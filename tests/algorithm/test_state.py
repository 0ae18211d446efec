"""What lives across iterations: averages that the host reads, and weights that the seed alone makes."""

import torch

from speedyzero.sizes import network_spec
from speedyzero.state import Averages, make_network

CPU = torch.device("cpu")


def test_averages_are_means_and_maxima_and_start_anew():
    averages = Averages(("a", "b_max"), CPU)
    for value in (1.0, 3.0, 2.0):
        averages.add({"a": torch.tensor(value), "b_max": torch.tensor(value)})
    assert averages.drain() == {"a": 2.0, "b_max": 3.0}
    assert averages.drain() == {}
    averages.add({"a": torch.tensor(1.0), "b_max": torch.tensor(0.5)})
    assert averages.drain() == {"a": 1.0, "b_max": 0.5}


def test_the_seed_makes_the_weights(tiny_config):
    spec = network_spec(tiny_config(), (1, 10, 5), 3)
    a, b, c = (torch.cat([p.flatten() for p in make_network(spec, seed, CPU).parameters()]) for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
