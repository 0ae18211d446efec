"""Trainers at work: started as in a run, with a ring that is full without having been played, and single iterations by the clock.

**The full ring.** A run needs 12,500 iterations before its ring is full and its sweeps are at their full R. `fill` gets there at once: it
copies the slots that the random start played, lane by lane, over the rest of the ring, with all that was searched of them. So frames are
real ones, episodes end as often as in random play, and the kernels read as many bytes from as many places as in a run. What differs:
frames repeat, and a good agent's episodes are longer. A copy opens as the run did, with frames marked as the first of an episode, so that
no stack reaches into the copy before.
"""

import gc
from time import perf_counter

import torch

from speedyzero import ring as replay
from speedyzero.config import Config
from speedyzero.envs import EnvSpec
from speedyzero.iteration import iteration
from speedyzero.loop import Trainer
from speedyzero.schedule import Phase
from tools.profile import roofline


def start(config: Config, spec: EnvSpec) -> Trainer:
    """A new trainer whose emulators run."""
    trainer = Trainer(config, spec, torch.device(config.device))
    trainer.start()
    return trainer


def step(trainer: Trainer) -> tuple[tuple[Phase, int], float]:
    """The next iteration of a run: its phase and R, as `Trainer` names its graph, and its seconds. Raises what the emulators raise."""
    phase = trainer.phase()
    roots = 0 if phase == "collect" else trainer.roots()
    begin = perf_counter()
    trainer.step(phase)
    seconds = perf_counter() - begin
    trainer.state.turn.check()
    return (phase, roots), seconds


@torch.no_grad()
def fill(trainer: Trainer) -> None:
    """Make the ring full, see above: every slot of every lane holds a copy of one of the slots played so far."""
    ring, played = trainer.state.ring, trainer.slots
    for field in replay.tensors(ring).values():
        if field.dim() < 2:
            continue
        for copy in range(played, ring.slots, played):
            width = min(played, ring.slots - copy)
            field[:, copy : copy + width] = field[:, :width]
    trainer.slots = max(played, ring.slots)
    ring.head.fill_(trainer.slots)


def filled(config: Config, spec: EnvSpec) -> Trainer:
    """A trainer past its random start and its first sweep, whose ring is full."""
    trainer = start(config, spec)
    while trainer.phase() in ("collect", "sweep"):
        step(trainer)
    fill(trainer)
    return trainer


def most_roots(config: Config) -> int:
    """The greatest R with which a run trains; 0 under `sampled`, as in `Trainer`."""
    return max(roots for phase, roots in roofline.recipe(config) if phase == "train")


def once(trainer: Trainer, phase: Phase, roots: int) -> float:
    """One iteration of whatever phase and R, counted nowhere; its seconds. Raises what the emulators raise."""
    begin = perf_counter()
    trainer.run((phase, roots), lambda: iteration(trainer.state, phase, roots))
    seconds = perf_counter() - begin
    trainer.state.turn.check()
    trainer.state.emulators.drain_finished()
    return seconds


def end(trainer: Trainer) -> None:
    """Stop the emulators. The memory goes with the last reference, which is the caller's: see `forget`."""
    trainer.state.emulators.close()


def forget() -> None:
    """Give back the memory of trainers that nobody holds any more."""
    gc.unfreeze()  # a captured trainer froze itself
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
