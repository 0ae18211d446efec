"""Evaluation: whole games, the first of each lane, with the network's best action and the same frames that training sees."""

import dataclasses
import json
import os
import signal

import numpy as np
import pytest
import torch

from speedyzero import evaluate
from speedyzero.emulators import Emulators
from speedyzero.envs import describe
from speedyzero.evaluate import Frames, Game, describe_result, evaluate_network, play, summarise
from speedyzero.loop import Trainer, train
from speedyzero.run import checkpoint, resume, trained
from speedyzero.run.guard import Interrupted
from speedyzero.sizes import network_spec
from speedyzero.snapshot import fold, make_snapshot
from speedyzero.state import make_network
from speedyzero_kernels.gather import observations
from tests.capture import CaptureSafety

CPU = torch.device("cpu")


def network_for(config, spec):
    return make_network(network_spec(config, spec.frame_shape, spec.num_actions), 0, CPU)


def test_summary_statistics_by_hand():
    games = [Game(-21.0, 900, False, 1, 2), Game(-20.0, 1000, False, 1, 3), Game(-19.0, 1100, False, 1, 4), Game(-8.0, 27_000, True, 1, 4)]
    result = summarise("Pong-v5", games, 5, 6, 7)
    assert (result["mean"], result["median"], result["std"]) == (-17.0, -19.5, pytest.approx(np.sqrt((16 + 9 + 4 + 81) / 4)))
    assert result["human_normalised"] == pytest.approx((-17 + 20.7) / (14.6 + 20.7))
    assert (result["episodes"], result["env_steps"], result["updates"], result["seed"]) == (4, 5, 6, 7)
    assert result["lengths"] == [900, 1000, 1100, 27_000]
    assert result["cut"] == [False, False, False, True]
    assert (result["distinct_games"], result["distinct_starts"]) == (3, 1)
    for sticky, why in ((0.0, ", as only the start of a game is random"), (0.25, "")):
        line = describe_result(result | {"checkpoint": "checkpoint_7.safetensors", "sticky_actions": sticky})
        assert line.endswith(f", only 3 distinct{why} (docs/PROTOCOL.md)")
    assert summarise("Catch-v0", games, 0, 0, 0)["human_normalised"] is None


def test_a_game_cut_before_the_benchmarks_own_limit_leaves_no_human_normalised_score():
    whole, cut = Game(-21.0, 900, False, 1, 1), Game(0.0, 26_999, True, 2, 2)
    result = summarise("Pong-v5", [whole, cut], 0, 0, 0) | {"checkpoint": "checkpoint_7.safetensors", "sticky_actions": 0.0}
    assert result["human_normalised"] is None
    assert describe_result(result).endswith("over 2 episodes of checkpoint_7, 1 cut by the limit, so no human-normalised score")
    assert summarise("Pong-v5", [whole, cut._replace(length=27_000)], 0, 0, 0)["human_normalised"] is not None


def test_breakout_games_go_through_all_lives(tiny_config):
    config = tiny_config(env="Breakout-v5", start_transitions=90, ring_positions=100, eval_max_steps=60)
    spec = describe("Breakout-v5")
    result = evaluate_network(network_for(config, spec), config, spec, 0, 0)
    assert result["lengths"] == [60, 60], "no life ends a game; the limit does"
    assert result["cut"] == [True, True]
    assert (result["distinct_starts"], result["distinct_games"]) == (1, 1), "nothing moves in Breakout's no-ops, and nothing is random"


@pytest.mark.parametrize("limits", [{"max_episode_steps": 25}, {"eval_max_steps": 25}, {"max_episode_steps": 25, "eval_max_steps": 40}])
def test_a_game_that_a_limit_ends_is_cut_whoever_keeps_the_limit(tiny_config, limits):
    config, spec = tiny_config(env="Pong-v5", start_transitions=90, ring_positions=100, **limits), describe("Pong-v5")
    result = evaluate_network(network_for(config, spec), config, spec, 0, 0)
    assert (result["lengths"], result["cut"], result["human_normalised"]) == ([25, 25], [True, True], None)


