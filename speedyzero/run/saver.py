"""Checkpoints of a run, written beside its loop: the state is copied to the host while the loop waits, a thread does the rest.

The pause is that copy, in which the frames of the ring have no part: they are left out, or go to a `FrameStore`, see there. One checkpoint
is written at a time, so that the copies are made in memory that is allocated once; a loop that asks for the next before the last is on the
disk waits.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from speedyzero.run import checkpoint
from speedyzero.run.checkpoint import CheckpointError
from speedyzero.run.frames import FrameStore, Piece

BEST = "best.safetensors"


class Saver:
    """Writes checkpoints into `directory` and keeps the newest `keep`.

    store: where the frames of the ring go; None: nowhere. interval: the most steps from a `save` to the next, or to a `wait`.
    """

    def __init__(self, directory: Path, keep: int, store: FrameStore | None, interval: int):
        self.directory, self.store = directory, store
        self._keep, self._interval = keep, interval
        self._host: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._failed: OSError | None = None
        self.pause = 0.0
        """Seconds that the last `save` kept the loop from going on."""

    def save(self, iteration: int, state: Mapping[str, Tensor], meta: Mapping[str, Any], best: bool = False) -> None:
        """Begin to write the checkpoint of `iteration`, once the one before is written, or has failed: see `failure`.

        state: tensors by name on any device, those of the ring with all their slots, of which meta["slots"] have been written;
        `ring.frames` goes to the store. best: also link it as BEST.
        """
        begin = monotonic()
        self.settle()
        state = dict(state)
        frames = state.pop("ring.frames")
        slots = meta["slots"]
        pieces = self.store.missing(frames, slots, self._interval) if self.store else []
        host = {name: self._copied(name, tensor) for name, tensor in state.items()}
        if frames.is_cuda:
            torch.cuda.current_stream().synchronize()
        host = {name: filled(name, tensor, slots) for name, tensor in host.items()}
        self._pending = self._thread.submit(self._write, iteration, host, dict(meta), pieces, frames.shape[1], best)
        self.pause = monotonic() - begin

    def failure(self) -> OSError | None:
        """The error that kept a checkpoint from being written, returned once; None if there was none, or the writing goes on."""
        if self._pending is not None and not self._pending.done():
            return None
        return self.wait()

    def wait(self) -> OSError | None:
        """Wait until the last checkpoint is written; returns as `failure`."""
        self.settle()
        failed, self._failed = self._failed, None
        return failed

    def close(self) -> None:
        """Wait for the last checkpoint, and end the thread."""
        self._thread.shutdown()

    def settle(self) -> None:
        """Wait for the write that goes on, if one does; `failure` or `wait` returns its error."""
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending.result()
            except OSError as error:
                self._failed = error

    def _copied(self, name: str, tensor: Tensor) -> Tensor:
        host = self._host.get(name)
        if host is None or (host.shape, host.dtype) != (tensor.shape, tensor.dtype):
            host = self._host[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return host.copy_(tensor, non_blocking=True)

    def _write(
        self, iteration: int, host: dict[str, Tensor], meta: dict[str, Any], pieces: list[Piece], lap: int, best: bool
    ) -> None:
        """On the thread: frames first, since a checkpoint must not name what is not there."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for piece in pieces:
            self.store.write(piece)
        path = checkpoint.path_of(self.directory, iteration)
        checkpoint.save(path, host, meta)
        if best:
            _link(path, self.directory / BEST)
        checkpoint.prune(self.directory, self._keep)
        if self.store:
            kept = [_slots(path, meta["slots"]) for path in checkpoint.by_iteration(self.directory)]
            self.store.prune(min(kept, default=meta["slots"]) - lap)  # none, if somebody deletes the directory just now


def filled(name: str, tensor: Tensor, slots: int) -> Tensor:
    """The part of a tensor of the state that is saved: of the ring's [L, T, ...] the slots written so far; a view."""
    return tensor[:, :slots] if name.startswith("ring.") and tensor.dim() > 1 else tensor


def _slots(path: Path, default: int) -> int:
    """How many slots the run of a checkpoint had written; `default` if the file is damaged."""
    try:
        return checkpoint.read_meta(path)["slots"]
    except CheckpointError:
        return default


def _link(path: Path, other: Path) -> None:
    """Make `other` a second name of the file `path`; a copy where there are no links."""
    aside = other.with_name(other.name + ".tmp")
    aside.unlink(missing_ok=True)
    try:
        os.link(path, aside)
    except OSError:
        shutil.copyfile(path, aside)
    os.replace(aside, other)
