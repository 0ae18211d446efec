"""Load a run's newest checkpoint to look at it: the state as --resume makes it. Nothing is written back.

The emulators start only if the run keeps no frames, which then come from replaying, as for --resume. No lock is taken, so that a run can
be looked at while it trains; a damaged checkpoint is passed over and stays where it is.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from speedyzero.config import check
from speedyzero.run import checkpoint
from speedyzero.run.checkpoint import CheckpointError
from speedyzero.run.frames import FrameStore
from speedyzero.run.saver import filled
from speedyzero.run.trained import read_run
from speedyzero.state import State, allocate


def load_run(run_dir: Path, device: torch.device, **settings: Any) -> tuple[State, Path]:
    """The state of a run at its newest checkpoint, on any device, and the checkpoint's path.

    settings: of the config, instead of the run's own; None leaves the run's. The shapes of the state must not depend on them.

    Raises:
        ConfigError, EnvError, CheckpointError: one line each.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    config, spec, path, tensors, meta = read_run(run_dir)
    config = dataclasses.replace(config, run_dir=run_dir, device=device.type, graph="off", **given)
    check(config)
    state = allocate(config, spec, device)
    wanted = state.tensors()
    frames, slots = wanted.pop("ring.frames"), meta["slots"]
    parts = {name: filled(name, tensor, slots) for name, tensor in wanted.items()}
    for name in parts:
        if name.startswith("snapshot.") and name in tensors:  # bf16 of a run on CUDA, fp32 on a CPU: the same numbers
            tensors[name] = tensors[name].to(parts[name].dtype)
    if odd := checkpoint.differing(parts, tensors):
        raise CheckpointError(f"{path}: holds another network or ring than config.json says ({odd} differs); look at an undamaged run")
    with torch.no_grad():
        for name, part in parts.items():
            part.copy_(tensors[name])
    store = FrameStore(path.parent / "frames")
    if next(store.pieces(), None) is not None:
        store.read(frames, slots)
    else:
        _replay(state, slots, tensors, meta)
    return state, path


def _replay(state: State, slots: int, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
    """Fill the ring's frames by replaying the emulators, and stop them. Raises EnvError if they come to other frames."""
    frames, lap = state.ring.frames, state.ring.slots

    def seen(step: int, _: int) -> None:
        if slots - lap <= step < slots:
            frames[:, step % lap].copy_(state.emulators.frames)

    arrays = {name.removeprefix("emulators."): tensor.numpy() for name, tensor in tensors.items() if name.startswith("emulators.")}
    state.emulators.restore(arrays | meta["emulators"], seen)
    state.emulators.close()
