"""The host's loop: which phase comes next, when to copy the snapshot, to log, to save, to stop. It counts; the work is `iteration`'s."""

from __future__ import annotations

import contextlib
import signal
from collections import deque
from collections.abc import Callable, Hashable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speedyzero import checkpoint
from speedyzero.config import Config, ConfigError
from speedyzero.envs import EnvError, EnvSpec
from speedyzero.evaluate import describe_result, evaluate_network
from speedyzero.graph import GraphError, Graphs
from speedyzero.iteration import Phase, iteration
from speedyzero.log import RunLog, write_json
from speedyzero.state import allocate
from speedyzero.watchdog import Watchdog

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
        self.graphs = Graphs(device, self.state.generator, config.graph != "off") if device.type == "cuda" else None
        self.iterations = 0
        self.updates = 0
        self.slots = 0
        """Slots written in each lane."""
        self.swept = 0
        """Positions refreshed by the first sweep."""
        self.episodes = 0
        self.recent: deque[tuple[float, int]] = deque(maxlen=RECENT_GAMES)
        self.turn_owed = False
        """Whether the emulators failed in the last iteration, and have still to take its step."""
        if self.graphs is not None:
            for _ in range(2):  # run and captured before anything depends on it: it only does again what `allocate` did
                self.run("snapshot", self.state.refold)

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

    def run(self, key: Hashable, function: Callable[[], None]) -> None:
        """Do what `function` does on the device: captured where there are graphs."""
        if self.graphs is None:
            function()
        else:
            self.graphs.run(key, function)

    def step(self, phase: Phase) -> None:
        """One iteration, and the snapshot if its time has come. Nothing is counted if it could not be captured.

        What the emulators raised is kept for `state.turn.check`: the iteration is whole but for their step.
        """
        # Of phases that sweep nothing there is one graph, however full the ring is.
        roots = self.roots() if phase != "collect" and self.config.refresh == "sweep" else 0
        self.run((phase, roots), lambda: iteration(self.state, phase, roots))
        self.iterations += 1
        if phase in ("collect", "train"):
            self.slots += 1
        if phase == "sweep":
            self.swept += roots
        games = self.state.emulators.drain_finished()
        self.episodes += len(games)
        self.recent.extend(games)
        if phase in ("train", "learn"):
            before = self.updates // self.config.snapshot_interval
            self.updates += self.config.updates_per_iteration
            if self.updates // self.config.snapshot_interval > before:
                self.run("snapshot", self.state.refold)

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
            name: _filled(tensor, filled) if name.startswith("ring.") and tensor.dim() > 1 else tensor
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
            "turn_owed": self.turn_owed,
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
        if meta.get("turn_owed", False):
            self._take_owed_turn()

    def _take_owed_turn(self) -> None:
        """Let the emulators take the step that failed when the run was saved: its actions are in the ring."""
        emulators = self.state.emulators
        emulators.actions.copy_(self.state.ring.action.view(-1)[self.state.ring.newest()])
        try:
            emulators.send()
            emulators.recv()
        except Exception as error:
            raise EnvError(f"{error}; the step that failed before failed again, and can be tried once more with --resume") from error
        games = emulators.drain_finished()
        self.episodes += len(games)
        self.recent.extend(games)


def _filled(field: Tensor, filled: int) -> Tensor:
    """The first slots of a field of the ring, contiguous, on the CPU: lane by lane, as a GPU may have no room for a second ring."""
    if field.device.type == "cpu":
        return field[:, :filled].contiguous()
    return torch.stack([lane[:filled].cpu() for lane in field])


class Interrupt:
    """Turns the first Ctrl-C or SIGTERM into a request to stop after the iteration; a second one does what it always does."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None

    def __enter__(self) -> Interrupt:
        self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number)
        self.__exit__()


def train(config: Config, spec: EnvSpec, device: torch.device) -> signal.Signals | None:
    """Train to the end of the run and evaluate; returns the signal that ended it before, if one did. `config` is resolved.

    Raises:
        ConfigError, EnvError, CheckpointError, GraphError: one line each, before anything is lost.
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
        ended_by = _train_to_the_end(trainer, log, checkpoints)
        if ended_by is not None:
            log.message(f"stopped at iteration {trainer.iterations} and saved; go on with --resume --run-dir {run_dir}")
            return ended_by
        log.message(f"playing {config.eval_episodes} games")
        result = evaluate_network(trainer.state.learner.network, config, spec, trainer.env_steps, trainer.updates)
        write_json(run_dir / "eval.json", result)
        write_json(run_dir / "summary.json", _summary(trainer, result, log))
        log.message(describe_result(result))
    return None


def _train_to_the_end(trainer: Trainer, log: RunLog, checkpoints: Path) -> signal.Signals | None:
    """Iterate, log and save until the run is complete, or until a signal asks to stop, which is returned; the last state is saved."""
    config = trainer.config

    def stuck(limit: float) -> str:
        newest = checkpoint.latest(checkpoints)
        resume = f"go on from {newest.name} with --resume --run-dir {config.run_dir}" if newest else "nothing was saved yet"
        where = (trainer.graphs and trainer.graphs.doing) or f"stage {trainer.state.progress.where()}"
        return f"iteration {trainer.iterations} is stuck in {where} for {limit:g} s (--watchdog); {resume}"

    watchdog = Watchdog(config.watchdog, stuck)
    with contextlib.closing(watchdog), Interrupt() as interrupt:
        while (phase := trainer.phase()) is not None:
            try:
                with watchdog.watch():
                    trainer.step(phase)
            except GraphError as error:
                if error.clean:
                    trainer.save(checkpoints)
                raise
            try:
                trainer.state.turn.check()
            except Exception as error:
                trainer.turn_owed = True
                trainer.save(checkpoints)
                raise EnvError(f"{error}; saved: the step is tried again with --resume --run-dir {config.run_dir}") from error
            complete = trainer.phase() is None
            if complete or trainer.iterations % config.log_interval == 0:
                log.row(trainer.metrics())
            if complete or interrupt.requested or trainer.iterations % config.checkpoint_interval == 0:
                trainer.save(checkpoints)
            if interrupt.requested and not complete:
                return interrupt.requested
    return None


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
