"""The host's loop: which phase comes next, when to copy the snapshot, to log, to save, to stop. It counts; the work is `iteration`'s."""

from __future__ import annotations

import signal
from collections import deque
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from speedyzero import checkpoint
from speedyzero.config import Config, ConfigError
from speedyzero.envs import EnvSpec
from speedyzero.evaluate import describe_result, evaluate_network
from speedyzero.iteration import Phase, iteration
from speedyzero.log import RunLog, write_json
from speedyzero.state import allocate

# Games over which charts/episodic_return is averaged.
RECENT_GAMES = 32
CHECKPOINTS_KEPT = 2


class Trainer:
    """One run: its state, and the counts from which every decision of the host follows.

    All counts are of what was done, never of time, so that a seed determines the run.
    """

    def __init__(self, config: Config, spec: EnvSpec, device: torch.device):
        self.config, self.spec = config, spec
        self.state = allocate(config, spec, device)
        self.iterations = 0
        self.updates = 0
        self.slots = 0
        """Slots written in each lane."""
        self.swept = 0
        """Positions refreshed by the first sweep."""
        self.episodes = 0
        self.recent: deque[tuple[float, int]] = deque(maxlen=RECENT_GAMES)

    def start(self) -> None:
        """Start the emulators of a new run."""
        self.state.emulators.reset()

    @property
    def env_steps(self) -> int:
        return self.state.emulators.transitions

    def phase(self) -> Phase | None:
        """What the next iteration is; None when the run is complete."""
        config = self.config
        if self.env_steps < config.start_transitions:
            return "collect"
        if config.refresh == "sweep" and self.swept < min(self.slots - 1, config.slots) * config.lanes and self.updates == 0:
            return "sweep"
        if self.env_steps < config.env_steps:
            return "train"
        return "learn" if self.updates < config.total_updates else None

    def roots(self) -> int:
        """R of the next iteration: the least of R/8, R/4, R/2 and R that keeps the sweep's period while the ring fills."""
        config = self.config
        share = config.refresh_roots * min(self.slots * config.lanes, config.ring_positions) / config.ring_positions
        return next(config.refresh_roots // part for part in (8, 4, 2, 1) if config.refresh_roots // part >= share or part == 1)

    def step(self, phase: Phase) -> None:
        """One iteration, and the snapshot if its time has come."""
        roots = self.roots()
        if phase in ("collect", "train"):
            self.slots += 1
        iteration(self.state, phase, roots)
        self.iterations += 1
        if phase == "sweep":
            self.swept += roots
        if phase in ("train", "learn"):
            before = self.updates // self.config.snapshot_interval
            self.updates += self.config.updates_per_iteration
            if self.updates // self.config.snapshot_interval > before:
                self.state.refold()
        games = self.state.emulators.drain_finished()
        self.episodes += len(games)
        self.recent.extend(games)

    def metrics(self) -> dict[str, float | int]:
        """A row for the log: the counts, the last games, and the device's averages since the last row."""
        row: dict[str, float | int] = {
            "env_steps": self.env_steps,
            "updates": self.updates,
            "iteration": self.iterations,
            "charts/episodes": self.episodes,
            "train/skipped_updates": int(self.state.learner.skipped),
        }
        if self.recent:
            row["charts/episodic_return"] = float(np.mean([score for score, _ in self.recent]))
            row["charts/episodic_length"] = float(np.mean([length for _, length in self.recent]))
        return row | self.state.search_averages.drain() | self.state.learn_averages.drain()

    def save(self, directory: Path) -> Path:
        """Write a checkpoint of everything, the ring included; returns its path."""
        filled = min(self.slots, self.config.slots)
        tensors = {
            name: tensor[:, :filled].contiguous() if name.startswith("ring.") and tensor.dim() > 1 else tensor
            for name, tensor in self.state.tensors().items()
        }
        tensors["generator"] = self.state.generator.get_state()
        tensors["recent"] = torch.tensor(list(self.recent), dtype=torch.float64).view(-1, 2)
        plain: dict[str, Any] = {}
        for name, value in self.state.emulators.state_dict().items():
            if isinstance(value, np.ndarray):
                tensors[f"emulators.{name}"] = torch.from_numpy(value)
            else:
                plain[name] = value
        meta = {
            "env": self.spec.env_id,
            "iteration": self.iterations,
            "updates": self.updates,
            "env_steps": self.env_steps,
            "slots": self.slots,
            "swept": self.swept,
            "episodes": self.episodes,
            "emulators": plain,
        }
        path = checkpoint.path_of(directory, self.iterations)
        directory.mkdir(parents=True, exist_ok=True)
        checkpoint.save(path, tensors, meta)
        checkpoint.prune(directory, CHECKPOINTS_KEPT)
        return path

    def load(self, path: Path) -> None:
        """Go on from a checkpoint: the emulators are brought back by replaying their actions.

        Raises:
            CheckpointError: damaged, or of another environment or network.
            EnvError: the replay did not lead to the saved frames.
        """
        tensors, meta = checkpoint.load(path)
        if meta.get("env") != self.spec.env_id:
            raise checkpoint.CheckpointError(
                f"{path}: is a checkpoint of {meta.get('env')}, not of --env {self.spec.env_id}; resume its own run or start anew with "
                "another --run-dir"
            )
        filled = min(meta["slots"], self.config.slots)
        targets = {
            name: tensor[:, :filled] if name.startswith("ring.") and tensor.dim() > 1 else tensor
            for name, tensor in self.state.tensors().items()
        }
        odd = [n for n, t in targets.items() if n not in tensors or tensors[n].shape != t.shape or tensors[n].dtype != t.dtype]
        if odd:
            raise checkpoint.CheckpointError(
                f"{path}: holds another network or ring than this run's config.json ({odd[0]} differs); resume with the run's own settings"
            )
        with torch.no_grad():
            for name, tensor in targets.items():
                tensor.copy_(tensors[name])
        # Torch reads the generator's state as a struct: a view of the file may lie at an odd address, and that is a crash.
        self.state.generator.set_state(tensors["generator"].clone())
        self.recent.extend((score, int(length)) for score, length in tensors["recent"].tolist())
        arrays = {
            name.removeprefix("emulators."): tensor.numpy() for name, tensor in tensors.items() if name.startswith("emulators.")
        }
        self.state.emulators.restore(arrays | meta["emulators"])
        self.iterations, self.updates, self.slots = meta["iteration"], meta["updates"], meta["slots"]
        self.swept, self.episodes = meta["swept"], meta["episodes"]


class Interrupt:
    """Turns the first Ctrl-C into a request to stop after the iteration; a second one is the usual KeyboardInterrupt."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Interrupt:
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before or signal.default_int_handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, self._before or signal.default_int_handler)


def train(config: Config, spec: EnvSpec, device: torch.device) -> bool:
    """Train to the end of the run and evaluate, or to a Ctrl-C; returns whether it came to the end. `config` is resolved.

    Raises:
        ConfigError, EnvError, CheckpointError: one line each, before anything is lost.
    """
    run_dir, checkpoints = config.run_dir, config.run_dir / "checkpoints"
    newest = checkpoint.latest(checkpoints) if config.resume else None
    trainer = Trainer(config, spec, device)
    if newest is not None:
        trainer.load(newest)
    else:
        trainer.start()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json(run_dir / "config.json", {**config.to_json(), "resume": False})
    except OSError as error:
        raise ConfigError(f"--run-dir {run_dir}: cannot be written ({error.strerror}); give another folder") from None
    log = RunLog(
        run_dir, total_env_steps=config.env_steps, total_updates=config.total_updates,
        resume_at=trainer.iterations if config.resume else None,
    )
    with log:
        if config.resume:
            log.message(f"resumed {run_dir} at iteration {trainer.iterations}: {trainer.env_steps} steps, {trainer.updates} updates")
        if not _train_to_the_end(trainer, log, checkpoints):
            log.message(f"stopped at iteration {trainer.iterations} and saved; go on with --resume --run-dir {run_dir}")
            return False
        log.message(f"playing {config.eval_episodes} games")
        result = evaluate_network(trainer.state.learner.network, config, spec, trainer.env_steps, trainer.updates)
        write_json(run_dir / "eval.json", result)
        write_json(run_dir / "summary.json", _summary(trainer, result, log))
        log.message(describe_result(result))
    return True


def _train_to_the_end(trainer: Trainer, log: RunLog, checkpoints: Path) -> bool:
    """Iterate, log and save until the run is complete (True) or Ctrl-C asks to stop (False); either way the last state is saved."""
    config = trainer.config
    with Interrupt() as interrupt:
        while (phase := trainer.phase()) is not None:
            trainer.step(phase)
            complete = trainer.phase() is None
            if complete or trainer.iterations % config.log_interval == 0:
                log.row(trainer.metrics())
            if complete or interrupt.requested or trainer.iterations % config.checkpoint_interval == 0:
                trainer.save(checkpoints)
            if interrupt.requested and not complete:
                return False
    return True


def _summary(trainer: Trainer, result: dict, log: RunLog) -> dict:
    config = trainer.config
    return {
        "env": config.env,
        "preset": config.preset,
        "seed": config.seed,
        "device": str(trainer.state.device),
        "torch": torch.__version__,
        "env_steps": trainer.env_steps,
        "updates": trainer.updates,
        "iterations": trainer.iterations,
        "episodes": trainer.episodes,
        "wall_s": log.wall_s,
        "eval": {name: result[name] for name in ("episodes", "mean", "median", "std", "human_normalised")},
        "checkpoint": str(checkpoint.latest(config.run_dir / "checkpoints").relative_to(config.run_dir)),
    }
