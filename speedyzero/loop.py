"""The host's loop: which phase comes next, when to copy the snapshot, to log, to save, to stop. It counts; the work is `iteration`'s."""

from __future__ import annotations

import contextlib
import signal
from collections import deque
from collections.abc import Callable, Hashable, Sequence

import numpy as np
import torch

from speedyzero.config import Config
from speedyzero.envs import EnvError, EnvSpec
from speedyzero.evaluate import describe_result, evaluate_network, write_result
from speedyzero.graph import GraphError, Graphs, deterministic_algorithms
from speedyzero.iteration import iteration
from speedyzero.pictures.video import frames_a_second
from speedyzero.ranks import ALONE, Ranks
from speedyzero.run import checkpoint, resume
from speedyzero.run.directory import RunDirectory
from speedyzero.run.files import write_json
from speedyzero.run.guard import Interrupt, Interrupted, Watchdog
from speedyzero.run.health import Health, NonFiniteError
from speedyzero.run.log import NoLog, RunLog
from speedyzero.run.observation import newest_frames, newest_observation
from speedyzero.run.track import Tracker
from speedyzero.schedule import Counts, Phase, next_phase, sweep_roots
from speedyzero.staleness import priority_rank_correlation
from speedyzero.state import allocate

# Games over which charts/episodic_return is averaged.
RECENT_GAMES = 32


