"""An agent in a Gymnasium loop acts as an evaluation does, from a run or from its exported file."""

import dataclasses
import json
import subprocess
import sys

import envpool
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import speedyzero
from speedyzero import agent_file
from speedyzero.act import search_observations
from speedyzero.agent import Frames
from speedyzero.config import ConfigError
from speedyzero.emulators import Emulators
from speedyzero.export import export
from speedyzero.processor import has_fast_bf16
from speedyzero.run.checkpoint import CheckpointError
from speedyzero_kernels.gather import observations
from tests.agents import spec_of, write_run

LANES, STEPS = 3, 25  # Catch: 9 steps a game, and a step that resets


@pytest.fixture
def run(tiny_config, tmp_path):
    """A function of settings that writes a run; returns its config."""

    def make(**settings):
        (tmp_path / "run" / "checkpoints").mkdir(parents=True, exist_ok=True)
        config = tiny_config(**{"simulations": 5} | settings)
        write_run(config)
        return config

    return make


def environments(agent, config, lanes):
    """The environments that `Emulators` would play in an evaluation with seed 7."""
    seeds = Emulators(spec_of(config), lanes, 7, training=False)
    seeds = np.random.SeedSequence([seeds.seed, 0]).generate_state(lanes) >> 1
    return envpool.make_gymnasium(agent.env_id, num_envs=lanes, seed=seeds.tolist(), **agent.env_settings)


def play(agent, config, with_done=True):
    """Policies, and the network's values as a last column, [STEPS, LANES, A + 1] of an agent in a Gymnasium loop."""
    envs, said, done = environments(agent, config, LANES), [], None
    observations, _ = envs.reset()
    for _ in range(STEPS):
        search = agent.search(observations, done if with_done else None)
        said.append(np.column_stack((search.policy, search.network_value)))
        observations, _, terminated, truncated, _ = envs.step(search.action)
        done = terminated | truncated
    return np.array(said)


def reference(agent, config):
    """The same, of the trainer's own emulators and a ring that forgets nothing."""
    emulators = Emulators(spec_of(config), LANES, 7, training=False)
    shape = (LANES, STEPS)
    ring = Frames(torch.zeros(*shape, *agent.spec.frame_shape), torch.zeros(shape, dtype=torch.bool))
    emulators.reset()
    said = []
    for _ in range(STEPS):
        seen = observations(ring.frames, ring.first, ring.push(emulators), config.frame_stack, **agent.snapshot.input_format)
        result, value = search_observations(agent.snapshot, seen, config, None)
        said.append(np.column_stack((result.policy, value)))
        emulators.actions.copy_(result.visits.argmax(1))
        emulators.send()
        emulators.recv()
    return np.array(said)


def test_a_gymnasium_loop_searches_what_the_trainer_would_and_stacks_begin_again_with_each_game(run):
    config = run(frame_stack=4)
    agent = speedyzero.load(config.run_dir)
    wanted = reference(agent, config)
    assert np.array_equal(play(agent, config), wanted)
    agent.reset()
    careless = play(agent, config, with_done=False)
    assert np.array_equal(careless[:10], wanted[:10])
    assert not np.array_equal(careless[10], wanted[10]), "the frames before a game's first matter to this network"


def test_a_single_environment_gets_an_int_and_its_stack_begins_again_at_a_reset(run):
    config = run(frame_stack=4)
    agent, other = speedyzero.load(config.run_dir), speedyzero.load(config.run_dir)
    envs, done, resets = environments(agent, config, 1), np.zeros(1, bool), 0
    observations, _ = envs.reset()
    for step in range(STEPS):
        vector, single = agent.search(observations, done), other.search(observations[0])
        assert isinstance(single.action, int)
        assert single.action == vector.action[0], step
        assert np.array_equal(single.policy, vector.policy[0]), step
        assert single.network_value == vector.network_value[0], step
        if done[0]:  # the next observation is that of a reset
            other.reset()
            resets += 1
        observations, _, terminated, truncated, _ = envs.step(vector.action)
        done = terminated | truncated
    assert resets == 2


def test_lanes_that_reset_in_the_step_that_ends_a_game_are_named_by_reset(run):
    config = run(frame_stack=4)
    agent, fresh = speedyzero.load(config.run_dir), speedyzero.load(config.run_dir)
    frames = np.random.default_rng(0).random((3, 2, 10, 5), dtype=np.float32)
    for seen in frames[:2]:
        agent.act(seen)
    agent.reset(np.array([False, True]))
    mixed = agent.search(frames[2])
    begun = fresh.search(frames[2])
    assert mixed.network_value[1] == begun.network_value[1]
    assert mixed.network_value[0] != begun.network_value[0]


def test_pixels_may_have_their_channels_first_last_or_none(run):
    config = run(env="Breakout-v5", frame_size=32, gray=True, channels=8)
    agent = speedyzero.load(config.run_dir)
    frames = np.random.default_rng(0).integers(0, 256, (2, 1, 32, 32), dtype=np.uint8)
    wanted = agent.search(frames).network_value
    for shape in ((2, 32, 32, 1), (2, 32, 32)):
        agent.reset()
        assert np.array_equal(agent.search(frames.reshape(shape)).network_value, wanted)
    for wrong in (np.zeros((2, 4, 32, 32), np.uint8), np.zeros((2, 1, 32, 32), np.float32), np.zeros((3, 1, 32, 32), np.uint8)):
        with pytest.raises(ValueError, match=r"^[^\n]*observations[^\n]*$"):
            agent.act(wrong)
    with pytest.raises(ValueError, match="done: want 2 flags of type bool"):
        agent.act(frames, [0, 1])


