"""What a checkpoint of a run holds besides a state's tensors, and the refusal of what no run can have saved.

Checksums tell damage, not intent: a file may be whole and still claim an action that there is not, which would crash the emulators.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speedyzero.checkpoint import CheckpointError, DamagedError, differing
from speedyzero.envs import EnvSpec

COUNTS = ("iterations", "updates", "slots", "swept", "episodes")
"""The counts of a trainer that its checkpoints hold in their meta, under their names."""


def check_contents(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], wanted: Mapping[str, Tensor], spec: EnvSpec) -> None:
    """Refuse a checkpoint that cannot be one of the run that wants to go on from it.

    wanted: the tensors to be filled by name, those of the ring [L, T, ...] with all their slots; also `generator`.

    Raises:
        CheckpointError: of another environment, network or ring.
        DamagedError: of this one, but impossible.
    """
    if meta.get("env") != spec.env_id:
        raise CheckpointError(
            f"{path}: is a checkpoint of {meta.get('env')}, not of --env {spec.env_id}; resume its own run or start anew with "
            "another --run-dir"
        )
    for name in COUNTS:
        if type(meta.get(name)) is not int or not 0 <= meta[name] < 2**48:
            raise _impossible(path, f"{name} is {str(meta.get(name))[:40]}")
    slots, best = meta["slots"], meta.get("best")
    if odd := differing({name: filled(name, tensor, slots) for name, tensor in wanted.items()}, tensors):
        raise CheckpointError(
            f"{path}: holds another network or ring than this run's config.json ({odd} differs); resume with the run's own settings"
        )
    if type(meta.get("turn_owed")) is not bool or not isinstance(meta.get("emulators"), dict):
        raise _impossible(path, "turn_owed or emulators")
    if best is not None and type(best) not in (int, float):
        raise _impossible(path, f"best is {str(best)[:40]}")
    log, recent = tensors.get("emulators.log"), tensors.get("recent")
    if log is None or log.dim() != 2 or log.shape[0] + meta["turn_owed"] != slots:
        raise _impossible(path, "the emulators took as many steps as there are slots")
    if recent is None or recent.dtype != torch.float64 or recent.dim() != 2 or recent.shape[1] != 2 or not recent.isfinite().all():
        raise _impossible(path, "the last games")
    for name, count in (("ring.head", slots), ("updates", meta["updates"])):
        if tensors[name] != count:
            raise _impossible(path, f"{name} is {int(tensors[name])}, not {count}")
    action, cursor = tensors["ring.action"], tensors["ring.cursor"]
    if not ((action >= 0) & (action < spec.num_actions)).all() or not 0 <= cursor <= slots * action.shape[0]:
        raise _impossible(path, "ring.action or ring.cursor")


def filled(name: str, tensor: Tensor, slots: int) -> Tensor:
    """The part of a tensor of the state that is saved: of the ring's [L, T, ...] the slots written so far; a view."""
    return tensor[:, :slots] if name.startswith("ring.") and tensor.dim() > 1 else tensor


def _impossible(path: Path, what: str) -> DamagedError:
    return DamagedError(f"{path}: no run can have saved this ({what}); resume from another checkpoint or start anew with another --run-dir")