def test_an_evaluation_keeps_to_the_sticky_actions_of_the_config(tiny_config):
    config = tiny_config(env="Breakout-v5", start_transitions=90, ring_positions=100, eval_max_steps=30)
    spec = describe("Breakout-v5")
    network = network_for(config, spec)
    with torch.no_grad():
        network.policy_head.last.bias.copy_(torch.eye(4)[2] * 20)  # one action after the no-ops: only a no-op repeated delays it
    snapshot = make_snapshot(network.spec, CPU)
    fold(network, snapshot)
    plain, sticky, again = (play(snapshot, dataclasses.replace(config, sticky_actions=p), spec, 8, 0) for p in (0.0, 0.25, 0.25))
    assert sticky == again
    assert {game.course for game in sticky} - {game.course for game in plain}


def test_acting_sees_the_frames_that_the_replay_ring_would_stack():
    spec = describe("Breakout-v5")
    emulators = Emulators(spec, 2, 5, training=True)
    emulators.reset()
    stack, steps = 4, 40
    shape = (2, stack)
    memory = Frames(torch.zeros(*shape, *spec.frame_shape, dtype=torch.uint8), torch.zeros(shape, dtype=torch.bool))
    long = Frames(torch.zeros(2, steps, *spec.frame_shape, dtype=torch.uint8), torch.zeros(2, steps, dtype=torch.bool))
    random = torch.Generator().manual_seed(0)
    resets = 0
    for _ in range(steps):
        mine = observations(memory.frames, memory.first, memory.push(emulators), stack)
        theirs = observations(long.frames, long.first, long.push(emulators), stack)
        assert torch.equal(mine, theirs)
        assert mine.shape == (2, 12, 96, 96)
        resets += int(emulators.first.sum())
        emulators.actions.copy_(torch.randint(4, (2,), generator=random))
        emulators.send()
        emulators.recv()
    assert resets > 2


def test_the_evaluation_does_not_replay_the_games_of_training(tiny_config):
    config = tiny_config()
    spec = describe("Catch-v0")
    result = evaluate_network(network_for(config, spec), config, spec, 0, 0)
    assert result["seed"] != config.seed
    assert evaluate_network(network_for(config, spec), dataclasses.replace(config, seed=1), spec, 0, 0)["seed"] != result["seed"]


def test_only_the_first_game_of_a_lane_counts(tiny_config, monkeypatch):
    config, spec = tiny_config(env="CartPole-v1"), describe("CartPole-v1")
    seen, drain = [], Emulators.drain_finished

    def watch(self):
        games = drain(self)
        seen.extend(zip(self.game_over.nonzero().flatten().tolist(), games, strict=True))
        return games

    monkeypatch.setattr(Emulators, "drain_finished", watch)
    random = torch.Generator().manual_seed(0)  # an untrained network's games end almost together; random ones do not
    monkeypatch.setattr(evaluate, "choose_best", lambda c, r: torch.randint(2, (5,), generator=random))
    network = network_for(config, spec)
    snapshot = make_snapshot(network.spec, CPU)
    fold(network, snapshot)
    games = evaluate.play(snapshot, config, spec, 5, 11)
    assert all(game.score == game.length for game in games), "CartPole pays 1 a step"
    first = {}
    for lane, game in seen:
        first.setdefault(lane, game)
    assert [game[:2] for game in games] == [first[lane] for lane in range(5)]
    assert len(seen) > 5, "some lane began a second game while another played its first"
    assert any(game != first[lane] for lane, game in seen), "a later game differs"


def test_evaluation_restores_weights_and_running_statistics(tiny_config):
    config, spec = tiny_config(), describe("Catch-v0")
    train(config, spec, CPU)
    path = checkpoint.latest(config.run_dir / "checkpoints")
    tensors, _ = checkpoint.load(path)
    network = make_network(network_spec(config, spec.frame_shape, spec.num_actions), 5, CPU)
    trained.load_weights(network, tensors, path)
    resumed = Trainer(config, spec, CPU)
    resume.restore(resumed, path)
    for name, mine in network.state_dict().items():
        assert torch.equal(mine, resumed.state.learner.network.state_dict()[name]), name
    assert network.state_dict()["prefix_norm.norm.running_mean"].any()


