"""`speedyzero.envs` against the real EnvPool."""

import os
import sys
import warnings

import envpool
import gymnasium
import numpy as np
import pytest
import torch

from speedyzero import envs
from speedyzero.envs import Emulators, EnvError, describe

BUFFERS = ("frames", "reward", "done", "first", "game_over")
SLOTS = (*BUFFERS, "actions")


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
    return {name: np.stack([row[name] for row in record]) for name in BUFFERS}


def assert_same(a, b):
    for name in BUFFERS:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def twin_pool(emulators, **changes):
    """EnvPool itself, with the seeds that these emulators use."""
    keep = ("num_envs", "seed", "max_episode_steps", *emulators.spec.settings())
    settings = {name: emulators._pool.config[name] for name in keep}
    settings["seed"] = emulators._pool.config["env_seed"]
    if emulators.spec.family == "atari":
        settings["episodic_life"] = emulators.training
    with envs._quiet():
        pool = envpool.make(emulators.spec.env_id, env_type="gymnasium", **settings | changes)
        assert pool.observation_space is not None  # made here, where its warnings are silenced
        return pool


# What an environment looks like


@pytest.mark.parametrize(
    ("env_id", "family", "dtype", "shape", "actions"),
    [
        ("Pong-v5", "atari", torch.uint8, (3, 96, 96), 6),
        ("Breakout-v5", "atari", torch.uint8, (3, 96, 96), 4),
        ("Freeway-v5", "atari", torch.uint8, (3, 96, 96), 3),
        ("MsPacman-v5", "atari", torch.uint8, (3, 96, 96), 9),
        ("Catch-v0", "other", torch.float32, (1, 10, 5), 3),
        ("CartPole-v1", "other", torch.float32, (4, 1, 1), 2),
        ("FrozenLake-v1", "other", torch.float32, (16, 1, 1), 4),
        ("tabular/Blackjack-v0", "other", torch.float32, (3, 1, 1), 2),
        ("two-way-v0", "other", torch.float32, (3, 3, 5), 5),
        ("gfootball/academy_empty_goal-v1", "other", torch.uint8, (4, 72, 96), 19),
    ],
)
def test_every_kind_of_environment_has_the_described_shapes(start, env_id, family, dtype, shape, actions):
    spec = describe(env_id)
    assert (spec.env_id, spec.family, spec.frame_shape, spec.num_actions) == (env_id, family, shape, actions)
    assert spec.image == (dtype == torch.uint8)
    emulators = start(env_id, lanes=2)
    play(emulators, 2)
    assert emulators.frames.shape == (2, *shape)
    assert emulators.frames.dtype == dtype
    assert emulators.frames.any()
    assert {name: getattr(emulators, name).dtype for name in SLOTS[1:]} == {
        "reward": torch.float32,
        "done": torch.bool,
        "first": torch.bool,
        "game_over": torch.bool,
        "actions": torch.int64,
    }
    assert all(getattr(emulators, name).shape == (2,) for name in SLOTS[1:])


@pytest.mark.parametrize(
    ("env_id", "arrange"),
    [
        ("Breakout-v5", lambda o: o),
        ("Catch-v0", lambda o: o[:, None]),
        ("CartPole-v1", lambda o: o[:, :, None, None]),
        ("tabular/Blackjack-v0", lambda o: o[:, :, None, None].astype(np.float32)),
        ("FrozenLake-v1", lambda o: np.eye(16, dtype=np.float32)[o][:, :, None, None]),
        ("gfootball/academy_empty_goal-v1", lambda o: np.moveaxis(o, -1, 1)),
    ],
)
def test_frames_are_envpools_observations_rearranged(start, env_id, arrange):
    emulators = start(env_id, lanes=2)
    pool = twin_pool(emulators)
    np.testing.assert_array_equal(emulators.frames.numpy(), arrange(pool.reset()[0]))
    rng = np.random.default_rng(1)
    for _ in range(6):
        actions = rng.integers(0, emulators.spec.num_actions, 2)
        act(emulators, actions)
        np.testing.assert_array_equal(emulators.frames.numpy(), arrange(pool.step(actions)[0]))


