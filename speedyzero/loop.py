"""The host's loop: which phase comes next, when to copy the snapshot, to log, to save, to stop. It counts; the work is `iteration`'s."""

from __future__ import annotations

import contextlib
import signal
from collections import deque
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speedyzero.config import Config
from speedyzero.envs import EnvError, EnvSpec
from speedyzero.evaluate import describe_result, evaluate_network
from speedyzero.graph import GraphError, Graphs, deterministic_algorithms
from speedyzero.iteration import iteration
from speedyzero.run import checkpoint
from speedyzero.run.directory import Home
from speedyzero.run.files import write_json
from speedyzero.run.frames import FrameStore
from speedyzero.run.guard import Interrupt, Interrupted, Watchdog
from speedyzero.run.health import Health, NonFiniteError
from speedyzero.run.log import RunLog
from speedyzero.run.resume import COUNTS, check_contents, filled
from speedyzero.schedule import Counts, Phase, next_phase, sweep_roots
from speedyzero.state import allocate

# Games over which charts/episodic_return is averaged.
RECENT_GAMES = 32

# Transitions from which on a replay takes long enough to say so.
LONG_REPLAY = 20_000


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
        self.best: float | None = None
        """Mean return of the best RECENT_GAMES games in a row, as seen when saving."""
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

    @property
    def counts(self) -> Counts:
        return Counts(self.env_steps, self.updates, self.slots, self.swept)

    def phase(self) -> Phase | None:
        """What the next iteration is; None when the run is complete."""
        return next_phase(self.config, self.counts)

    def roots(self) -> int:
        """R of the next iteration if it sweeps; 0 under `sampled`."""
        return sweep_roots(self.config, self.slots)

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
        roots = 0 if phase == "collect" else self.roots()
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

    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint of this moment holds: tensors where they live, and the counts."""
        tensors = self.state.tensors()
        tensors["generator"] = self.state.generator.get_state()
        tensors["recent"] = torch.tensor(list(self.recent), dtype=torch.float64).view(-1, 2)
        emulators: dict[str, Any] = {}
        for name, value in self.state.emulators.state_dict().items():
            if isinstance(value, np.ndarray):
                tensors[f"emulators.{name}"] = torch.from_numpy(value)
            else:
                emulators[name] = value
        counts = {name: getattr(self, name) for name in COUNTS}
        return tensors, {
            **counts, "env_steps": self.env_steps, "turn_owed": self.turn_owed, "best": self.best, "env": self.spec.env_id,
            "config": self.config.to_json(), "torch": torch.__version__, "emulators": emulators,
        }  # fmt: skip

    def improved(self) -> bool:
        """Whether the last games were the best so far, once there are enough to tell; notes it."""
        if len(self.recent) < RECENT_GAMES:
            return False
        score = float(np.mean([score for score, _ in self.recent]))
        if self.best is not None and score <= self.best:
            return False
        self.best = score
        return True

    def load(
        self, path: Path, store: FrameStore | None = None, say: Callable[[str], None] = print, heed: Callable[[], None] = lambda: None
    ) -> None:
        """Go on from a checkpoint: the emulators are brought back by replaying their actions, and with them the frames of the ring, unless
        `store` has them.

        say: gets a line about what is worth knowing. heed: called often; what it raises ends this, and nothing is lost.

        Raises:
            CheckpointError: damaged, or of another environment or network.
            EnvError: the replay did not lead to the saved frames.
        """
        tensors, meta = checkpoint.load(path)
        state = self.state.tensors()
        frames, slots, lap = state.pop("ring.frames"), meta.get("slots"), self.config.slots
        check_contents(path, tensors, meta, state | {"generator": self.state.generator.get_state()}, self.spec)
        with torch.no_grad():
            for name, tensor in state.items():
                filled(name, tensor, slots).copy_(tensors[name])
        # Torch reads the generator's state as a struct: a view of the file may lie at an odd address, and that is a crash.
        self.state.generator.set_state(tensors["generator"].clone())
        self.recent.extend((score, int(length)) for score, length in tensors["recent"].tolist())
        for name in COUNTS:
            setattr(self, name, meta[name])
        self.best = meta["best"]
        stored = store is not None
        if stored:
            try:
                store.read(frames, slots)
            except checkpoint.CheckpointError as error:
                stored = False
                say(f"{str(error).partition(';')[0]}; the frames come from replaying the emulators")
                store.complete.clear()

        def seen(step: int, steps: int) -> None:
            nonlocal stored
            heed()
            if step == 0 and steps * self.config.lanes >= LONG_REPLAY:
                say(f"replaying {steps} steps of {self.config.lanes} emulators")
            if slots - lap <= step < slots:
                frame, theirs = frames[:, step % lap], self.state.emulators.frames
                if stored and not torch.equal(frame.cpu(), theirs):
                    stored = False
                    say(f"{store.directory} holds frames of another run; the frames come from replaying the emulators")
                    store.complete.clear()
                if not stored:
                    frame.copy_(theirs)

        arrays = {
            name.removeprefix("emulators."): tensor.numpy() for name, tensor in tensors.items() if name.startswith("emulators.")
        }
        self.state.emulators.restore(arrays | meta["emulators"], seen)
        if meta["turn_owed"]:
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


def train(config: Config, spec: EnvSpec, device: torch.device) -> signal.Signals | None:
    """Train to the end of the run and evaluate; returns the signal that ended it before, if one did. `config` is resolved.

    Raises:
        ConfigError, EnvError, CheckpointError, GraphError, NonFiniteError: one line each, before anything is lost.
        OSError: the run could not be saved at its end, or its directory not be written.
    """
    with deterministic_algorithms(config.deterministic), Interrupt() as interrupt:
        trainer = Trainer(config, spec, device)
        with contextlib.closing(Home(config)) as home:
            try:
                return _train(trainer, home, interrupt)
            except Interrupted:
                print(f"stopped by {interrupt.requested.name}, nothing is lost; {home.way_on}")
                return interrupt.requested


def _train(trainer: Trainer, home: Home, interrupt: Interrupt) -> signal.Signals | None:
    config = trainer.config
    newest = checkpoint.newest_whole(home.checkpoints, print) if config.resume else None
    if newest is not None:
        trainer.load(newest, home.store, print, interrupt.heed)
    else:
        trainer.start()
    home.write_config()
    log = RunLog(
        config.run_dir, total_env_steps=config.env_steps, total_updates=config.total_updates,
        resume_at=trainer.iterations if config.resume else None,
    )
    with log:
        if config.resume:
            log.message(f"resumed {config.run_dir} at iteration {trainer.iterations}: {trainer.env_steps} steps, {trainer.updates} updates")
        _train_to_the_end(trainer, home, log, interrupt)
        if trainer.phase() is not None:
            log.message(f"stopped by {interrupt.requested.name} at iteration {trainer.iterations} and saved; {home.way_on}")
            return interrupt.requested
        log.message(f"playing {config.eval_episodes} games")
        result = evaluate_network(
            trainer.state.learner.network, config, trainer.spec, trainer.env_steps, trainer.updates, between_steps=interrupt.heed
        ) | {"checkpoint": checkpoint.path_of(home.checkpoints, trainer.iterations).name}
        log.message(describe_result(result))  # first, should the disk refuse the rest
        home.keep(log.message)
        write_json(config.run_dir / "eval.json", result)
        write_json(config.run_dir / "summary.json", _summary(trainer, result, log))
    return None


def _train_to_the_end(trainer: Trainer, home: Home, log: RunLog, interrupt: Interrupt) -> None:
    """Iterate, log and save until the run is complete or a signal asks to stop; the last state is saved.

    Raises:
        EnvError, GraphError, NonFiniteError: the run is saved, or the line says what stands.
        OSError: the last state could not be saved.
    """
    config, health = trainer.config, Health(trainer.state, log.message)

    def stuck(limit: float) -> str:
        newest = checkpoint.latest(home.checkpoints)
        resume = f"go on from {newest.name} with --resume --run-dir {config.run_dir}" if newest else "nothing was saved yet"
        where = (trainer.graphs and trainer.graphs.doing) or f"stage {trainer.state.progress.where()}"
        return f"iteration {trainer.iterations} is stuck in {where} for {limit:g} s (--watchdog); {resume}"

    def keep_home() -> None:
        try:
            home.keep(log.message)
        except OSError as error:
            log.message(f"{config.run_dir} was deleted and could not be made anew ({error.strerror or error})")

    def save() -> None:
        home.saver.settle()  # whatever becomes of this one: the frames of the last may be read for so long and no longer
        home.keep(log.message)
        best = trainer.improved()  # before the counts are taken down: it is one of them
        home.saver.save(trainer.iterations, *trainer.checkpoint(), best)

    def save_and_wait() -> None:
        save()
        if error := home.saver.wait():
            raise error

    def say_not_written(error: OSError) -> None:
        log.message(f"the checkpoint was not written ({error.strerror or error}), the one before stands; tried again after "
                    f"{config.checkpoint_interval} iterations")

    with contextlib.closing(Watchdog(config.watchdog, stuck)) as watchdog:
        while (phase := trainer.phase()) is not None:
            try:
                with watchdog.watch():
                    trainer.step(phase)
            except GraphError as error:
                if error.clean:
                    save_and_wait()
                raise
            try:
                trainer.state.turn.check()
            except Exception as error:
                trainer.turn_owed = True
                save_and_wait()
                raise EnvError(f"{error}; saved: the step is tried again with --resume --run-dir {config.run_dir}") from error
            complete = trainer.phase() is None
            if complete or trainer.iterations % config.log_interval == 0:
                row = trainer.metrics()
                keep_home()
                log.row(row | {"time/checkpoint_pause_s": home.saver.pause})
                try:
                    health.check(row)
                except NonFiniteError:
                    try:
                        save_and_wait()
                    except OSError as error:
                        say_not_written(error)
                    raise
            if error := home.saver.failure():
                say_not_written(error)
            if complete or interrupt.requested:
                save_and_wait()
                return
            if trainer.iterations % config.checkpoint_interval == 0:
                try:
                    save()
                except OSError as error:
                    say_not_written(error)


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
