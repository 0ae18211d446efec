"""A small run stopped in the middle: the files that are spoilt, and what a spoilt file is."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import shutil
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

import torch
from torch import Tensor

from speedyzero.config import Config, preset_config, resolve
from speedyzero.envs import EnvSpec, describe
from speedyzero.evaluate import read_config
from speedyzero.loop import Trainer
from speedyzero.run import checkpoint
from speedyzero.run.directory import Home

CPU = torch.device("cpu")

SMALL = {
    "env": "Catch-v0", "device": "cpu", "env_steps": 160, "lanes": 4, "start_transitions": 80, "ring_positions": 96, "refresh_roots": 16,
    "simulations": 3, "updates_per_iteration": 2, "final_updates": 6, "batch_size": 4, "channels": 4, "stem_channels": 4,
    "head_channels": 2, "head_hidden": 8, "lstm": 8, "support": 5, "projection": 8, "unroll": 3, "n_step": 3, "snapshot_interval": 2,
    "augment": True, "eval_episodes": 1, "eval_max_steps": 3, "max_episode_steps": None,
}  # fmt: skip
"""A run of Catch of which an iteration takes some hundredths of a second."""
OTHER = {"search": "gumbel", "refresh": "sampled", "optimizer": "clipped-lars", "lanes": 3, "bootstrap": "root"}
"""What the other kind of run has otherwise, so that every piece of an iteration is met with odd numbers."""

Target = Literal["checkpoint", "frames", "config"]
Expect = Literal["refused", "either", "same", "accepted"]


@dataclass(frozen=True)
class Case:
    """One spoilt file."""

    spoilt: bytes | Callable[[Path], None]
    """Its contents, or what puts it into its place, which is free."""
    expect: Expect
    """refused: nothing else will do. either: refused, or harmless. same: refused, unless its contents are what they were.
    accepted: it is a good one."""
    note: str = ""
    """What exactly was done, for a person who looks into it."""


@dataclass(frozen=True)
class Kind:
    """A way to spoil a file."""

    target: Target
    name: str
    make: Callable[[Random, Run], Case]
    weight: int = 1
    """How many cases of it there are for one of a kind of weight 1."""


class Run:
    """The files of a run in `directory`, as they were when it was stopped."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.checkpoints = directory / "checkpoints"
        self.paths: dict[Target, Path] = {
            "checkpoint": checkpoint.latest(self.checkpoints),
            "frames": next((self.checkpoints / "frames").glob("frames_*.safetensors")),
            "config": directory / "config.json",
        }
        self.good = {target: path.read_bytes() for target, path in self.paths.items()}
        self._held = {target: _copied(*checkpoint.load(self.paths[target])) for target in ("checkpoint", "frames")}

    @functools.cached_property
    def config(self) -> Config:
        return read_config(self.directory)

    @functools.cached_property
    def spec(self) -> EnvSpec:
        return describe(self.config.env, frame_size=self.config.frame_size, gray=self.config.gray)

    def put(self, target: Target, case: Case | None) -> None:
        """Put a spoilt file into its place, or the good one (None)."""
        path = self.paths[target]
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.with_name(path.name + ".damaged").unlink(missing_ok=True)
        if case is not None and callable(case.spoilt):
            case.spoilt(path)
        else:
            path.write_bytes(self.good[target] if case is None else case.spoilt)

    def fields(self) -> dict[str, Any]:
        """What config.json holds."""
        return json.loads(self.good["config"])

    def held(self, target: Target) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Copies of the tensors and the meta of the good file."""
        return _copied(*self._held[target])

    def saved(self, tensors: dict[str, Tensor], meta: Any) -> bytes:
        """The file that `checkpoint.save` makes of them, with good checksums."""
        path = self.directory / "spoilt.safetensors"
        checkpoint.save(path, tensors, meta)
        try:
            return path.read_bytes()
        finally:
            path.unlink()

    def taken_apart(self, target: Target) -> tuple[dict[str, Any], bytes]:
        """Header and data of the good file, as safetensors has them."""
        good = self.good[target]
        end = 8 + int.from_bytes(good[:8], "little")
        return json.loads(good[8:end]), good[end:]


def _copied(tensors: dict[str, Tensor], meta: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return {name: tensor.clone() for name, tensor in tensors.items()}, copy.deepcopy(meta)


def resaving(target: Target, group: str, spoil: Callable[[Random, dict[str, Tensor], dict], tuple[str, Expect]], weight: int) -> Kind:
    """The kind of the good file saved anew, checksums and all, after `spoil` changed tensors and meta: it gives note and expectation."""

    def make(random: Random, run: Run) -> Case:
        tensors, meta = run.held(target)
        note, expect = spoil(random, tensors, meta)
        return Case(run.saved(tensors, meta), expect, note)

    return Kind(target, f"{group}: {spoil.__name__.replace('_', ' ')}", make, weight)


def assembled(header: dict[str, Any] | bytes, data: bytes, length: int | None = None) -> bytes:
    """A file with this header, its checksum good; as `checkpoint.save` would write it if it wrote such things.

    header: as bytes where no dictionary can hold it; it begins as that of a checkpoint, its sum being any eight digits. length: what the
    file says of the header's; None: the truth.
    """
    text = json.dumps(header, separators=(",", ":")).encode() if isinstance(header, dict) else header
    text += b" " * (-len(text) % 8)
    rest = text[checkpoint._PREFIX_BYTES :]
    return (len(text) if length is None else length).to_bytes(8, "little") + checkpoint._PREFIX % zlib.crc32(rest) + rest + data


def make(directory: Path, other: bool) -> None:
    """A run in `directory` that was stopped while it trained."""
    config = dataclasses.replace(preset_config("cpu"), run_dir=directory, **(SMALL | (OTHER if other else {})))
    spec = describe(config.env, frame_size=config.frame_size, gray=config.gray)
    config = resolve(config, image=spec.image, atari=False)
    trainer = Trainer(config, spec, CPU)
    trainer.start()
    while trainer.updates < 6:
        trainer.step(trainer.phase())
    home = Home(config)
    home.write_config()
    home.saver.save(trainer.iterations, *trainer.checkpoint())
    if error := home.saver.wait():
        raise error
    home.close()
    trainer.state.emulators.close()


def make_all(directory: Path) -> None:
    """Both kinds of run."""
    for name, other in (("one", False), ("other", True)):
        make(directory / name, other)


if __name__ == "__main__":
    torch.set_num_threads(1)
    make_all(Path(sys.argv[1]))
