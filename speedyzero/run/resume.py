"""What a checkpoint of a run holds besides a state's tensors, and the refusal of what no run can have saved.

Checksums tell damage, not intent: a file may be whole and still claim an action that there is not, which would crash the emulators.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speedyzero.config import short_repr
from speedyzero.envs import EnvSpec
from speedyzero.run.checkpoint import CheckpointError, DamagedError, differing

COUNTS = ("iterations", "updates", "slots", "swept", "episodes")
"""The counts of a trainer that its checkpoints hold in their meta, under their names."""
MOST_GAMES = 1000
"""More than any run keeps of its last games."""
_LOGGED = (torch.uint8, torch.int16, torch.int32, torch.int64, torch.float64)
"""Dtypes of what the emulators save."""
_WORDS = 624
"""Of the Mersenne Twister's state in PyTorch, from byte 24 on. Before it: its seed, `left` (int32), `seeded` (int32), `next` (int64)."""


def check_contents(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], wanted: Mapping[str, Tensor], spec: EnvSpec) -> None:
    """Refuse a checkpoint that cannot be one of the run that wants to go on from it.

    wanted: the tensors to be filled by name, those of the ring [L, T, ...] with all their slots; also `generator`.

    Raises:
        CheckpointError: of another environment, network or ring.
        DamagedError: of this one, but impossible.
    """
    if meta.get("env") != spec.env_id:
        raise CheckpointError(
            f"{path}: is a checkpoint of {short_repr(meta.get('env'))}, not of --env {spec.env_id}; resume its own run or start anew with "
            "another --run-dir"
        )
    for name in (*COUNTS, "env_steps"):
        if not is_count(meta.get(name)):
            raise _impossible(path, f"{name} is {short_repr(meta.get(name))}")
    slots, best = meta["slots"], meta.get("best", "missing")
    if odd := differing({name: filled(name, tensor, slots) for name, tensor in wanted.items()}, tensors):
        raise CheckpointError(
            f"{path}: holds another network or ring than this run's config.json ({odd} differs); resume with the run's own settings"
        )
    if type(meta.get("turn_owed")) is not bool:
        raise _impossible(path, f"turn_owed is {short_repr(meta.get('turn_owed'))}")
    if best is not None and (type(best) is not float or not math.isfinite(best)):
        raise _impossible(path, f"best is {short_repr(best)}")
    _check_emulators(path, tensors, meta.get("emulators"))
    log = tensors.get("emulators.log")
    if log is None or log.dim() != 2 or log.shape[0] + meta["turn_owed"] != slots:
        raise _impossible(path, "the emulators took as many steps as there are slots")
    for name in ("recent", "emulators.finished"):
        if not _are_games(tensors.get(name)):
            raise _impossible(path, f"the games in {name}")
    if not _can_draw(tensors["generator"], wanted["updates"].device):
        raise _impossible(path, "the generator's state")
    for name, count in (("ring.head", slots), ("updates", meta["updates"])):
        if tensors[name] != count:
            raise _impossible(path, f"{name} is {int(tensors[name])}, not {count}")
    action, cursor = tensors["ring.action"], tensors["ring.cursor"]
    if not ((action >= 0) & (action < spec.num_actions)).all() or not 0 <= cursor <= slots * action.shape[0]:
        raise _impossible(path, "ring.action or ring.cursor")


def is_count(value: object) -> bool:
    """Whether a value can be how often something was done."""
    return type(value) is int and 0 <= value < 2**48


def _check_emulators(path: Path, tensors: Mapping[str, Tensor], fields: object) -> None:
    """Refuse what the emulators cannot have saved of themselves: `Emulators.restore` compares the rest. Raises DamagedError."""
    if not isinstance(fields, dict):
        raise _impossible(path, f"emulators is {short_repr(fields)}")
    for name, value in fields.items():
        plain = type(value) is int or (isinstance(value, str) and short_repr(value) is value)
        if not plain or f"emulators.{name}" in tensors:
            raise _impossible(path, f"emulators: {short_repr(name)} is {short_repr(value)}")
    for name, tensor in tensors.items():
        if name.startswith("emulators.") and tensor.dtype not in _LOGGED:
            raise _impossible(path, f"{short_repr(name)} is of {tensor.dtype}")


def _are_games(games: Tensor | None) -> bool:
    """Whether a tensor holds (return, length) of games, [games, 2] float64."""
    if games is None or games.dtype != torch.float64 or games.dim() != 2 or games.shape[1] != 2 or games.shape[0] > MOST_GAMES:
        return False
    lengths = games[:, 1]
    return bool((games.abs() < 1e30).all() and ((lengths >= 0) & (lengths < 2**48) & (lengths == lengths.round())).all())


def _can_draw(state: Tensor, device: torch.device) -> bool:
    """Whether a generator can go on from a state of the right size. What PyTorch does not check is a read beyond the state's end."""
    try:
        torch.Generator(device).set_state(state.clone())
    except RuntimeError:
        return False
    if device.type != "cpu":
        return True
    left, following = int(state[8:12].clone().view(torch.int32)), int(state[16:24].clone().view(torch.int64))
    return (left, following) == (1, 0) or left + following == _WORDS + 1


def filled(name: str, tensor: Tensor, slots: int) -> Tensor:
    """The part of a tensor of the state that is saved: of the ring's [L, T, ...] the slots written so far; a view."""
    return tensor[:, :slots] if name.startswith("ring.") and tensor.dim() > 1 else tensor


def _impossible(path: Path, what: str) -> DamagedError:
    return DamagedError(f"{path}: no run can have saved this ({what}); resume from another checkpoint or start anew with another --run-dir")