@pytest.mark.parametrize(("size", "gray", "shape"), [(64, True, (1, 64, 64)), (32, False, (3, 32, 32)), (None, True, (1, 96, 96))])
@pytest.mark.parametrize("training", [True, False])
def test_atari_frames_of_any_size_and_gray_are_envpools_own_pixels(start, size, gray, shape, training):
    emulators = start("Breakout-v5", lanes=2, training=training, frame_size=size, gray=gray)
    assert emulators.spec == describe("Breakout-v5", frame_size=size, gray=gray)
    assert emulators.spec.frame_shape == shape
    assert (emulators.frames.shape, emulators.frames.dtype) == ((2, *shape), torch.uint8)
    twin = {"gray_scale": gray, "img_height": shape[1], "img_width": shape[2]}
    pool = twin_pool(emulators, **twin)
    np.testing.assert_array_equal(emulators.frames.numpy(), pool.reset()[0])
    rng = np.random.default_rng(1)
    for _ in range(6):
        actions = rng.integers(0, 4, 2)
        act(emulators, actions)
        np.testing.assert_array_equal(emulators.frames.numpy(), pool.step(actions)[0])
    assert len(emulators.frames.unique()) > 2


@pytest.mark.parametrize("size", [31, 257, -1, 10**30])
def test_a_frame_size_out_of_bounds_is_refused_before_envpool_is_asked_for_it(size):
    with pytest.raises(EnvError, match=r"^--frame-size .*: must lie between 32 and 256; 96 is EfficientZero's$"):
        describe("Pong-v5", frame_size=size)


@pytest.mark.parametrize(("env_id", "given"), [("Catch-v0", {"frame_size": 64}), ("gfootball/academy_empty_goal-v1", {"gray": False})])
def test_an_environment_that_is_no_atari_game_takes_no_frame_size_and_no_gray(env_id, given):
    with pytest.raises(EnvError, match=f"^--(frame-size 64|gray False): {env_id} is no Atari game"):
        describe(env_id, **given)


@pytest.mark.parametrize(
    ("shape", "frame", "order"),
    [
        ((), (1, 1, 1), "chw"),
        ((7,), (7, 1, 1), "chw"),
        ((10, 5), (1, 10, 5), "chw"),
        ((3, 96, 96), (3, 96, 96), "chw"),
        ((96, 80, 3), (3, 96, 80), "hwc"),
        ((5, 9, 4), (4, 5, 9), "hwc"),
        ((9, 9, 5), (9, 9, 5), "chw"),
        ((4, 4, 4), (4, 4, 4), "chw"),
    ],
)
def test_a_box_becomes_channels_height_width(shape, frame, order):
    assert envs._layout("X-v0", gymnasium.spaces.Box(0, 1, shape)) == (frame, order)


@pytest.mark.parametrize(
    ("space", "words"),
    [
        (gymnasium.spaces.Box(0, 1, (2, 2, 2, 2)), "4-dimensional observations"),
        (gymnasium.spaces.Discrete(4097), "4097 discrete observations"),
        (gymnasium.spaces.Tuple([gymnasium.spaces.Discrete(2)]), "Tuple observations"),
        (gymnasium.spaces.MultiBinary(3), "MultiBinary observations"),
    ],
)
def test_an_observation_that_is_no_frame_is_refused(space, words):
    with pytest.raises(EnvError, match=f"^--env X-v0: {words}; "):
        envs._layout("X-v0", space)


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("Pong", "--env Pong: not an EnvPool id; did you mean Pong-v5?"),
        ("pong", "--env pong: not an EnvPool id; did you mean Pong-v5?"),
        ("ALE/Pong-v5", "--env ALE/Pong-v5: not an EnvPool id; did you mean Pong-v5?"),
        ("PongNoFrameskip-v4", "--env PongNoFrameskip-v4: not an EnvPool id; did you mean Pong-v5?"),
        ("Breakot-v5", "--env Breakot-v5: not an EnvPool id; did you mean Breakout-v5?"),
        ("zzzzqq", "--env zzzzqq: not an EnvPool id; envpool.list_all_envs() lists them"),
        (
            "Pendulum-v1",
            "--env Pendulum-v1: continuous actions (Box(1,)); speedyzero needs discrete actions, as in CartPole-v1",
        ),
        (
            "Game2048-v1",
            "--env Game2048-v1: Dict observations; speedyzero needs one array of at most 3 dimensions",
        ),
        ("TicTacToe-v1", "--env TicTacToe-v1: 2 players; speedyzero plays alone, as in Catch-v0"),
    ],
)
def test_an_environment_that_cannot_be_played_is_named_with_its_flag(env_id, message):
    with pytest.raises(EnvError) as error:
        describe(env_id)
    assert str(error.value) == message
    assert isinstance(error.value, ValueError)


