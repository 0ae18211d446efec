"""Saving and loading a trainer as a run does, without one."""

from pathlib import Path

import torch

from speedyzero.envs import describe
from speedyzero.loop import Trainer
from speedyzero.run import checkpoint, resume
from speedyzero.run.frames import FrameStore
from speedyzero.run.saver import Saver


def save(trainer: Trainer, directory: Path, ring: bool = True) -> Path:
    """Write a checkpoint and wait for it; returns its path."""
    saver = Saver(directory, 100, FrameStore(directory / "frames") if ring else None, 0)
    saver.save(trainer.iterations, *resume.contents(trainer))
    assert saver.wait() is None
    saver.close()
    return checkpoint.path_of(directory, trainer.iterations)


def load(trainer: Trainer, path: Path, ring: bool = True, log=None) -> Trainer:
    """Bring a new trainer to a checkpoint; the frames come from the store, or else from the replay."""
    lines = []
    resume.restore(trainer, path, FrameStore(path.parent / "frames") if ring else None, log or lines.append)
    assert lines == []
    return trainer


def resumed(config, path: Path, ring: bool = True) -> Trainer:
    """A trainer that went on from a checkpoint, on the CPU."""
    return load(Trainer(config, describe(config.env, frame_size=config.frame_size, gray=config.gray), torch.device("cpu")), path, ring)
