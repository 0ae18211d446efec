"""`speedyzero.envs` against the real EnvPool: what an environment looks like."""

import gymnasium
import numpy as np
import pytest
import torch

from speedyzero import envs
from speedyzero.envs import EnvError, describe
from tests.algorithm.emulator_support import act, twin_pool

SMALL = {"frame_size": 32, "gray": False}, {"gray_scale": False, "img_height": 32, "img_width": 32}
GRAY = {"frame_size": 64, "gray": True}, {"gray_scale": True, "img_height": 64, "img_width": 64}
LARGE = {"gray": True, "training": False}, {"gray_scale": True, "img_height": 96, "img_width": 96}
USUAL = {}, {"gray_scale": False, "img_height": 96, "img_width": 96}


@pytest.mark.parametrize(
    ("env_id", "options", "shape", "actions", "arrange"),
    [
        ("Pong-v5", USUAL, (3, 96, 96), 6, lambda o: o),
        ("Breakout-v5", SMALL, (3, 32, 32), 4, lambda o: o),
        ("Breakout-v5", GRAY, (1, 64, 64), 4, lambda o: o),
        ("Breakout-v5", LARGE, (1, 96, 96), 4, lambda o: o),
        ("Catch-v0", ({}, {}), (1, 10, 5), 3, lambda o: o[:, None]),
        ("CartPole-v1", ({}, {}), (4, 1, 1), 2, lambda o: o[:, :, None, None]),
        ("two-way-v0", ({}, {}), (3, 3, 5), 5, lambda o: o.astype(np.float32)),
        ("tabular/Blackjack-v0", ({}, {}), (3, 1, 1), 2, lambda o: o[:, :, None, None].astype(np.float32)),
        ("FrozenLake-v1", ({}, {}), (16, 1, 1), 4, lambda o: np.eye(16, dtype=np.float32)[o][:, :, None, None]),
        ("gfootball/academy_empty_goal-v1", ({}, {}), (4, 72, 96), 19, lambda o: np.moveaxis(o, -1, 1)),
    ],
)
def test_frames_have_the_described_shape_and_are_envpools_observations_rearranged(start, env_id, options, shape, actions, arrange):
    emulators = start(env_id, lanes=2, **options[0])
    spec = emulators.spec
    assert (spec.env_id, spec.frame_shape, spec.num_actions) == (env_id, shape, actions)
    assert spec.family == ("atari" if options[1] else "other")
    assert spec.image == (emulators.frames.dtype == torch.uint8) == (len(shape) == 3 and shape[2] > 16)
    pool = twin_pool(emulators, **options[1])
    np.testing.assert_array_equal(emulators.frames.numpy(), arrange(pool.reset()[0]))
    rng = np.random.default_rng(1)
    for _ in range(6):
        moves = rng.integers(0, spec.num_actions, 2)
        act(emulators, moves)
        observation, reward, *_ = pool.step(moves)
        np.testing.assert_array_equal(emulators.frames.numpy(), arrange(observation))
        np.testing.assert_array_equal(emulators.reward.numpy(), reward.astype(np.float32))
    assert emulators.frames.any()


@pytest.mark.parametrize(
    ("shape", "frame", "order"),
    [
        ((), (1, 1, 1), "chw"), ((7,), (7, 1, 1), "chw"), ((10, 5), (1, 10, 5), "chw"), ((3, 96, 96), (3, 96, 96), "chw"),
        ((96, 80, 3), (3, 96, 80), "hwc"), ((5, 9, 4), (4, 5, 9), "hwc"), ((9, 9, 5), (9, 9, 5), "chw"), ((4, 4, 4), (4, 4, 4), "chw"),
    ],
)  # fmt: skip
def test_a_box_becomes_channels_height_width(shape, frame, order):
    assert envs._layout("X-v0", gymnasium.spaces.Box(0, 1, shape)) == (frame, order)


@pytest.mark.parametrize(
    ("space", "words"),
    [
        (gymnasium.spaces.Box(0, 1, (2, 2, 2, 2)), "4-dimensional observations"),
        (gymnasium.spaces.Discrete(4097), "4097 discrete observations"),
        (gymnasium.spaces.MultiBinary(3), "MultiBinary observations"),
    ],
)
def test_an_observation_that_is_no_frame_is_refused(space, words):
    with pytest.raises(EnvError, match=f"^--env X-v0: {words}; "):
        envs._layout("X-v0", space)


@pytest.mark.parametrize(
    ("env_id", "given", "message"),
    [
        ("pong", {}, "--env pong: not an EnvPool id; did you mean Pong-v5?"),
        ("ALE/Pong-v5", {}, "--env ALE/Pong-v5: not an EnvPool id; did you mean Pong-v5?"),
        ("Breakot-v5", {}, "--env Breakot-v5: not an EnvPool id; did you mean Breakout-v5?"),
        ("zzzzqq", {}, "--env zzzzqq: not an EnvPool id; envpool.list_all_envs() lists them"),
        ("Pendulum-v1", {}, "--env Pendulum-v1: continuous actions (Box(1,)); speedyzero needs discrete actions, as in CartPole-v1"),
        ("Game2048-v1", {}, "--env Game2048-v1: Dict observations; speedyzero needs one array of at most 3 dimensions"),
        ("TicTacToe-v1", {}, "--env TicTacToe-v1: 2 players; speedyzero plays alone, as in Catch-v0"),
        ("Pong-v5", {"frame_size": 31}, "--frame-size 31: must lie between 32 and 256; 96 is EfficientZero's"),
        ("Catch-v0", {"gray": False}, "--gray False: Catch-v0 is no Atari game, its frames are as they are; leave it out"),
    ],
)
def test_what_cannot_be_played_is_refused_in_one_line_with_its_flag(env_id, given, message):
    with pytest.raises(EnvError) as error:
        describe(env_id, **given)
    assert str(error.value) == message


def test_atari_runs_with_the_settings_of_the_design(start):
    wanted = {
        "stack_num": 1, "frame_skip": 4, "noop_max": 30, "use_fire_reset": False, "full_action_space": False,
        "repeat_action_probability": 0.0, "reward_clip": False, "max_episode_steps": 27_000, "num_envs": 2, "batch_size": 2,
    }  # fmt: skip
    for training in (True, False):
        config = start("Pong-v5", lanes=2, training=training)._pool.config
        assert {name: config[name] for name in wanted} == wanted
        assert config["episodic_life"] is training