def test_gymnasiums_remarks_on_precision_are_silenced_only_inside(start):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        start("CartPole-v1")
        assert warnings.filters == before


def test_atari_runs_with_the_settings_of_the_design(start):
    wanted = {
        "gray_scale": False,
        "img_height": 96,
        "img_width": 96,
        "stack_num": 1,
        "frame_skip": 4,
        "noop_max": 30,
        "use_fire_reset": False,
        "full_action_space": False,
        "repeat_action_probability": 0.0,
        "reward_clip": False,
        "max_episode_steps": 27_000,
        "num_envs": 2,
        "batch_size": 2,
    }
    for training in (True, False):
        config = start("Pong-v5", lanes=2, training=training)._pool.config
        assert {name: config[name] for name in wanted} == wanted
        assert config["episodic_life"] is training


@pytest.mark.parametrize("wrong", [{"lanes": 0}, {"seed": -1}, {"max_episode_steps": 0}])
def test_a_count_that_makes_no_sense_is_refused(start, wrong):
    with pytest.raises(EnvError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
        start("Catch-v0", **wrong)


# The two verbs


@pytest.mark.parametrize("env_id", ["Pong-v5", "Catch-v0", "CartPole-v1"])
def test_the_same_seed_gives_the_same_play_whatever_the_threads(start, env_id):
    a, b = start(env_id, threads=1), start(env_id, threads=3)
    assert_same(seen(a), seen(b))
    assert_same(play(a, 20), play(b, 20))


def test_lanes_seeds_and_modes_share_no_random_stream(start):
    variants = ({}, {"seed": 4}, {"training": False})
    openings = np.concatenate([start("CartPole-v1", **each).frames.numpy().reshape(3, -1) for each in variants])
    assert len(np.unique(openings, axis=0)) == 9


def test_a_different_seed_plays_other_noops(start):
    a, b = start("Pong-v5", seed=3), start("Pong-v5", seed=4)
    assert not np.array_equal(play(a, 5)["frames"], play(b, 5)["frames"])


def test_reset_fills_the_buffers_with_first_frames_and_starts_anew(start):
    emulators = start("Catch-v0")
    opening = seen(emulators)
    assert opening["first"].all()
    for name in ("reward", "done", "game_over"):
        assert not opening[name].any()
    record = play(emulators, 9)  # Catch ends at the ninth step
    assert record["done"][-1].all()
    assert record["reward"][-1].all()
    emulators.reset()
    assert_same(seen(emulators), opening)
    assert (emulators.transitions, emulators.drain_finished()) == (0, [])
    assert_same(play(emulators, 9), record)


def test_the_step_after_a_done_ignores_its_action_and_returns_the_reset_frame(start):
    a, b = start("Catch-v0"), start("Catch-v0")
    for _ in range(9):
        assert not a.done.any()
        act(a, [1, 1, 1])
        act(b, [1, 1, 1])
    assert a.done.all()
    last = a.frames.clone()
    act(a, [0, 0, 0])
    act(b, [2, 2, 2])
    assert_same(seen(a), seen(b))
    assert a.first.all()
    for name in ("reward", "done", "game_over"):
        assert not getattr(a, name).any()
    assert not torch.equal(a.frames, last)
    ball_row, paddle_row = a.frames[:, 0, 0], a.frames[:, 0, 9]
    assert (ball_row.sum(1) == 1).all()
    assert (paddle_row == torch.tensor([0, 0, 1, 0, 0])).all()
    assert_same(play(a, 12), play(b, 12))


def test_first_follows_done_lane_by_lane(start):
    record = play(start("CartPole-v1", lanes=5), 60)
    np.testing.assert_array_equal(record["first"][1:], record["done"][:-1])
    np.testing.assert_array_equal(record["game_over"], record["done"])
    ends = record["done"].sum(0)
    assert ends.min() > 0
    assert len({tuple(lane) for lane in record["done"].T}) > 1


def test_actions_may_be_overwritten_as_soon_as_they_are_sent(start):
    a, b = start("Pong-v5", lanes=2), start("Pong-v5", lanes=2)
    rng = np.random.default_rng(2)
    for _ in range(6):
        actions = torch.from_numpy(rng.integers(0, 6, 2))
        act(a, actions)
        b.actions.copy_(actions)
        b.send()
        b.actions.fill_(5)
        b.recv()
        assert_same(seen(a), seen(b))
    np.testing.assert_array_equal(a.state_dict()["log"], b.state_dict()["log"])


def test_buffers_never_move(start):
    emulators = start("Breakout-v5", lanes=2)
    addresses = [getattr(emulators, name).data_ptr() for name in SLOTS]
    play(emulators, 50)
    emulators.restore(emulators.state_dict())
    emulators.reset()
    assert [getattr(emulators, name).data_ptr() for name in SLOTS] == addresses


def test_results_that_arrive_in_another_order_find_their_lanes(start):
    class Shuffled:
        """EnvPool with the rows of every answer reversed."""

        def __init__(self, pool):
            self.pool, self.send, self.close = pool, pool.send, pool.close
            self.observation_space = pool.observation_space

        def recv(self):
            *arrays, info = self.pool.recv()
            flipped = {name: value[::-1] for name, value in info.items() if name != "players"}
            return *(array[::-1] for array in arrays), flipped

        def reset(self):
            observations, info = self.pool.reset()
            return observations[::-1], {name: value[::-1] for name, value in info.items() if name != "players"}

    for env_id, steps in (("CartPole-v1", 40), ("FrozenLake-v1", 40), ("Breakout-v5", 30)):
        a, b = start(env_id), Emulators(describe(env_id), 3, 3, training=True)
        b._make = lambda make=b._make: Shuffled(make())
        b.reset()
        assert_same(seen(a), seen(b))
        assert_same(play(a, steps), play(b, steps))
        b.close()


def test_verbs_out_of_turn_are_refused(start):
    fresh = Emulators(describe("Catch-v0"), 2, 0, training=True)
    for verb in (fresh.send, fresh.recv, fresh.state_dict):
        with pytest.raises(EnvError, match="call reset first"):
            verb()
    emulators = start("Catch-v0")
    with pytest.raises(EnvError, match="nothing was sent"):
        emulators.recv()
    emulators.send()
    for verb in (emulators.send, emulators.state_dict):
        with pytest.raises(EnvError, match="call recv"):
            verb()
    emulators.reset()  # also in flight
    act(emulators, [0, 0, 0])


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_close_ends_the_threads(start):
    def threads():
        return len(os.listdir("/proc/self/task"))

    before = threads()
    emulators = start("Catch-v0", lanes=4, threads=4)
    assert threads() >= before + 4
    emulators.close()
    assert threads() == before


# Lives, games and limits


def games(record):
    """(return, length) of every finished game in a record, in the order of their ends."""
    lanes = record["done"].shape[1]
    total, length, finished = [0.0] * lanes, [0] * lanes, []
    for step in range(len(record["done"])):
        for lane in range(lanes):
            if not record["first"][step, lane]:
                total[lane] += float(record["reward"][step, lane])
                length[lane] += 1
            if record["game_over"][step, lane]:
                finished.append((total[lane], length[lane]))
                total[lane], length[lane] = 0.0, 0
    return finished


def test_in_training_a_lost_life_is_a_done_and_the_return_sums_over_the_game(start):
    emulators = start("Breakout-v5", lanes=4)
    record = play(emulators, 330, seed=1)
    finished = emulators.drain_finished()
    assert emulators.drain_finished() == []
    assert finished == games(record)
    assert len(finished) >= 4
    for lane in range(4):
        ends, over = np.flatnonzero(record["done"][:, lane]), np.flatnonzero(record["game_over"][:, lane])
        assert ends[4] == over[0]  # five lives
        lives = np.split(record["reward"][: over[0] + 1, lane], ends[:4] + 1)
        in_order = np.flatnonzero(record["game_over"])  # row-major: by step, then by lane
        index = int(np.flatnonzero(in_order == over[0] * 4 + lane)[0])
        assert finished[index] == (sum(life.sum() for life in lives), over[0] + 1 - 4)
    assert max(total for total, _ in finished) > 1


class Told:
    """In the place of EnvPool's Atari: lanes that do as they are told, one row a step of what each lane reports.

    A row's word: a number of lives, with `-` behind it if a life was lost (a done), `x` if the game is over, `t` if it is truncated. The
    reward is 1 a step, and 0 at a reset.
    """

    def __init__(self, *rows):
        self.rows, self.lanes = iter([row.split() for row in rows]), len(rows[0].split())
        self.done = np.zeros(self.lanes, bool)

    def send(self, actions):
        pass

    def close(self):
        pass

    def reset(self):
        words = next(self.rows)
        return np.zeros((self.lanes, 1, 32, 32), np.uint8), {"env_id": np.arange(self.lanes), "lives": np.array([int(w) for w in words])}

    def recv(self):
        words = next(self.rows)
        reward = (~self.done).astype(np.float32)
        ends = np.array([word[1:] for word in words])
        terminated, truncated = np.isin(ends, ("-", "x")), ends == "t"
        self.done = terminated | truncated
        info = {
            "env_id": np.arange(self.lanes), "lives": np.array([int(word[0]) for word in words], np.int32),
            "terminated": (ends == "x").astype(np.int32), "elapsed_step": np.ones(self.lanes, np.int32),
        }
        return np.zeros((self.lanes, 1, 32, 32), np.uint8), reward, terminated, truncated, info


def told(*rows, training=True):
    """Emulators that were told so and reset, one lane a word of a row."""
    spec = describe("RoadRunner-v5", frame_size=32, gray=True)
    emulators = Emulators(spec, len(rows[0].split()), 0, training=training)
    emulators._make, emulators._order = lambda: Told(*rows), "chw"
    emulators.reset()
    return emulators


def test_a_game_that_ends_in_the_noops_after_a_lost_life_ends_at_the_reset_frame():
    emulators = told("3 3", "3 3", "2- 3", "2 3", "1- 3", "3 3", "3 3", "2- 3", "2 3", "1- 3", "1 3", "0x 3")
    ends, drained = [], []
    for _ in range(11):
        act(emulators, [0, 0])
        ends.append(emulators.game_over.tolist())
        games = emulators.drain_finished()
        assert len(games) == sum(ends[-1])
        drained += games
    assert [step for step, (over, _) in enumerate(ends, 1) if over] == [5, 11]
    assert not any(over for _, over in ends)
    # Steps 1, 2 and 4 are transitions of the first game, 6, 7, 9 and 11 of the second.
    assert drained == [(3.0, 3), (4.0, 4)]
    assert emulators.unfinished() == [(0.0, 0), (11.0, 11)]
    assert emulators.transitions == 7 + 11


@pytest.mark.parametrize(
    ("rows", "over"),
    [
        ("3 2- 2 1- 1 1", []),  # lives lost one after the other
        ("5 1- 2 2", []),  # a life that was won in the no-ops
        ("3 2- 2 3 3", []),  # a life that was won in play
        ("3 3 0x 3 3", [2]),  # the game ended in play: it is not counted again at its reset
        ("3 1t 3 3", [1]),  # at the time limit as well
        ("3 2- 3 3", [2]),
        ("3 1- 3 2- 3 3", [2, 4]),
        ("2 1- 2", [2]),
        ("0 0x 0 0t 0", [1, 3]),  # a game without lives
    ],
)
def test_lives_that_rise_to_those_of_a_new_game_at_a_reset_are_a_new_game_and_nothing_else_is(rows, over):
    emulators, ends = told(*rows.split()), []
    for step in range(1, len(rows.split())):
        act(emulators, [0])
        ends += [step] if emulators.game_over[0] else []
    assert ends == over
    assert len(emulators.drain_finished()) == len(over)


def test_games_that_end_in_the_noops_are_drained_by_lane_with_those_that_end_in_play():
    emulators = told("3 3 3 3", "3 1- 3 1-", "0x 3 3 3", "3 3 0x 3")
    got = []
    for _ in range(3):
        act(emulators, [0] * 4)
        got.append((emulators.game_over.nonzero().flatten().tolist(), emulators.drain_finished()))
    assert got == [([], []), ([0, 1, 3], [(2.0, 2), (1.0, 1), (1.0, 1)]), ([2], [(3.0, 3)])]


def test_road_runners_games_that_end_in_the_noops_are_those_whose_reset_shows_a_new_game(start):
    emulators = start("RoadRunner-v5", lanes=8, frame_size=32, gray=True)
    # Memory of the machine after each number of no-ops at the start of a game: the twin's every second step is such a start.
    fresh = twin_pool(emulators, max_episode_steps=1)
    starts = {bytes(ram) for ram in fresh.reset()[1]["ram"]}
    for _ in range(40):
        starts |= {bytes(ram) for ram in fresh.step(np.zeros(8, np.int64))[4]["ram"]}
    pool = twin_pool(emulators)
    pool.reset()
    rng, unseen = np.random.default_rng(0), 0
    for _ in range(320):
        lost = (emulators.done & ~emulators.game_over).numpy()
        ended_in_play = (emulators.done & emulators.game_over).numpy()
        actions = rng.integers(0, emulators.spec.num_actions, 8)
        act(emulators, actions)
        ram = pool.step(actions)[4]["ram"]
        new = np.array([bytes(row) in starts for row in ram]) & lost
        np.testing.assert_array_equal((emulators.game_over & emulators.first).numpy(), new)
        assert not (emulators.game_over.numpy() & ended_in_play).any()
        unseen += int(new.sum())
    assert unseen > 0


def test_transitions_leave_out_the_resets(start):
    emulators = start("Breakout-v5", lanes=2)
    record = play(emulators, 100)
    assert record["first"].any()
    assert emulators.transitions == 200 - record["first"].sum()


def test_evaluation_plays_on_after_a_lost_life(start):
    emulators = start("Breakout-v5", lanes=2, training=False)
    pool = twin_pool(emulators)
    pool.reset()
    rng = np.random.default_rng(0)
    lives_lost = 0
    for _ in range(300):
        actions = rng.integers(0, 4, 2)
        act(emulators, actions)
        lives = pool.step(actions)[4]["lives"]
        over = emulators.done.numpy()
        np.testing.assert_array_equal(over, emulators.game_over.numpy())
        lives_lost += int((lives[0] < 5) and not over[0])
        if over[0]:
            assert lives[0] == 0
            break
    assert over[0]
    assert lives_lost > 50
    assert emulators.drain_finished()[-1][1] > 100


@pytest.mark.parametrize(("env_id", "limit"), [("CartPole-v1", 5), ("Pong-v5", 7)])
@pytest.mark.parametrize("training", [True, False])
def test_the_time_limit_ends_the_game(start, env_id, limit, training):
    emulators = start(env_id, training=training, max_episode_steps=limit)
    record = play(emulators, 2 * limit + 1)
    wanted = np.zeros((2 * limit + 1, 3), bool)
    wanted[[limit - 1, 2 * limit]] = True  # the step between is the reset
    np.testing.assert_array_equal(record["done"], wanted)
    np.testing.assert_array_equal(record["game_over"], wanted)
    assert [length for _, length in emulators.drain_finished()] == [limit] * 6


def test_a_time_limit_that_the_environment_ignores_is_refused(start):
    emulators = start("Catch-v0", max_episode_steps=4)
    play(emulators, 4)
    with pytest.raises(EnvError, match="--max-episode-steps 4: Catch-v0 ignores it"):
        play(emulators, 1)


def test_the_time_limit_counts_over_lives(start):
    emulators = start("Breakout-v5", lanes=1, max_episode_steps=60)
    lives = over = 0
    for step in range(70):
        act(emulators, [1 if step % 2 else 3])  # fire and run
        over += int(emulators.game_over[0])
        lives += int(emulators.done[0] & ~emulators.game_over[0])
        if over:
            break
    assert lives > 0
    assert emulators.drain_finished()[0][1] == 60


def test_rewards_are_raw(start):
    emulators = start("MsPacman-v5", lanes=2)
    clipped = twin_pool(emulators, reward_clip=True)
    clipped.reset()
    rng = np.random.default_rng(0)
    biggest = 0
    for _ in range(110):
        actions = rng.integers(0, 9, 2)
        act(emulators, actions)
        np.testing.assert_array_equal(np.sign(emulators.reward.numpy()), clipped.step(actions)[1])
        biggest = max(biggest, emulators.reward.max().item())
    assert biggest >= 10


# Exact resume


@pytest.mark.parametrize(("env_id", "steps"), [("Catch-v0", 47), ("CartPole-v1", 47), ("Breakout-v5", 60)])
def test_restored_emulators_have_the_same_future(start, monkeypatch, env_id, steps):
    monkeypatch.setattr(envs, "LOG_CHUNK", 16)
    a, b = start(env_id, lanes=2), start(env_id, lanes=2, threads=1)
    record = play(a, steps)
    assert record["first"].any()
    state = a.state_dict()
    assert state["log"].shape == (steps, 2)
    assert state["log"].dtype == np.uint8
    play(b, 5, seed=9)  # it may have run before
    reports = []
    b.restore(state, lambda done, total: reports.append((done, total)))
    assert reports == [(step, steps) for step in range(steps + 1)]
    assert_same(seen(a), seen(b))
    assert a.transitions == b.transitions
    assert_same(play(a, 20, seed=7), play(b, 20, seed=7))
    assert a.transitions == b.transitions
    assert a.drain_finished() == b.drain_finished()
    a.restore(b.state_dict())
    assert_same(seen(a), seen(b))


def test_sticky_emulators_are_restored_exactly_and_refuse_the_state_of_others(start):
    """EnvPool draws the repeated actions from the emulator's seed, so that a replay meets the same ones."""
    options = {"lanes": 2, "frame_size": 32, "gray": True}
    a, b = (start("Breakout-v5", sticky_actions=0.25, **options) for _ in range(2))
    plain = start("Breakout-v5", **options)
    record = play(a, 120)
    assert not np.array_equal(record["frames"], play(plain, 120)["frames"])
    assert record["first"].any()
    state = a.state_dict()
    play(b, 7, seed=9)
    b.restore(state)
    assert_same(play(a, 60, seed=7), play(b, 60, seed=7))
    with pytest.raises(EnvError, match=r"saved with sticky_actions=0\.25, not 0\.0"):
        plain.restore(state)
    old = plain.state_dict()
    del old["sticky_actions"]  # as a checkpoint of before there were any
    plain.restore(old)


def test_games_that_were_drained_before_the_save_are_not_reported_twice(start):
    a, b = start("Catch-v0"), start("Catch-v0")
    play(a, 9)
    assert len(a.drain_finished()) == 3
    play(a, 10)
    b.restore(a.state_dict())
    assert b.drain_finished() == [(reward, 9) for reward in a.reward.tolist()]  # Catch pays in its last step only


def test_a_saved_state_is_not_changed_by_later_steps(start):
    emulators = start("CartPole-v1")
    play(emulators, 15)
    state = emulators.state_dict()
    copies = {name: np.array(value) for name, value in state.items()}
    play(emulators, 30)
    for name, value in copies.items():
        np.testing.assert_array_equal(state[name], value, err_msg=name)


def test_a_state_before_the_first_step_is_restored(start):
    a, b = start("Catch-v0"), start("Catch-v0")
    b.restore(a.state_dict())
    assert_same(play(a, 12), play(b, 12))


@pytest.mark.parametrize(("actions", "dtype"), [(256, np.uint8), (257, np.int16), (32768, np.int16), (32769, np.int32)])
def test_the_log_holds_every_action(actions, dtype):
    assert envs._log_dtype(actions) == dtype
    assert np.iinfo(dtype).max >= actions - 1


def test_a_tampered_log_is_refused(start):
    emulators = start("Breakout-v5", lanes=2)
    play(emulators, 10)
    state = emulators.state_dict()
    state["log"][4, 1] = (state["log"][4, 1] + 1) % 4
    with pytest.raises(EnvError, match="the checkpoint's action log is damaged"):
        emulators.restore(state)


def test_a_replay_that_ends_elsewhere_is_refused_and_says_why(start, monkeypatch):
    emulators = start("CartPole-v1")
    play(emulators, 10)
    state = emulators.state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(emulators, "_make", lambda: twin_pool(start("CartPole-v1", seed=8)))
        emulators._order = "chw"
        with pytest.raises(EnvError) as error:
            emulators.restore(state)
    assert str(error.value).startswith("the emulators could not be restored: frames")
    assert "differ after 10 steps" in str(error.value)
    assert f"envpool is {envpool.__version__} in both" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(EnvError, match=r"transitions differ .* pip install envpool==0\.9"):
        emulators.restore(state | {"transitions": 1, "envpool": "0.9"})
    emulators.restore(state)


@pytest.mark.parametrize(
    "other", [{"seed": 4}, {"lanes": 2}, {"training": False}, {"max_episode_steps": 7}, {"env_id": "CartPole-v1"}]
)
def test_a_state_of_other_emulators_is_refused_by_name(start, other):
    state = start("Catch-v0").state_dict()
    emulators = start(**{"env_id": "Catch-v0"} | other)
    with pytest.raises(EnvError, match=f"saved with {next(iter(other))}="):
        emulators.restore(state)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs CUDA")
def test_buffers_can_be_pinned(start):
    emulators = start("Catch-v0", pin=True)
    assert all(getattr(emulators, name).is_pinned() for name in SLOTS)
    play(emulators, 3)