def test_colour_frames_with_channels_last_are_turned(run):
    agent = speedyzero.load(run(env="Breakout-v5", frame_size=32, gray=False, channels=8).run_dir)
    frame = np.random.default_rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint8)
    wanted = agent.search(frame).network_value
    agent.reset()
    assert agent.search(frame.transpose(1, 2, 0)).network_value == wanted


@pytest.mark.parametrize("kind", ["puct", "gumbel"])
def test_the_tree_says_what_the_search_says(run, kind):
    agent = speedyzero.load(run(search=kind, simulations=9).run_dir)
    found = agent.search(np.random.default_rng(0).random((10, 5), dtype=np.float32))
    tree = found.tree
    assert (len(tree), tree.visits[0], tree.value[0]) == (10, 10, pytest.approx(found.value))
    assert tree.network_value[0] == pytest.approx(found.network_value, abs=1e-6)
    assert (tree.depth[1:] == tree.depth[tree.parent[1:]] + 1).all()
    for node in range(1, 10):
        assert tree.prior[node] == tree.policy[tree.parent[node], tree.action[node]]
        assert tree.visits[node] == 1 + sum(tree.visits[child] for child in tree.children(node))
    assert [tree.action[child] for child in tree.children(0)] == np.flatnonzero(found.visits).tolist()
    for child in tree.children(0):
        action = tree.action[child]
        assert found.visits[action] == tree.visits[child]
        assert found.q[action] == pytest.approx(tree.reward[child] + tree.discount * tree.value[child])
    assert np.isnan(found.q[found.visits == 0]).all()
    assert tree.action[tree.favourite(found.action)[1]] == found.action


@pytest.mark.parametrize("amp", [False, pytest.param(True, marks=pytest.mark.skipif(not has_fast_bf16(), reason="no bf16 instructions"))])
def test_an_exported_agent_searches_exactly_as_its_run(run, tmp_path, amp):
    config = run(env="Breakout-v5", frame_size=32, gray=True, channels=8, normalize_frames=True, amp=amp, search="gumbel", simulations=8)
    out = tmp_path / "agent.safetensors"
    export(config.run_dir, out)
    of_run, of_file = speedyzero.load(config.run_dir), speedyzero.load(out)
    random = np.random.default_rng(0)
    for _ in range(5):
        seen = random.integers(0, 256, (2, 1, 32, 32), dtype=np.uint8)
        one, other = of_run.search(seen), of_file.search(seen)
        assert np.array_equal(one.policy, other.policy)
        assert np.array_equal(one.network_value, other.network_value)
    assert (of_file.env_settings, of_file.env_steps, of_file.updates) == (of_run.env_settings, 10, 1)
    assert str(tmp_path).encode() not in out.read_bytes(), "a file for others names no folder of this machine"


def test_a_checkpoint_is_chosen_by_name_and_the_newest_that_is_not_damaged_is_the_default(run):
    config = run()
    first, second = config.run_dir / "checkpoints" / "checkpoint_000000001.safetensors", write_run(config, 2)
    damaged = second.with_name("checkpoint_000000003.safetensors")
    damaged.write_bytes(second.read_bytes()[:-1])
    assert (speedyzero.load(config.run_dir).path, speedyzero.load(config.run_dir).updates) == (second, 2)
    assert speedyzero.load(config.run_dir, checkpoint=first.name).path == first
    assert speedyzero.load(config.run_dir, checkpoint=str(first)).updates == 1
    with pytest.raises(CheckpointError, match="has no best checkpoint yet"):
        speedyzero.load(config.run_dir, checkpoint="best")


def test_what_is_no_agent_is_refused_in_one_line(run, tmp_path):
    config = run()
    good = tmp_path / "good.safetensors"
    export(config.run_dir, good)
    whole = good.read_bytes()
    other = agent_file.read(good)
    cases = {
        "missing": None, "text": b"no agent", "cut": whole[:-1], "a bit": whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:],
        "license": whole.replace(b"apache-2.0", b"apache-9.0"), "checkpoint": write_run(config, 2).read_bytes(),
    }  # fmt: skip
    for name, content in cases.items():
        path = tmp_path / f"{name}.safetensors"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            speedyzero.load(path)
        assert str(caught.value).startswith(str(path)), name
        assert "\n" not in str(caught.value)
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match="is no agent of speedyzero"):
        speedyzero.load(tmp_path / "foreign.safetensors")
    agent_file.write(tmp_path / "other.safetensors", other._replace(config=dataclasses.replace(other.config, lstm=16)))
    with pytest.raises(CheckpointError, match=r"prefix_lstm.*is not as its settings say"):
        speedyzero.load(tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="no run there"):
        speedyzero.load(tmp_path / "nothing")


def test_a_setting_that_came_after_a_file_was_written_has_its_default(run, tmp_path):
    path = tmp_path / "agent.safetensors"
    export(run().run_dir, path)
    with safe_open(path, "pt") as file:
        texts, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    config = json.loads(texts["config"])
    del config["c_init"]
    texts["config"] = json.dumps(config | {"no_longer_there": 1})
    texts["sha256"] = agent_file._digest(texts, tensors)
    save_file(tensors, path, texts)
    assert speedyzero.load(path).config.c_init == 1.25


def test_the_package_imports_without_pytorch():
    code = "import sys, speedyzero; assert speedyzero.__version__; assert 'torch' not in sys.modules; speedyzero.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "AttributeError: module 'speedyzero' has no attribute 'nothing'"
