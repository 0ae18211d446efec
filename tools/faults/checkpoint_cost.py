"""Cost of a checkpoint as the ring fills: size, pause of the loop, and seconds of writing beside it.

    python -m tools.faults.checkpoint_cost --env Pong-v5 --preset efficientzero

Plays at random until the ring is full, through the loop's own iterations and saving as a run does, every --checkpoint-interval of them. At
the end it saves once more into a new folder, every frame of the ring at once, and loads that. Takes the flags of `python -m speedyzero`.
"""

import dataclasses
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import torch

from speedyzero.__main__ import parse
from speedyzero.config import ConfigError
from speedyzero.envs import EnvError, describe
from speedyzero.loop import Trainer
from speedyzero.run import checkpoint
from speedyzero.run.frames import FrameStore
from speedyzero.run.resume import contents
from speedyzero.run.saver import Saver
from tools.faults.run import size_of


def save(trainer: Trainer, saver: Saver, note: str = "") -> None:
    """Save and wait; print what it cost."""
    saver.save(trainer.iterations, *contents(trainer))
    begin = perf_counter()
    if error := saver.wait():
        raise error
    positions = min(trainer.slots, trainer.config.slots) * trainer.config.lanes
    file, frames = checkpoint.path_of(saver.directory, trainer.iterations), saver.store.directory
    print(f"{positions:10d} {saver.pause:10.3f} {perf_counter() - begin:11.2f} {size_of(file) / 1e6:10.1f} {size_of(frames) / 1e6:11.1f}  "
          f"{note}", flush=True)  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            config, device = parse([*sys.argv[1:], "--run-dir", f"{folder}/run"])[:2]
            spec = describe(config.env, frame_size=config.frame_size, gray=config.gray)
        except (ConfigError, EnvError) as error:
            sys.exit(f"error: {error}")
        # Nothing but random play: the bounds between the flags are those of a run that trains.
        config = dataclasses.replace(config, start_transitions=10**9, env_steps=10**9)
        torch.set_num_threads(config.threads)
        trainer = Trainer(config, spec, device)
        trainer.start()
        saver = Saver(Path(folder) / "run", config.keep, FrameStore(Path(folder) / "run" / "frames"), config.checkpoint_interval)
        print(f"{config.env}, preset {config.preset}: {config.lanes} lanes, ring of {config.ring_positions}")
        print(f"{'positions':>10s} {'pause, s':>10s} {'written, s':>11s} {'file, MB':>10s} {'frames, MB':>11s}")
        while trainer.slots < config.slots:
            trainer.step("collect")
            if trainer.slots % config.checkpoint_interval == 0 or trainer.slots == config.slots:
                save(trainer, saver)
        saver.close()
        once = Saver(Path(folder) / "once", 1, FrameStore(Path(folder) / "once" / "frames"), 0)
        save(trainer, once, "all frames at once")
        once.close()
        begin = perf_counter()
        checkpoint.load(checkpoint.latest(once.directory))
        once.store.read(trainer.state.ring.frames, trainer.slots)
        print(f"read back in {perf_counter() - begin:.2f} s; the frames as they lie in the ring are "
              f"{trainer.state.ring.frames.nbytes / 1e6:.0f} MB")  # fmt: skip


if __name__ == "__main__":
    main()
