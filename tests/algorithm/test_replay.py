"""Emulators that are restored have the same future, and refuse a state that is not theirs."""

import envpool
import numpy as np
import pytest

from speedyzero import emulators as stepping
from speedyzero.envs import EnvError
from tests.algorithm.emulator_support import assert_same, play, seen, twin_pool


@pytest.mark.parametrize(("env_id", "steps"), [("Catch-v0", 0), ("Catch-v0", 47), ("Breakout-v5", 60)])
def test_restored_emulators_have_the_same_future(start, monkeypatch, env_id, steps):
    monkeypatch.setattr(stepping, "LOG_CHUNK", 16)
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
    assert stepping._log_dtype(actions) == dtype


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
