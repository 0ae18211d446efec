"""Runs to load agents from, made in no time: random weights in a checkpoint."""

from pathlib import Path

import torch

from speedyzero.config import Config
from speedyzero.envs import EnvSpec, describe
from speedyzero.run import checkpoint
from speedyzero.run.files import write_json
from speedyzero.sizes import network_spec
from speedyzero.state import make_network


def spec_of(config: Config) -> EnvSpec:
    return describe(config.env, frame_size=config.frame_size, gray=config.gray)


def write_run(config: Config, iteration: int = 1) -> Path:
    """A run whose checkpoint after `iteration` iterations has weights of its own, all of them at random; returns the checkpoint's path."""
    spec = spec_of(config)
    network = make_network(network_spec(config, spec.frame_shape, spec.num_actions), 0, torch.device("cpu"))
    random = torch.Generator().manual_seed(iteration)
    for name, tensor in network.state_dict().items():
        if name.endswith(("running_var", "pixels.scale")):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=random))
        elif tensor.is_floating_point():
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=random))
    write_json(config.run_dir / "config.json", config.to_json())
    path = checkpoint.path_of(config.run_dir / "checkpoints", iteration)
    tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    checkpoint.save(path, tensors, {"env": spec.env_id, "env_steps": 10 * iteration, "updates": iteration})
    return path
