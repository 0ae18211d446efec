"""The seed makes the run: in other processes, with other settings of what the numbers do not depend on, and under --deterministic."""

import os
import subprocess
import sys

import pytest
import torch

from speedyzero.graph import deterministic_algorithms
from speedyzero.run import checkpoint

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
