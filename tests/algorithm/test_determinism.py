"""The seed makes the run: in other processes, with other settings of what the numbers do not depend on, and under --deterministic."""

import os
import subprocess
import sys

import pytest
import torch

from speedyzero.envs import describe
from speedyzero.graph import deterministic_algorithms
from speedyzero.loop import Trainer
from speedyzero.run import checkpoint
from tests.runs import resumed, save

CPU = torch.device("cpu")
# 25 iterations of random play, 4 sweeps, 175 of training and 10 of learning.
LONG = ["--env", "Catch-v0", "--preset", "smoke", "--device", "cpu", "--env-steps", "1600", "--eval-episodes", "1", "--eval-max-steps", "1"]


def end_of(run_dir, *flags: str) -> dict[str, torch.Tensor]:
    """What a run in a process of its own ends with."""
    environment = {**os.environ, "PYTHONHASHSEED": str(len(flags))}
    command = [sys.executable, "-m", "speedyzero", *LONG, "--run-dir", str(run_dir), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tensors, meta = checkpoint.load(checkpoint.latest(run_dir / "checkpoints"))
    assert meta["iterations"] >= 200
    return tensors


@pytest.mark.slow
def test_two_processes_come_to_the_same_parameters_after_200_iterations(tmp_path):
    one = end_of(tmp_path / "one")
    other = end_of(
        tmp_path / "other", "--deterministic", "--env-threads", "1", "--checkpoint-interval", "13", "--log-interval", "7", "--keep", "1",
        "--no-checkpoint-ring",
    )  # fmt: skip
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        if not name.startswith("averages."):  # the logs' means since the last row
            assert torch.equal(other[name], tensor), name


def test_deterministic_algorithms_are_on_within_and_as_before_after(monkeypatch):
    def now():
        return torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = now()
    with deterministic_algorithms(False):
        assert now() == before
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    with deterministic_algorithms(True):
        assert now() == (True, False)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert now() == before


def test_a_run_with_sticky_actions_goes_on_bit_for_bit_its_frames_made_again_by_replay(tiny_config, tmp_path):
    sizes = {"frame_size": 32, "gray": True, "start_transitions": 90, "ring_positions": 100, "env_steps": 120}
    config = tiny_config(env="Breakout-v5", sticky_actions=0.25, **sizes)
    there = Trainer(config, describe(config.env, frame_size=32, gray=True), CPU)
    there.start()
    assert there.state.emulators.sticky_actions == 0.25
    while there.updates < 4:
        there.step(there.phase())
    here = resumed(config, save(there, tmp_path, ring=False), ring=False)
    for trainer in (there, here):
        while trainer.updates < 10:
            trainer.step(trainer.phase())
    for name, tensor in there.state.tensors().items():
        assert torch.equal(here.state.tensors()[name], tensor), name
    assert there.recent == here.recent
