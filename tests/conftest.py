"""Shared by all tests: one thread a process, so that two test runs on two cores do not fight, and small configs."""

import dataclasses
import json
import os

import pytest
import torch

# Triton reads it when it is first imported: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import HealthCheck, settings

from speedyzero.config import Config, preset_config, resolve
from speedyzero.envs import describe
from speedyzero.run.files import write_json
from speedyzero.run.record import read

torch.set_num_threads(1)
# The same examples on every machine, and no clock among what is tested.
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("repeatable")

TINY = {
    "env_steps": 160, "lanes": 4, "start_transitions": 80, "ring_positions": 96, "refresh_roots": 16, "simulations": 3,
    "updates_per_iteration": 2, "final_updates": 6, "batch_size": 4, "channels": 4, "stem_channels": 4, "head_channels": 2,
    "head_hidden": 8, "lstm": 8, "support": 5, "projection": 8, "unroll": 3, "n_step": 3, "snapshot_interval": 5, "log_interval": 5,
    "checkpoint_interval": 1000, "eval_episodes": 2, "eval_max_steps": None,
}  # fmt: skip


@pytest.fixture
def tiny_config(tmp_path):
    """A function of overrides that gives a resolved config of a run that takes about a second."""

    def make(**overrides) -> Config:
        env = overrides.pop("env", "Catch-v0")
        spec = describe(env, frame_size=overrides.get("frame_size"), gray=overrides.get("gray"))
        run_dir = overrides.pop("run_dir", tmp_path / "run")
        config = dataclasses.replace(preset_config("cpu"), env=env, run_dir=run_dir, **({"device": "cpu"} | TINY | overrides))
        return resolve(config, image=spec.image, atari=spec.family == "atari")

    return make


@pytest.fixture
def recorded(tmp_path):
    """A function that writes the files of a finished run, as far as reports read them, and reads them back."""

    def make(env: str, seed: int, folder: str = "run", lr: float = 0.2, skipped: int = 0, **evaluation):
        made = tmp_path / f"{folder}_{env}_{seed}"
        made.mkdir()
        spec = describe(env)
        config = resolve(
            dataclasses.replace(preset_config("cpu"), env=env, seed=seed, device="cpu", lr=lr, run_dir=made),
            image=spec.image, atari=spec.family == "atari",
        )  # fmt: skip
        write_json(made / "config.json", config.to_json())
        counts = {"env_steps": 300, "updates": 30, "wall_s": 30.0}
        rows = [
            {"iteration": n, "env_steps": 10 * n, "updates": n, "wall_s": float(n), "charts/episodic_return": seed + n / 30,
             "losses/value_loss": 1 / n, "train/skipped_updates": skipped} for n in range(1, 31)
        ]  # fmt: skip
        (made / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        played = {
            "env": env, "episodes": 4, "mean": 0.0, "median": 0.0, "std": 1.0, "cut": [False] * 4, "human_normalised": None,
            "distinct_games": 4, "checkpoint": "checkpoint_000000030.safetensors", "sticky_actions": 0.0,
        }  # fmt: skip
        write_json(made / "eval.json", played | counts | evaluation)
        write_json(made / "summary.json", counts)
        return read(made)

    return make


def pytest_collection_modifyitems(items):
    """GPU tests are collected everywhere and skipped, with a reason, where there is no GPU."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
