"""Emulators at play, and EnvPool itself beside them."""

import envpool
import numpy as np
import torch

from speedyzero.envs import _quiet

BUFFERS = ("frames", "reward", "done", "first", "game_over")


def act(emulators, actions):
    emulators.actions.copy_(torch.as_tensor(actions))
    emulators.send()
    emulators.recv()


def seen(emulators):
    return {name: getattr(emulators, name).numpy().copy() for name in BUFFERS}


def play(emulators, steps, seed=0):
    """`steps` random steps; what every buffer held after each, [steps, N, ...]."""
    rng = np.random.default_rng(seed)
    record = []
    for _ in range(steps):
        act(emulators, rng.integers(0, emulators.spec.num_actions, emulators.lanes))
        record.append(seen(emulators))
    return {name: np.array([row[name] for row in record]) for name in BUFFERS}


def assert_same(a, b):
    for name in BUFFERS:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def twin_pool(emulators, **changes):
    """EnvPool itself, with the seeds that these emulators use."""
    keep = ("num_envs", "seed", "max_episode_steps", *emulators.spec.settings())
    settings = {name: emulators._pool.config[name] for name in keep} | {"seed": emulators._pool.config["env_seed"]}
    if emulators.spec.family == "atari":
        settings["episodic_life"] = emulators.training
    with _quiet():
        pool = envpool.make(emulators.spec.env_id, env_type="gymnasium", **settings | changes)
        assert pool.observation_space is not None  # made here, where its warnings are silenced
        return pool
