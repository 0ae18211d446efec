"""The emulators against the real EnvPool: steps, games, limits."""

import numpy as np
import pytest
import torch

from speedyzero.emulators import Emulators
from speedyzero.envs import EnvError, describe
from tests.algorithm.emulator_support import BUFFERS, act, assert_same, play, seen, twin_pool


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs CUDA")
def test_buffers_can_be_pinned(start):
    emulators = start("Catch-v0", pin=True)
    assert all(getattr(emulators, name).is_pinned() for name in (*BUFFERS, "actions"))
