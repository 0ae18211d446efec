"""What a run and an evaluation do with a spoilt file: they refuse it in one line, or go on, and then an iteration must end well."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

import torch

from speedyzero.config import Config, ConfigError
from speedyzero.envs import EnvError, describe
from speedyzero.evaluate import evaluate_run, read_config
from speedyzero.loop import Trainer
from speedyzero.run import checkpoint
from speedyzero.run.checkpoint import CheckpointError
from speedyzero.run.frames import FrameStore
from speedyzero.run.health import Health, NonFiniteError
from speedyzero.state import check_memory

from .run import CPU, Case, Run, Target

REFUSALS = (CheckpointError, ConfigError, EnvError)
LONGEST_LINE = 800
SIZES = (
    "lanes", "simulations", "ring_positions", "start_transitions", "refresh_roots", "updates_per_iteration", "batch_size", "unroll",
    "n_step", "frame_stack", "channels", "stem_channels", "head_channels", "head_hidden", "lstm", "support", "projection", "env_threads",
    "shift",
)  # fmt: skip
"""Settings that an iteration's time and memory grow with."""


@dataclass(frozen=True)
class Outcome:
    """What became of a spoilt file."""

    what: Literal["refused", "accepted", "same", "failed"]
    """same: accepted, and rightly, since it holds what it held."""
    why: str
    """The line of the refusal, or what is wrong."""


class BadLine(Exception):
    """A refusal that is not one line for a person."""


def meet(run: Run, target: Target, case: Case) -> Outcome:
    """Let the spoilt file, which is in its place, be read by all who read such files."""
    try:
        line = {"checkpoint": _checkpoint, "frames": _frames, "config": _config}[target](run)
    except BaseException as error:  # a KeyboardInterrupt of ours is told as any other
        return Outcome("failed", f"{type(error).__name__}: {ascii(str(error))[:300]}")
    if line is not None:
        return Outcome("failed", f"refused, though good: {line}") if case.expect == "accepted" else Outcome("refused", line)
    unchanged = case.spoilt == run.good[target]
    if case.expect == "refused" or (case.expect == "same" and not unchanged):
        return Outcome("failed", "accepted, though no run can have written it")
    return Outcome("same" if unchanged or case.expect == "accepted" else "accepted", "")


def refusal(error: Exception) -> str:
    """The line of a refusal. Raises BadLine if it is none."""
    line = str(error)
    for problem, wrong in (
        ("empty", not line), ("not printable, or more than one line", not line.isprintable()), ("too long", len(line) > LONGEST_LINE),
    ):  # fmt: skip
        if wrong:
            raise BadLine(f"the line of a {type(error).__name__} is {problem}: {line[:200]}")
    return line


def _said(line: str) -> None:
    refusal(ValueError(line))


def _go_on(trainer: Trainer) -> None:
    """One iteration, and what follows it in a run."""
    health = Health(trainer.state, _said)
    phase = trainer.phase()
    if phase is not None:
        trainer.step(phase)
        trainer.state.turn.check()
    row = trainer.metrics()
    json.dumps(row)
    try:
        health.check(row)
    except NonFiniteError as error:  # as it should, if that is what the file holds
        refusal(error)
    trainer.improved()
    tensors, meta = trainer.checkpoint()
    json.dumps(meta)
    if not tensors:
        raise AssertionError("nothing to save")


def _checkpoint(run: Run) -> str | None:
    """Resume from the newest checkpoint; evaluate it; read what pruning reads."""
    path = run.paths["checkpoint"]
    try:
        checkpoint.read_meta(path)
    except CheckpointError as error:
        refusal(error)
    line = evaluated = None
    trainer = Trainer(run.config, run.spec, CPU)
    try:
        newest = checkpoint.newest_whole(run.checkpoints, _said)
        if newest is None:
            raise FileNotFoundError("no checkpoint was found")
        trainer.load(newest, FrameStore(run.checkpoints / "frames"), _said)
        _go_on(trainer)
    except REFUSALS as error:
        line = refusal(error)
    finally:
        trainer.state.emulators.close()
    try:
        evaluate_run(run.directory, 1, "cpu", 0, str(path))
    except REFUSALS as error:
        evaluated = refusal(error)
    if evaluated and not line:
        raise AssertionError(f"good enough to train on, not to evaluate: {evaluated}")
    return line


def _frames(run: Run) -> str | None:
    """Resume with the frames in the store, or, where they are refused, with those of the replay: then they are the same."""
    trainer = Trainer(run.config, run.spec, CPU)
    frames, store, line = trainer.state.ring.frames, FrameStore(run.checkpoints / "frames"), None
    slots = run.held("checkpoint")[1]["slots"]
    try:
        store.read(frames, slots)
    except REFUSALS as error:
        line = refusal(error)
    try:
        trainer.load(run.paths["checkpoint"], store, _said)
        if line is not None:
            _same_frames(run, frames, slots)
        _go_on(trainer)
    finally:
        trainer.state.emulators.close()
    return line


def _same_frames(run: Run, frames: torch.Tensor, slots: int) -> None:
    """The frames that the replay gave are those of the run: its good piece has them."""
    good, piece = run.directory / "good", run.paths["frames"]
    good.mkdir(exist_ok=True)
    (good / piece.name).write_bytes(run.good["frames"])
    like = torch.zeros_like(frames)
    FrameStore(good).read(like, slots)
    if not torch.equal(like[:, :slots], frames[:, :slots]):
        raise AssertionError("the replay gave other frames than the run had")


def _config(run: Run) -> str | None:
    """Resume with the settings in it. Of what takes long or much memory, only see that there is memory for it."""
    trainer = None
    try:
        config = read_config(run.directory)
        spec = describe(config.env, frame_size=config.frame_size, gray=config.gray)
        if not _affordable(config, run.config):
            check_memory(config, spec, CPU)
            return None
        trainer = Trainer(config, spec, CPU)
        trainer.load(run.paths["checkpoint"], FrameStore(run.checkpoints / "frames"), _said)
        _go_on(trainer)
    except REFUSALS as error:
        return refusal(error)
    finally:
        if trainer is not None:
            trainer.state.emulators.close()
    return None


def _affordable(config: Config, like: Config) -> bool:
    return all((getattr(config, name) or 0) <= 4 * (getattr(like, name) or 0) + 64 for name in SIZES)
