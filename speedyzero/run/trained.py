"""What a run has learned, read from its directory: its settings, one of its checkpoints, and the network in it. Nothing is written.

No lock is taken, so that a run can be looked at while it trains.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from speedyzero.config import Config, ConfigError, check, from_json, short_repr
from speedyzero.envs import EnvSpec, describe
from speedyzero.nets import Network
from speedyzero.run import checkpoint
from speedyzero.run.checkpoint import CheckpointError, DamagedError
from speedyzero.run.saver import BEST
from speedyzero.sizes import network_spec
from speedyzero.state import make_network


class Trained(NamedTuple):
    """A checkpoint of a run, and what the run was."""

    config: Config
    spec: EnvSpec
    path: Path
    """The checkpoint's file."""
    tensors: dict[str, torch.Tensor]
    """As `checkpoint.load` gives them."""
    meta: dict[str, Any]


def read_run(run_dir: Path, which: str = "newest") -> Trained:
    """A checkpoint of a run.

    which: newest, which passes over damaged ones; best, that of the best games while training; or a file, by its path or by its name in
        the run's folder of checkpoints.

    Raises:
        ConfigError, EnvError, CheckpointError: one line each.
    """
    config = read_config(run_dir)
    path, tensors, meta = _newest(run_dir) if which == "newest" else _named(run_dir, which)
    spec = describe(config.env, frame_size=config.frame_size, gray=config.gray)
    if meta.get("env") != spec.env_id:
        raise CheckpointError(f"{path}: is a checkpoint of {short_repr(meta.get('env'))}, not of {config.env} as config.json says")
    return Trained(config, spec, path, tensors, meta)


def _newest(run_dir: Path) -> tuple[Path, dict[str, torch.Tensor], dict[str, Any]]:
    damaged = None
    for path in reversed(checkpoint.by_iteration(run_dir / "checkpoints")):
        try:
            return path, *checkpoint.load(path)
        except DamagedError as error:
            damaged = error
    raise damaged or CheckpointError(f"{run_dir}: has no checkpoint yet; let it train until the first one (--checkpoint-interval)")


def _named(run_dir: Path, which: str) -> tuple[Path, dict[str, torch.Tensor], dict[str, Any]]:
    folder = run_dir / "checkpoints"
    if which == "best":
        path = folder / BEST
        if not path.exists():
            raise CheckpointError(f"{run_dir}: has no best checkpoint yet, as that takes some games; give --checkpoint newest")
    else:
        inside = folder / which
        path = inside if inside.is_file() else Path(which)
    return path, *checkpoint.load(path)


def read_config(run_dir: Path) -> Config:
    """The settings of a run.

    Raises:
        ConfigError: there is no run in `run_dir`, or its config.json is damaged.
    """
    path = run_dir / "config.json"
    try:
        fields = json.loads(path.read_bytes())
    except NotADirectoryError:
        raise ConfigError(f"{run_dir}: is a file; give the folder of a run (python -m speedyzero.watch plays an exported agent)") from None
    except FileNotFoundError:
        raise ConfigError(f"{run_dir}: no run there (config.json is missing); give the folder of a run") from None
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be read ({why}); start a new run with another --run-dir") from None
    config = from_json(fields, path)
    try:
        check(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}; start a new run with another --run-dir") from None
    return config


def make_trained_network(run: Trained, device: torch.device) -> Network:
    """The training network of a checkpoint, with its weights and running statistics.

    Raises:
        CheckpointError: the checkpoint is of a network of other sizes than the run's config.json says.
    """
    network = make_network(network_spec(run.config, run.spec.frame_shape, run.spec.num_actions), run.config.seed, device)
    load_weights(network, run.tensors, run.path)
    return network


def load_weights(network: Network, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Put the weights of a checkpoint into a training network.

    Raises:
        CheckpointError: the checkpoint is of a network of other sizes.
    """
    if odd := checkpoint.differing({f"network.{name}": tensor for name, tensor in network.state_dict().items()}, tensors):
        raise CheckpointError(
            f"{path}: holds another network than config.json describes ({odd} differs); evaluate it with the run's own config.json"
        )
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            tensor.copy_(tensors[f"network.{name}"])


def read_scores(run_dir: Path, env_steps: Any, updates: Any) -> dict[str, Any] | None:
    """The run's `eval.json` if it is of this moment of the training; None if there is none, or it cannot be read."""
    try:
        scores = json.loads((run_dir / "eval.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    counts = {"env_steps": env_steps, "updates": updates}
    return scores if isinstance(scores, dict) and counts.items() <= scores.items() else None
