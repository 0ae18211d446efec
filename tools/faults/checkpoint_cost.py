"""Cost of a checkpoint as the ring fills: size, pause of the loop, and seconds of writing beside it.

    python -m tools.faults.checkpoint_cost --env Pong-v5 --preset efficientzero --json costs.json

Plays at random until the ring is full, through the loop's own iterations and saving as a run does, every --checkpoint-interval of them. At
the end it saves once more into a new folder, every frame of the ring at once, and loads that. Takes the flags of `python -m speedyzero`.
"""

import dataclasses
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Literal

import torch
import tyro

from speedyzero.config import ConfigError
from speedyzero.envs import EnvError
from speedyzero.loop import Trainer
from speedyzero.run import checkpoint
from speedyzero.run.frames import FrameStore
from speedyzero.run.resume import contents
from speedyzero.run.saver import Saver
from tools.faults.run import size_of
from tools.profile.roofline import read_config


@dataclass
class Arguments:
    """Size and pause of checkpoints. Takes the flags of `python -m speedyzero` as well."""

    preset: Literal["efficientzero", "speedyzero", "cpu", "smoke"] = "efficientzero"
    """Preset to take the settings from."""
    json: Path | None = None
    """Also write the rows to this file."""


def save(trainer: Trainer, saver: Saver) -> dict[str, float]:
    """Save and wait: what it cost."""
    saver.save(trainer.iterations, *contents(trainer))
    begin = perf_counter()
    if error := saver.wait():
        raise error
    return {
        "positions": min(trainer.slots, trainer.config.slots) * trainer.config.lanes,
        "pause_s": saver.pause,
        "written_s": perf_counter() - begin,
        "file_mb": size_of(checkpoint.path_of(saver.directory, trainer.iterations)) / 1e6,
        "frames_mb": size_of(saver.store.directory) / 1e6,
    }


def main() -> None:
    arguments, rest = tyro.cli(Arguments, prog="checkpoint_cost", return_unknown_args=True)
    try:
        config, spec = read_config(arguments.preset, rest, "checkpoint_cost")
    except (ConfigError, EnvError) as error:
        sys.exit(f"error: {error}")
    # Nothing but random play: the bounds between the flags are those of a run that trains.
    config = dataclasses.replace(config, start_transitions=10**9, env_steps=10**9)
    torch.set_num_threads(config.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, spec, torch.device(config.device))
        trainer.start()
        saver = Saver(Path(folder) / "run", config.keep, FrameStore(Path(folder) / "run" / "frames"), config.checkpoint_interval)
        print(f"{config.env}, preset {config.preset}: {config.lanes} lanes, ring of {config.ring_positions}")
        print(f"{'positions':>10s} {'pause, s':>10s} {'written, s':>11s} {'file, MB':>10s} {'frames, MB':>11s}")

        def report(row: dict[str, float], note: str = "") -> None:
            rows.append(row | {"note": note})
            print(f"{row['positions']:10d} {row['pause_s']:10.3f} {row['written_s']:11.2f} {row['file_mb']:10.1f} "
                  f"{row['frames_mb']:11.1f}  {note}", flush=True)

        while trainer.slots < config.slots:
            trainer.step("collect")
            if trainer.slots % config.checkpoint_interval == 0 or trainer.slots == config.slots:
                report(save(trainer, saver))
        saver.close()
        whole = Saver(Path(folder) / "whole", 1, FrameStore(Path(folder) / "whole" / "frames"), 0)
        report(save(trainer, whole), "all frames at once")
        whole.close()
        begin = perf_counter()
        tensors, _ = checkpoint.load(checkpoint.latest(whole.directory))
        whole.store.read(trainer.state.ring.frames, trainer.slots)
        rows.append({"read_s": perf_counter() - begin, "tensors": len(tensors)})
        print(f"read back in {rows[-1]['read_s']:.2f} s; the frames as they lie in the ring are "
              f"{trainer.state.ring.frames.nbytes / 1e6:.0f} MB")
    if arguments.json:
        arguments.json.write_text(json.dumps({"config": config.to_json(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
