"""An exported agent: one safetensors file with the folded network, the settings that acting needs, and the scores.

Its metadata, which holds texts only, so that loading runs no code:

    format    "speedyzero-agent/1"; another version is refused
    version   of the speedyzero that wrote it
    license   of the weights
    config    JSON of the run's settings, without its folder. A reader takes what it knows: a setting that came later has its default
    env       JSON of the environment's shapes
    training  JSON: env_steps, updates and the checkpoint's name
    scores    JSON of the evaluation, or null
    sha256    over the others and over the tensors: their names, dtypes, shapes and bytes
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from speedyzero.config import Config, ConfigError, check, fits, from_json, short_repr
from speedyzero.envs import EnvSpec
from speedyzero.layers import WithoutMemory
from speedyzero.run.checkpoint import CheckpointError, differing
from speedyzero.run.files import replacing_path
from speedyzero.sizes import network_spec
from speedyzero.snapshot import make_snapshot

FORMAT = "speedyzero-agent/1"
TEXTS = ("format", "version", "license", "config", "env", "training", "scores")


class AgentFile(NamedTuple):
    """What a file holds."""

    tensors: dict[str, torch.Tensor]
    """Of the folded network, on the CPU."""
    config: Config
    spec: EnvSpec
    env_steps: int
    updates: int
    checkpoint: str
    """Name of the checkpoint it was made from."""
    scores: dict[str, Any] | None
    version: str
    license: str


def write(path: Path, agent: AgentFile) -> None:
    """Replace `path` by a file of `agent`. Raises OSError."""
    config = agent.config.to_json() | {"run_dir": None, "resume": False}
    training = {"env_steps": agent.env_steps, "updates": agent.updates, "checkpoint": agent.checkpoint}
    parts = {"config": config, "env": dataclasses.asdict(agent.spec), "training": training, "scores": agent.scores}
    texts = {"format": FORMAT, "version": agent.version, "license": agent.license}
    texts |= {name: json.dumps(part, sort_keys=True) for name, part in parts.items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in agent.tensors.items()}
    with replacing_path(path) as aside:
        mode = aside.stat().st_mode
        save_file(tensors, aside, texts | {"sha256": _digest(texts, tensors)})
        aside.chmod(mode)


def read(path: Path) -> AgentFile:
    """What `path` holds, every byte of it compared with its checksum, and the network with its settings.

    Raises:
        CheckpointError: it is not there, damaged, or something else.
    """
    try:
        open(path, "rb").close()
        with safe_open(path, "pt") as file:
            texts = file.metadata() or {}
            _check_kind(path, texts)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        if texts.get("sha256") != _digest(texts, tensors):
            raise ValueError("its checksum differs")
        config, spec, training, scores = (json.loads(texts[name]) for name in ("config", "env", "training", "scores"))
        config, spec = _config(path, config), _spec(spec)
        with WithoutMemory():
            sizes = network_spec(config, spec.frame_shape, spec.num_actions)
            wanted = make_snapshot(sizes, torch.device("meta"), config.amp).state_dict()
        if odd := differing(wanted, tensors):
            raise ValueError(f"{odd} is not as its settings say")
        if not all(fits(training[name], int) for name in ("env_steps", "updates")) or not fits(scores, dict | None):
            raise ValueError("its counts or its scores are none")
        counts = training["env_steps"], training["updates"], str(training["checkpoint"])
        return AgentFile(tensors, config, spec, *counts, scores, texts["version"], texts["license"])
    except CheckpointError:
        raise
    except FileNotFoundError:
        why = "does not exist; give a run's folder, or a file of python -m speedyzero.export"
    except OSError as error:
        why = f"cannot be read ({error.strerror or error})"
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError, RecursionError) as error:
        why = f"is damaged or no exported agent ({ascii(str(error))[1:-1][:120]}); write it again with python -m speedyzero.export"
    raise CheckpointError(f"{path} {why}")


def _check_kind(path: Path, texts: Mapping[str, str]) -> None:
    kind = texts.get("format", "")
    if "sums" in texts:
        raise CheckpointError(f"{path} is a checkpoint, not an exported agent; give the run's folder, and --checkpoint {path.name}")
    if not kind.startswith("speedyzero-agent/"):
        raise CheckpointError(f"{path} is no agent of speedyzero; write one with python -m speedyzero.export")
    if kind != FORMAT:
        raise CheckpointError(f"{path} has format {short_repr(kind)}, and this speedyzero reads {FORMAT}; export the run again, or upgrade")


def _config(path: Path, stored: Any) -> Config:
    """The settings that this version knows of those stored, the others at their defaults. Raises ConfigError, TypeError."""
    known = {field.name for field in dataclasses.fields(Config)}
    fields = Config().to_json() | {name: value for name, value in dict(stored).items() if name in known}
    config = dataclasses.replace(from_json(fields, path), run_dir=path.parent)
    check(config)
    return config


def _spec(stored: Any) -> EnvSpec:
    """The environment's shapes. Raises ConfigError, TypeError."""
    for name, expected in get_type_hints(EnvSpec).items():
        if not fits(stored[name], expected):
            raise ConfigError(f"env.{name} is {short_repr(stored[name])}")
    spec = EnvSpec(**{**stored, "frame_shape": tuple(stored["frame_shape"])})
    if min(*spec.frame_shape, spec.num_actions) < 1:
        raise ConfigError(f"env: {spec.num_actions} actions, frames of {list(spec.frame_shape)}")
    return spec


def _digest(texts: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of contiguous tensors on the CPU and the texts."""
    digest = hashlib.sha256(json.dumps([texts.get(name) for name in TEXTS]).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()
