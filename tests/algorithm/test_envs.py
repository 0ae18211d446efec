"""`speedyzero.envs` against the real EnvPool."""

import envpool
import gymnasium
import numpy as np
import pytest
import torch

from speedyzero import envs
from speedyzero.envs import Emulators, EnvError, describe

BUFFERS = ("frames", "reward", "done", "first", "game_over")


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
    with envs._quiet():
        pool = envpool.make(emulators.spec.env_id, env_type="gymnasium", **settings | changes)
        assert pool.observation_space is not None  # made here, where its warnings are silenced
        return pool


# What an environment looks like

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


@pytest.mark.parametrize("env_id", ["Pong-v5", "CartPole-v1"])
def test_the_same_seed_gives_the_same_play_whatever_the_threads(start, env_id):
    a, b = start(env_id, threads=1), start(env_id, threads=3)
    assert_same(seen(a), seen(b))
    assert_same(play(a, 20), play(b, 20))


def test_lanes_seeds_and_modes_share_no_random_stream(start):
    variants = ({}, {"seed": 4}, {"training": False})
    openings = np.concatenate([start("CartPole-v1", **each).frames.numpy().reshape(3, -1) for each in variants])
    assert len(np.unique(openings, axis=0)) == 9


def test_reset_fills_the_buffers_with_first_frames_and_starts_anew(start):
    emulators = start("Catch-v0")
    opening = seen(emulators)
    assert opening["first"].all()
    assert not any(opening[name].any() for name in ("reward", "done", "game_over"))
    record = play(emulators, 10)  # Catch ends at the ninth step, and the tenth is the reset
    assert record["done"][8].all()
    assert record["first"][9].all()
    assert not record["reward"][9].any()
    emulators.reset()
    assert_same(seen(emulators), opening)
    assert (emulators.transitions, emulators.drain_finished()) == (0, [])
    assert_same(play(emulators, 10), record)


def test_first_follows_done_lane_by_lane(start):
    record = play(start("CartPole-v1", lanes=5), 60)
    np.testing.assert_array_equal(record["first"][1:], record["done"][:-1])
    np.testing.assert_array_equal(record["game_over"], record["done"])
    assert record["done"].any(0).all()
    assert len({tuple(lane) for lane in record["done"].T}) > 1


def test_actions_may_be_overwritten_as_soon_as_they_are_sent(start):
    a, b = start("Pong-v5", lanes=2), start("Pong-v5", lanes=2)
    for actions in np.random.default_rng(2).integers(0, 6, (6, 2)):
        act(a, actions)
        b.actions.copy_(torch.from_numpy(actions))
        b.send()
        b.actions.fill_(5)
        b.recv()
        assert_same(seen(a), seen(b))
    np.testing.assert_array_equal(a.state_dict()["log"], b.state_dict()["log"])


class Shuffled:
    """EnvPool with the rows of every answer reversed."""

    def __init__(self, pool):
        self.pool, self.send, self.close, self.observation_space = pool, pool.send, pool.close, pool.observation_space

    def recv(self, answer=None):
        *arrays, info = answer or self.pool.recv()
        return *(array[::-1] for array in arrays), {name: value[::-1] for name, value in info.items() if name != "players"}

    def reset(self):
        return self.recv(self.pool.reset())


@pytest.mark.parametrize(("env_id", "steps"), [("CartPole-v1", 40), ("FrozenLake-v1", 40), ("Breakout-v5", 30)])
def test_results_that_arrive_in_another_order_find_their_lanes(start, monkeypatch, env_id, steps):
    a, b = start(env_id), start(env_id)
    monkeypatch.setattr(b, "_make", lambda make=b._make: Shuffled(make()))
    b.reset()
    assert_same(seen(a), seen(b))
    assert_same(play(a, steps), play(b, steps))


def test_verbs_out_of_turn_are_refused(start):
    emulators = Emulators(describe("Catch-v0"), 3, 0, training=True)

    def refused(says, *verbs):
        for verb in verbs:
            with pytest.raises(EnvError, match=says):
                verb()

    refused("call reset first", emulators.send, emulators.recv, emulators.state_dict)
    emulators.reset()
    refused("nothing was sent", emulators.recv)
    emulators.send()
    refused("call recv", emulators.send, emulators.state_dict)
    emulators.reset()  # also in flight
    act(emulators, [0, 0, 0])
    emulators.close()


