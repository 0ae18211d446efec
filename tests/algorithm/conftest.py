"""Emulators for a test."""

import pytest

from speedyzero.emulators import Emulators
from speedyzero.envs import describe


@pytest.fixture
def start():
    """`start(env_id, lanes, seed, **options)`: emulators after their reset, closed at the end of the test."""
    made = []

    def make(env_id, lanes=3, seed=3, training=True, **options):
        frames = {name: options.pop(name, None) for name in ("frame_size", "gray")}
        made.append(Emulators(describe(env_id, **frames), lanes, seed, training=training, **options))
        made[-1].reset()
        return made[-1]

    yield make
    for emulators in made:
        emulators.close()