def test_the_network_that_is_evaluated_is_the_one_that_plays(tiny_config, monkeypatch):
    config, spec = tiny_config(), describe("Catch-v0")
    network = network_for(config, spec)
    played, send = [], Emulators.send
    monkeypatch.setattr(Emulators, "send", lambda self: played.append(self.actions.clone()) or send(self))
    for favourite in (2, 0):
        played.clear()
        with torch.no_grad():
            network.policy_head.last.bias.copy_(torch.eye(3)[favourite] * 20)
        evaluate_network(network, config, spec, 0, 0)
        assert torch.cat(played).unique().tolist() == [favourite]


@pytest.mark.parametrize("search", ["puct", "gumbel"])
def test_the_search_of_a_step_can_be_captured_and_is_the_same_function_on_the_same_tensors(tiny_config, monkeypatch, search):
    config, spec = tiny_config(search=search), describe("Catch-v0")
    network = network_for(config, spec)
    plain = evaluate_network(network, config, spec, 0, 0)
    first = {}

    def replay(key, function):
        with CaptureSafety() as watched:
            first.setdefault(key, function)()
        assert watched.operations > 100

    monkeypatch.setattr(evaluate, "_runner", lambda config, device: replay)
    assert evaluate_network(network, config, spec, 0, 0) == plain
    assert len(first) == 1


def random_cartpole(monkeypatch, lanes):
    """Let games of CartPole be played at random, from the same draws in every call: an untrained network's end almost together."""
    random = torch.Generator()
    monkeypatch.setattr(evaluate, "choose_best", lambda c, r: torch.randint(2, (lanes,), generator=random))
    return lambda: random.manual_seed(0)


def test_the_games_that_are_over_outlive_an_interruption(tiny_config, monkeypatch):
    lanes = 5
    config, spec = tiny_config(env="CartPole-v1", eval_episodes=lanes), describe("CartPole-v1")
    network, again = network_for(config, spec), random_cartpole(monkeypatch, lanes)
    again()
    whole = evaluate_network(network, config, spec, 0, 0)
    limit = sorted(whole["lengths"])[2]

    def stop_after(steps):
        again()
        left = iter(range(steps))

        def check():
            if next(left, None) is None:
                raise Interrupted

        return check

    kept = [length for length in whole["lengths"] if length <= limit]
    assert 0 < len(kept) < lanes
    result = evaluate_network(network, config, spec, 0, 0, between_steps=stop_after(limit))
    assert (result["lengths"], result["episodes"], result["asked"], result["cut"]) == (kept, len(kept), lanes, [False] * len(kept))
    assert f"over {len(kept)} of {lanes} episodes" in describe_result(result | {"checkpoint": "checkpoint_7.safetensors"})
    with pytest.raises(Interrupted):
        evaluate_network(network, config, spec, 0, 0, between_steps=stop_after(min(whole["lengths"]) - 1))


def test_a_run_that_is_stopped_while_it_plays_keeps_the_games_and_plays_them_all_when_resumed(tiny_config, monkeypatch):
    lanes = 5
    config, spec = tiny_config(env="CartPole-v1", eval_episodes=lanes), describe("CartPole-v1")
    again = random_cartpole(monkeypatch, lanes)
    over, drain = [], Emulators.drain_finished

    def drained(self):
        games = drain(self)
        if not self.training and games and not over:
            over.extend(games)
            os.kill(os.getpid(), signal.SIGTERM)
        return games

    again()
    with monkeypatch.context() as patch:
        patch.setattr(Emulators, "drain_finished", drained)
        assert train(config, spec, CPU) == signal.SIGTERM
    assert not (config.run_dir / "eval.json").exists()
    assert not (config.run_dir / "summary.json").exists()
    (path,) = (config.run_dir / "evaluations" / "interrupted").iterdir()
    partial = json.loads(path.read_text())
    assert partial["scores"] == [score for score, _ in over]
    assert (partial["asked"], partial["human_normalised"]) == (lanes, None)
    assert f"{len(over)}of{lanes}games" in path.name
    again()
    assert train(dataclasses.replace(config, resume=True), spec, CPU) is None
    whole = json.loads((config.run_dir / "eval.json").read_text())
    assert whole["episodes"] == lanes
    assert "asked" not in whole
    assert [game for game in whole["scores"] if game in partial["scores"]] == partial["scores"]