def test_in_training_a_lost_life_is_a_done_and_the_return_sums_over_the_game(start):
    emulators = start("Breakout-v5", lanes=4)
    record = play(emulators, 330, seed=1)
    finished = emulators.drain_finished()
    assert emulators.drain_finished() == []
    ends = np.argwhere(record["game_over"])  # by step, then by lane
    assert len(finished) == len(ends) >= 4
    for lane in range(4):
        over = np.flatnonzero(record["game_over"][:, lane])[0]
        assert np.flatnonzero(record["done"][:, lane])[4] == over, "of five lives"
        moves = ~record["first"][: over + 1, lane]
        assert moves.sum() == over + 1 - 4
        score = record["reward"][: over + 1, lane].sum()
        assert finished[np.flatnonzero((ends == (over, lane)).all(1))[0]] == (score, moves.sum())
    assert max(total for total, _ in finished) > 1


class Told:
    """In the place of EnvPool's Atari: lanes that do as they are told, one row a step of what each lane reports.

    A row's word: a number of lives, with `-` behind it if a life was lost (a done), `x` if the game is over, `t` if it is truncated. The
    reward is 2 a step, and 0 at a reset.
    """

    def __init__(self, *rows):
        self.rows, self.lanes = iter([row.split() for row in rows]), len(rows[0].split())
        self.done = np.zeros(self.lanes, bool)
        self.frames = np.zeros((self.lanes, 1, 32, 32), np.uint8)

    def send(self, actions):
        pass

    def close(self):
        pass

    def reset(self):
        return self.frames, {"env_id": np.arange(self.lanes), "lives": np.array([int(word) for word in next(self.rows)])}

    def recv(self):
        words = next(self.rows)
        reward = 2 * (~self.done).astype(np.float32)
        ends = np.array([word[1:] for word in words])
        terminated, truncated = np.isin(ends, ("-", "x")), ends == "t"
        self.done = terminated | truncated
        info = {
            "env_id": np.arange(self.lanes), "lives": np.array([int(word[0]) for word in words], np.int32),
            "terminated": (ends == "x").astype(np.int32), "elapsed_step": np.ones(self.lanes, np.int32),
        }  # fmt: skip
        return self.frames, reward, terminated, truncated, info


def told(*rows):
    """Emulators that were told so and reset, one lane a word of a row."""
    emulators = Emulators(describe("RoadRunner-v5", frame_size=32, gray=True), len(rows[0].split()), 0, training=True)
    emulators._make, emulators._order = lambda: Told(*rows), "chw"
    emulators.reset()
    return emulators


@pytest.mark.parametrize(
    ("rows", "ends"),
    [
        ("3|2-|2|1-|1|1", {}),  # lives lost one after the other
        ("5|1-|2|2", {}),  # a life that was won in the no-ops
        ("3|2-|2|3|3", {}),  # a life that was won in play
        ("3|3|0x|3|3", {2: [(0, 2)]}),  # the game ended in play: it is not counted again at its reset
        ("3|1t|3|3", {1: [(0, 1)]}),  # at the time limit as well
        ("3|1-|3|2-|3|3", {2: [(0, 1)], 4: [(0, 1)]}),
        ("0|0x|0|0t|0", {1: [(0, 1)], 3: [(0, 1)]}),  # a game without lives
        # Steps 1, 2 and 4 are transitions of the first game, 6, 7, 9 and 11 of the second.
        ("3 3|3 3|2- 3|2 3|1- 3|3 3|3 3|2- 3|2 3|1- 3|1 3|0x 3", {5: [(0, 3)], 11: [(0, 4)]}),
        ("3 3 3 3|3 1- 3 1-|0x 3 3 3|3 3 0x 3", {2: [(0, 2), (1, 1), (3, 1)], 3: [(2, 3)]}),  # of both kinds at once, by lane
    ],
)
def test_a_game_that_ends_in_the_noops_after_a_lost_life_ends_at_the_reset_frame_and_no_other_does(rows, ends):
    rows, counted = rows.split("|"), 0
    emulators = told(*rows)
    for step in range(1, len(rows)):
        act(emulators, [0] * emulators.lanes)
        over = emulators.game_over.nonzero().flatten().tolist()
        games = emulators.drain_finished()
        assert list(zip(over, games, strict=True)) == [(lane, (2.0 * length, length)) for lane, length in ends.get(step, [])]
        counted += sum(length for _, length in games)
    assert emulators.transitions == counted + sum(length for _, length in emulators.unfinished())


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
        actions = rng.integers(0, emulators.spec.num_actions, 8)
        act(emulators, actions)
        new = np.array([bytes(row) in starts for row in pool.step(actions)[4]["ram"]]) & lost
        np.testing.assert_array_equal((emulators.game_over & emulators.first).numpy(), new)
        unseen += int(new.sum())
    assert unseen > 0


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


