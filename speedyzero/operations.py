"""The arithmetic of a run, counted from its config before it starts: how long a CPU takes at the least. Nothing is computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from speedyzero import learn, schedule
from speedyzero import ring as replay
from speedyzero.config import Config
from speedyzero.envs import EnvSpec
from speedyzero.nets import Network
from speedyzero.optim import make_learner
from speedyzero.sizes import network_spec
from speedyzero.snapshot import make_snapshot

FLOPS_OF_A_CORE = 100e9
"""FLOP/s in fp32 that a core of a server reaches in large products, about: 32 in a cycle (two fused multiply-adds of 8 lanes) at 3 GHz."""


def operations(config: Config, spec: EnvSpec) -> float:
    """FLOPs of the convolutions and products of all updates and searches of a run with a resolved config; a multiply-add is two.

    Without the evaluation, and without what is no product: normalisation, trees, augmentation, the emulators.
    """
    sizes, batch = network_spec(config, spec.frame_shape, spec.num_actions), config.batch_size
    with FakeTensorMode():
        learner = make_learner(Network(sizes).train(), config)
        ring = replay.allocate(1, 1, spec.frame_shape, torch.uint8 if spec.image else torch.float32, spec.num_actions, torch.device("cpu"))
        drawn, weights, updates = torch.zeros(batch, dtype=torch.int64), torch.ones(batch), torch.zeros((), dtype=torch.int64)
        update = _count(lambda: learn.update(learner, ring, drawn, weights, updates, config, torch.Generator()))
    with torch.device("meta"), torch.no_grad():
        snapshot = make_snapshot(sizes, torch.device("meta"))
        observation, action = torch.zeros(1, sizes.in_channels, sizes.height, sizes.width), torch.zeros(1, dtype=torch.int64)
        latent, hidden = snapshot.represent(observation), snapshot.initial_hidden(1)
        value = _count(lambda: snapshot.predict(snapshot.represent(observation)))
        search = value + config.simulations * _count(lambda: snapshot.model_step(latent, hidden, action))
    total = 0.0
    for (phase, roots), times in Counter(schedule.iterations(config)).items():
        if phase == "collect":
            continue
        if config.refresh == "sampled":
            roots = schedule.search_roots(config)["learn"]
        total += times * search * (roots + config.lanes * (phase == "train"))
        if phase != "sweep":
            total += times * (config.updates_per_iteration * update + config.refresh_values * value)
    return total


def _count(function: Callable[[], object]) -> int:
    """FLOPs of what a function does."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()