class Trainer:
    """One run: its state, and the counts from which every decision of the host follows.

    All counts are of what was done, never of time, so that a seed determines the run.
    """

    def __init__(self, config: Config, spec: EnvSpec, device: torch.device, ranks: Ranks = ALONE):
        self.config, self.spec = config, spec
        self.state = allocate(config, spec, device, ranks)
        form = "on" if config.graph == "auto" else config.graph
        self.graphs = Graphs(device, self.state.generator, form, self.state.turn) if device.type == "cuda" else None
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

        What the emulators raised is kept for `state.turn.check`: the iteration is complete but for their step.
        """
        # Before anything looks at a frame. Told from the counts, so that a resumed run does it if the saved one had not yet.
        if self.config.normalize_frames and phase != "collect" and self.swept == self.updates == 0:
            self.run("pixels", self.state.measure_pixels)
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
        if self.updates and (correlation := priority_rank_correlation(self.state)) is not None:
            row["train/priority_rank_correlation"] = correlation
        return row | self.state.search_averages.drain() | self.state.learn_averages.drain()

    def improved(self) -> bool:
        """Whether the last games were the best so far, once there are enough to tell; notes it."""
        if len(self.recent) < RECENT_GAMES:
            return False
        score = float(np.mean([score for score, _ in self.recent]))
        if self.best is not None and score <= self.best:
            return False
        self.best = score
        return True


def train(config: Config, spec: EnvSpec, device: torch.device, ranks: Ranks = ALONE, notes: Sequence[str] = ()) -> signal.Signals | None:
    """Train to the end of the run and evaluate; returns the signal that ended it before, if one did. `config` is resolved.

    ranks: they do it together, each calling this. notes: lines to print after the log's first.

    Raises:
        ConfigError, EnvError, CheckpointError, GraphError, NonFiniteError, RanksError: one line each, before anything is lost.
        OSError: the run could not be saved at its end, or its directory not be written.
    """
    with deterministic_algorithms(config.deterministic), Interrupt() as interrupt:
        trainer = Trainer(config, spec, device, ranks)
        with contextlib.closing(RunDirectory(config, ranks.leads)) as directory:
            try:
                ended_by = _train(trainer, directory, interrupt, notes)
            except Interrupted:
                ended_by = interrupt.requested
                if ranks.leads:
                    print(f"stopped by {ended_by.name}, nothing is lost; {directory.resume_hint}")
            ranks.leave()  # all together: torchrun asks the others to end as soon as one has, and asking twice ends them at once
            return ended_by


def _asked_to_stop(ranks: Ranks, interrupt: Interrupt) -> bool:
    """Whether any rank was asked to stop. All get the same answer, and must go by it: a request that comes later counts the next time."""
    number = ranks.greatest(int(interrupt.requested or 0))
    if number:
        interrupt.requested = signal.Signals(number)
    return number > 0


def _train(trainer: Trainer, directory: RunDirectory, interrupt: Interrupt, notes: Sequence[str]) -> signal.Signals | None:
    config, ranks = trainer.config, trainer.state.ranks

    def check_stop() -> None:
        if _asked_to_stop(ranks, interrupt):
            raise Interrupted

    newest = ranks.told(checkpoint.newest_valid(directory.checkpoints, print) if config.resume and ranks.leads else None)
    if newest is not None:
        resume.restore(trainer, newest, directory.store, print if ranks.leads else NoLog().message, check_stop)
    else:
        trainer.start()
    # Before a new run leaves anything that stays.
    tracker = Tracker(config, directory.description, print) if config.track and ranks.leads else None
    directory.write_config()
    log = NoLog() if not ranks.leads else RunLog(
        config.run_dir, config=config.to_json(), total_env_steps=config.env_steps, total_updates=config.total_updates,
        resume_at=trainer.iterations if config.resume else None, tracker=tracker,
    )  # fmt: skip
    with log:
        for note in notes:
            log.message(note)
        if config.resume:
            log.message(f"resumed {config.run_dir} at iteration {trainer.iterations}: {trainer.env_steps} steps, {trainer.updates} updates")
        _Training(trainer, directory, log, interrupt).run()
        if trainer.phase() is not None:
            log.message(f"stopped by {interrupt.requested.name} at iteration {trainer.iterations} and saved; {directory.resume_hint}")
            return interrupt.requested
        log.message(f"playing {config.eval_episodes} games")
        result = evaluate_network(
            trainer.state.learner.network, config, trainer.spec, trainer.env_steps, trainer.updates, between_steps=check_stop, ranks=ranks
        ) | {"checkpoint": checkpoint.path_of(directory.checkpoints, trainer.iterations).name}
        interrupted = "asked" in result
        if ranks.leads:
            log.message(describe_result(result))  # first, should the disk refuse the rest
            if not interrupted:
                log.scores(result)
            directory.restore_if_deleted(log.message)
            write_result(config.run_dir, result, trainer.iterations)
            if not interrupted:
                write_json(config.run_dir / "summary.json", _summary(trainer, result, log))
        if interrupted:
            raise Interrupted
    return None


class _Training:
    """The iterations of one process: a trainer, and where it logs and saves. Of several ranks the first alone does either."""

    def __init__(self, trainer: Trainer, directory: RunDirectory, log: RunLog | NoLog, interrupt: Interrupt):
        self.ranks = trainer.state.ranks
        self.trainer, self.directory, self.log, self.interrupt = trainer, directory, log, interrupt
        self.config, self.saver = trainer.config, directory.saver
        self.health = Health(trainer.state, log.message)
        self.pictured = self.filmed = False
        """Whether the log has a picture of what the network sees, and a video, from this process."""

    def run(self) -> None:
        """Iterate, log and save until the run is complete or a signal asks to stop; the last state is saved.

        Raises:
            EnvError, GraphError, NonFiniteError: the run is saved, or the line says which checkpoint is the last.
            OSError: the last state could not be saved.
        """
        trainer, config = self.trainer, self.config
        with contextlib.closing(Watchdog(config.watchdog, self._stuck)) as watchdog:
            while (phase := trainer.phase()) is not None:
                self._step(phase, watchdog)
                stop = _asked_to_stop(self.ranks, self.interrupt)
                complete = trainer.phase() is None
                if complete or trainer.iterations % config.log_interval == 0:
                    self._log_row()
                if error := self.saver.failure():
                    self._log_not_written(error)
                if complete or stop:
                    self._save_and_wait()
                    return
                if trainer.iterations % config.checkpoint_interval == 0:
                    try:
                        self._save()
                    except OSError as error:
                        self._log_not_written(error)

    def _step(self, phase: Phase, watchdog: Watchdog) -> None:
        """One iteration; saves if it fails and the state is one to go on from."""
        try:
            with watchdog.watch():
                self.trainer.step(phase)
        except GraphError as error:
            if error.clean:
                self._save_and_wait()
            raise
        try:
            self.trainer.state.turn.check()
        except Exception as error:
            if not self.ranks.leads:
                raise
            self.trainer.turn_owed = True
            self._save_and_wait()
            raise EnvError(f"{error}; saved: the step is tried again with --resume --run-dir {self.config.run_dir}") from error

    def _log_row(self) -> None:
        """Write a row of metrics. Raises NonFiniteError, after saving."""
        row = self.trainer.metrics()
        flat, ring = self.trainer.state.learner.optimizer.flat, self.trainer.state.ring
        self.ranks.check_same((flat.values, flat.momentum, ring.priority, ring.value))
        try:
            self.directory.restore_if_deleted(self.log.message)
        except OSError as error:
            self.log.message(f"{self.config.run_dir} was deleted and could not be created again ({error.strerror or error})")
        self.log.row(row | {"time/checkpoint_pause_s": self.saver.pause})
        if not self.pictured and row["updates"]:
            self.pictured = True
            if (picture := newest_observation(self.trainer.state)) is not None:
                self.log.picture("observation", picture)
        try:
            self.health.check(row)
        except NonFiniteError:
            try:
                self._save_and_wait()
            except OSError as error:
                self._log_not_written(error)
            raise

    def _save(self) -> None:
        """Begin to save the state of now. Raises OSError."""
        if not self.ranks.leads:
            return
        self.saver.settle()  # the ring's frames that the last save still reads may be overwritten from now on
        self.directory.restore_if_deleted(self.log.message)
        best = self.trainer.improved()  # before `contents`: it changes `trainer.best`
        self.saver.save(self.trainer.iterations, *resume.contents(self.trainer), best)
        if (best or not self.filmed) and (frames := newest_frames(self.trainer.state)) is not None:
            self.log.clip("video", frames, frames_a_second(self.trainer.spec))
        self.filmed = True

    def _save_and_wait(self) -> None:
        self._save()
        if error := self.saver.wait():
            raise error

    def _log_not_written(self, error: OSError) -> None:
        self.log.message(
            f"the checkpoint was not written ({error.strerror or error}), the one before stands; tried again after "
            f"{self.config.checkpoint_interval} iterations"
        )

    def _stuck(self, limit: float) -> str:
        """The last line of a run whose iteration did not end in `limit` seconds."""
        trainer, newest = self.trainer, checkpoint.latest(self.directory.checkpoints)
        hint = f"go on from {newest.name} with --resume --run-dir {self.config.run_dir}" if newest else "nothing was saved yet"
        where = (trainer.graphs and trainer.graphs.doing) or f"stage {trainer.state.progress.where()}"
        return f"iteration {trainer.iterations} is stuck in {where} for {limit:g} s (--watchdog); {hint}"


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
        "eval": {name: result[name] for name in ("episodes", "mean", "median", "std", "human_normalised", "distinct_games")}
        | {"cut": sum(result["cut"])},
        "checkpoint": str(checkpoint.latest(config.run_dir / "checkpoints").relative_to(config.run_dir)),
    }
