"""Resume: what a checkpoint of a run holds, taken from a trainer, and a trainer brought back to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from speedyzero.config import short_repr
from speedyzero.envs import EnvError, EnvSpec
from speedyzero.run import checkpoint
from speedyzero.run.checkpoint import CheckpointError, DamagedError, differing
from speedyzero.run.frames import FrameStore
from speedyzero.run.saver import filled

if TYPE_CHECKING:
    from speedyzero.loop import Trainer

COUNTS = ("iterations", "updates", "slots", "swept", "episodes")
"""The counts of a trainer that its checkpoints hold in their meta, under their names."""
LONG_REPLAY = 20_000
"""Transitions from which on a replay takes long enough to say so."""
_WORDS = 624
"""Of the Mersenne Twister's state in PyTorch, from byte 24 on. Before it: its seed, `left` (int32), `seeded` (int32), `next` (int64)."""


def contents(trainer: Trainer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, where they live, and meta of a checkpoint of this moment."""
    tensors = trainer.state.tensors()
    tensors["generator"] = trainer.state.generator.get_state()
    tensors["recent"] = torch.tensor(list(trainer.recent), dtype=torch.float64).view(-1, 2)
    emulators: dict[str, Any] = {}
    for name, value in trainer.state.emulators.state_dict().items():
        if isinstance(value, np.ndarray):
            tensors[f"emulators.{name}"] = torch.from_numpy(value)
        else:
            emulators[name] = value
    counts = {name: getattr(trainer, name) for name in COUNTS}
    return tensors, {
        **counts, "env_steps": trainer.env_steps, "turn_owed": trainer.turn_owed, "best": trainer.best, "env": trainer.spec.env_id,
        "config": trainer.config.to_json(), "torch": torch.__version__, "emulators": emulators,
    }  # fmt: skip


def restore(
    trainer: Trainer,
    path: Path,
    store: FrameStore | None = None,
    log: Callable[[str], None] = print,
    check_stop: Callable[[], None] = lambda: None,
) -> None:
    """Bring a new trainer to a checkpoint. The emulators replay their actions; the frames of the ring come from `store`, or else from
    that replay.

    log: gets a line about what is worth knowing. check_stop: called at each step of the replay; what it raises ends this, and the
        files are unchanged.

    Raises:
        CheckpointError: damaged, or of another environment or network.
        EnvError: the replay did not lead to the saved frames.
    """
    tensors, meta = checkpoint.load(path)
    state = trainer.state.tensors()
    frames, slots = state.pop("ring.frames"), meta.get("slots")
    _check(path, tensors, meta, state | {"generator": trainer.state.generator.get_state()}, trainer.spec)
    with torch.no_grad():
        for name, tensor in state.items():
            filled(name, tensor, slots).copy_(tensors[name])
    # PyTorch reads the generator's state as a struct: a view of the file may lie at an odd address, and that is a crash.
    trainer.state.generator.set_state(tensors["generator"].clone())
    trainer.recent.extend((score, int(length)) for score, length in tensors["recent"].tolist())
    for name in COUNTS:
        setattr(trainer, name, meta[name])
    trainer.best = meta["best"]
    arrays = {name.removeprefix("emulators."): tensor.numpy() for name, tensor in tensors.items() if name.startswith("emulators.")}
    replay = _Replay(trainer, frames, store, log, check_stop)
    trainer.state.emulators.restore(arrays | meta["emulators"], replay.seen)
    if meta["turn_owed"]:
        _take_owed_turn(trainer)


def _is_count(value: object) -> bool:
    """Whether a value of a meta can be how often something was done."""
    return type(value) is int and 0 <= value < 2**48


class _Replay:
    """Fills the ring's frames while the emulators replay, or compares them with those that the store had."""

    def __init__(
        self, trainer: Trainer, frames: Tensor, store: FrameStore | None, log: Callable[[str], None], check_stop: Callable[[], None]
    ):
        self._trainer, self._frames, self._store, self._log, self._check_stop = trainer, frames, store, log, check_stop
        self._stored = store is not None
        """Whether the frames came from the store, and none differed so far."""
        if self._stored:
            try:
                store.read(frames, trainer.slots)
            except CheckpointError as error:
                self._distrust_store(str(error).partition(";")[0])

    def seen(self, step: int, steps: int) -> None:
        """Take in the emulators' frames after `step` of `steps`."""
        self._check_stop()
        lanes, lap, slots = self._trainer.config.lanes, self._trainer.config.slots, self._trainer.slots
        if step == 0 and steps * lanes >= LONG_REPLAY:
            self._log(f"replaying {steps} steps of {lanes} emulators")
        if slots - lap <= step < slots:
            frame, theirs = self._frames[:, step % lap], self._trainer.state.emulators.frames
            if self._stored and not torch.equal(frame.cpu(), theirs):
                self._distrust_store(f"{self._store.directory} holds frames of another run")
            if not self._stored:
                frame.copy_(theirs)

    def _distrust_store(self, why: str) -> None:
        self._stored = False
        self._store.complete.clear()
        self._log(f"{why}; the frames come from replaying the emulators")


def _take_owed_turn(trainer: Trainer) -> None:
    """Let the emulators take the step that failed when the run was saved: its actions are in the ring."""
    emulators = trainer.state.emulators
    emulators.actions.copy_(trainer.state.ring.action.view(-1)[trainer.state.ring.newest()])
    try:
        emulators.send()
        emulators.recv()
    except Exception as error:
        raise EnvError(f"{error}; the step that failed before failed again, and can be tried once more with --resume") from error
    games = emulators.drain_finished()
    trainer.episodes += len(games)
    trainer.recent.extend(games)


def _check(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], wanted: Mapping[str, Tensor], spec: EnvSpec) -> None:
    """Refuse a checkpoint of another run, and values that would crash the emulators or index out of bounds.

    wanted: the tensors to be filled by name, those of the ring [L, T, ...] with all their slots; also `generator`.

    Raises:
        CheckpointError: of another environment, network or ring.
        DamagedError: of this one, but impossible.
    """
    if meta.get("env") != spec.env_id:
        raise CheckpointError(
            f"{path}: is a checkpoint of {short_repr(meta.get('env'))}, not of --env {spec.env_id}; resume its own run or start a new one "
            "with another --run-dir"
        )
    possible = {name: _is_count(meta.get(name)) for name in COUNTS}
    possible["turn_owed"] = isinstance(meta.get("turn_owed"), bool)
    possible["best"] = isinstance(meta.get("best"), float | None)
    possible["emulators"] = isinstance(meta.get("emulators"), dict)
    if not all(possible.values()):
        name = next(name for name in possible if not possible[name])
        raise _impossible(path, f"{name} is {short_repr(meta.get(name))}")
    slots = meta["slots"]
    if odd := differing({name: filled(name, tensor, slots) for name, tensor in wanted.items()}, tensors):
        raise CheckpointError(
            f"{path}: holds another network or ring than this run's config.json ({odd} differs); resume with the run's own settings"
        )
    if not _can_draw(tensors["generator"], wanted["updates"].device):
        raise _impossible(path, "the generator's state")
    action, cursor = tensors["ring.action"], tensors["ring.cursor"]
    if tensors["ring.head"] != slots or not 0 <= cursor <= slots * action.shape[0]:
        raise _impossible(path, "ring.head or ring.cursor")
    if not ((action >= 0) & (action < spec.num_actions)).all():
        raise _impossible(path, "ring.action")


def _can_draw(state: Tensor, device: torch.device) -> bool:
    """Whether a generator can go on from a state of the right size. PyTorch does not check for reads beyond the state's end."""
    try:
        torch.Generator(device).set_state(state.clone())
    except RuntimeError:
        return False
    if device.type != "cpu":
        return True
    left, following = int(state[8:12].clone().view(torch.int32)), int(state[16:24].clone().view(torch.int64))
    return (left, following) == (1, 0) or left + following == _WORDS + 1


def _impossible(path: Path, what: str) -> DamagedError:
    return DamagedError(
        f"{path}: no run can have saved this ({what}); resume from another checkpoint or start a new run with another --run-dir"
    )