@pytest.mark.parametrize(("env_id", "steps"), [("Catch-v0", 0), ("Catch-v0", 47), ("Breakout-v5", 60)])
def test_restored_emulators_have_the_same_future(start, monkeypatch, env_id, steps):
    monkeypatch.setattr(envs, "LOG_CHUNK", 16)
    a, b = start(env_id, lanes=2), start(env_id, lanes=2, threads=1)
    play(a, steps)
    state = a.state_dict()
    assert (state["log"].shape, state["log"].dtype) == ((steps, 2), np.uint8)
    play(b, 5, seed=9)  # it may have run before
    reports = []
    b.restore(state, lambda done, total: reports.append((done, total)))
    assert reports == [(step, steps) for step in range(steps + 1)]
    assert_same(seen(a), seen(b))
    assert_same(play(a, 20, seed=7), play(b, 20, seed=7))
    assert a.transitions == b.transitions
    assert a.drain_finished() == b.drain_finished()


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


@pytest.mark.parametrize(("actions", "dtype"), [(256, np.uint8), (257, np.int16), (32768, np.int16), (32769, np.int32)])
def test_the_log_holds_every_action(actions, dtype):
    assert envs._log_dtype(actions) == dtype


def test_a_state_that_is_damaged_or_leads_elsewhere_is_refused_and_says_why(start, monkeypatch):
    emulators = start("CartPole-v1")
    play(emulators, 10)
    state = emulators.state_dict()
    log = state["log"]
    for damage in ({"log": 1 - log}, {"log": log[:, :2]}, {"log": log.astype(np.int16)}, {"crc": state["crc"][:3]}):
        with pytest.raises(EnvError, match="the checkpoint's action log is damaged"):
            emulators.restore(state | damage)
    with pytest.raises(EnvError, match="what the checkpoint says of them is damaged"):
        emulators.restore({name: value for name, value in state.items() if name != "finished"})
    same = f"envpool is {envpool.__version__} in both"
    with pytest.raises(EnvError, match=f"^the emulators could not be restored: frames on the way differ after 10 steps; {same}"):
        emulators.restore(state | {"frames_crc": state["frames_crc"] ^ 1})
    with pytest.raises(EnvError, match=r"transitions differ .* pip install envpool==0\.9"):
        emulators.restore(state | {"transitions": 1, "envpool": "0.9"})
    with monkeypatch.context() as patch:
        patch.setattr(emulators, "_make", lambda: twin_pool(start("CartPole-v1", seed=8)))
        with pytest.raises(EnvError, match=r"^the emulators could not be restored: frames.* differ after 10 steps"):
            emulators.restore(state)
    emulators.restore(state)


@pytest.mark.parametrize("other", [{"seed": 4}, {"lanes": 2}, {"training": False}, {"max_episode_steps": 7}, {"env_id": "CartPole-v1"}])
def test_a_state_of_other_emulators_is_refused_by_name(start, other):
    state = start("Catch-v0").state_dict()
    with pytest.raises(EnvError, match=f"saved with {next(iter(other))}="):
        start(**{"env_id": "Catch-v0"} | other).restore(state)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs CUDA")
def test_buffers_can_be_pinned(start):
    emulators = start("Catch-v0", pin=True)
    assert all(getattr(emulators, name).is_pinned() for name in (*BUFFERS, "actions"))
