"""Where the time of a training iteration goes, on the CPU: the share of each part, by a clock around its functions.

    python tools/profile/shares.py --env Catch-v0 --preset cpu --iterations 100

A part's time is exclusive: what it calls of another part counts there. `emulators` is the time that the trainer waits for them; they
work in threads of their own while it learns.
"""

import dataclasses
import sys
from collections import defaultdict
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

import torch
import tyro

from speedyzero import act, batch, iteration, learn, optim, refresh, ring
from speedyzero.config import Config, preset_config, resolve
from speedyzero.envs import Emulators, EnvError, describe
from speedyzero.loop import Trainer
from speedyzero.nets import Network
from speedyzero_kernels import backup, root, select, tree

PARTS = {
    "network, search": [(Network, "represent"), (Network, "predict"), (Network, "model_step")],
    "network, learning": [(learn, "losses"), (torch.Tensor, "backward")],
    "tree": [(root, "root_prior"), (tree, "allocate"), (tree, "plant"), (select, "select_puct"), (select, "select_gumbel"),
             (select, "completed_q"), (backup, "expand_and_backup")],
    "search, states of the nodes": [(act, "search")],
    "gather and targets": [(iteration, "observations"), (learn, "gather_batch")],
    "sampling": [(batch, "draw"), (ring, "eligible")],
    "refresh": [(refresh, "sweep"), (refresh, "windows"), (refresh, "write"), (refresh, "refresh_priorities")],
    "optimiser": [(optim.SGD, "step"), (optim.SGD, "zero_grad"), (optim.ClippedLARS, "step"), (optim.ClippedLARS, "zero_grad")],
    "acting and noise": [(act, "choose"), (act, "root_noise")],
    "emulators": [(Emulators, "send"), (Emulators, "recv")],
    "ingest": [(ring, "ingest")],
}  # fmt: skip


class Clock:
    """Exclusive time by part, for nested calls."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._stack: list[str] = ["other"]
        self._since = perf_counter()

    def _switch(self) -> None:
        now = perf_counter()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    def around(self, part: str, function):
        """`function`, its time counted for `part`."""

        def timed(*args, **kwargs):
            self._switch()
            # The network is called by the learning losses too; there it is a part of learning.
            self._stack.append("network, learning" if part.startswith("network") and "network, learning" in self._stack else part)
            try:
                return function(*args, **kwargs)
            finally:
                self._switch()
                self._stack.pop()

        return timed

    def start(self) -> None:
        """Forget what was measured so far."""
        self.seconds.clear()
        self._since = perf_counter()

    def stop(self) -> dict[str, float]:
        """Seconds by part since `start`."""
        self._switch()
        return dict(self.seconds)


@dataclass
class Arguments:
    """Print the share of each part of a training iteration."""

    env: str = "Catch-v0"
    """EnvPool id."""
    preset: Literal["efficientzero", "speedyzero", "cpu", "smoke"] = "cpu"
    """Preset to take the settings from."""
    iterations: int = 100
    """Training iterations to measure."""
    search: Literal["puct", "gumbel"] = "puct"
    """Tree search."""
    refresh: Literal["sweep", "sampled"] = "sweep"
    """Positions searched anew."""


def main() -> None:
    arguments = tyro.cli(Arguments)
    config: Config = dataclasses.replace(
        preset_config(arguments.preset), env=arguments.env, search=arguments.search, refresh=arguments.refresh
    )
    try:
        spec = describe(config.env, frame_size=config.frame_size, gray=config.gray)
    except EnvError as error:
        sys.exit(f"error: {error}")
    config = resolve(config, image=spec.image, atari=spec.family == "atari")
    torch.set_num_threads(config.threads)
    clock = Clock()
    for part, functions in PARTS.items():
        for owner, name in functions:
            setattr(owner, name, clock.around(part, getattr(owner, name)))

    trainer = Trainer(config, spec, torch.device("cpu"))
    trainer.start()
    while trainer.phase() != "train":
        trainer.step(trainer.phase())
    for _ in range(5):
        trainer.step("train")
    clock.start()
    for _ in range(arguments.iterations):
        trainer.step("train")
    seconds = clock.stop()
    whole = sum(seconds.values())
    sampled = config.updates_per_iteration * config.batch_size * config.window
    roots = trainer.roots() or sampled
    print(f"{arguments.env}, preset {arguments.preset}, {arguments.search}, {arguments.refresh}: {roots} replayed and "
          f"{config.lanes} live roots, {config.simulations} simulations, {1e3 * whole / arguments.iterations:.1f} ms an iteration")
    for part, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"{part:28s} {100 * spent / whole:5.1f} %  {1e3 * spent / arguments.iterations:7.2f} ms")


if __name__ == "__main__":
    main()
