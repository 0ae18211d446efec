"""The settings of the run that a tool looks at: a preset and any flags of `python -m speedyzero`."""

import dataclasses

import tyro

from speedyzero.config import Config, pick_device, preset_config, resolve
from speedyzero.envs import EnvSpec, describe


def read_config(preset: str, rest: list[str], prog: str, device: str | None = None) -> tuple[Config, EnvSpec]:
    """The resolved config of a preset and more flags of python -m speedyzero, for `device` or else the one they name; its environment.

    Raises:
        ConfigError, EnvError: one line each.
    """
    config = tyro.cli(Config, prog=prog, args=rest, default=preset_config(preset))
    config = dataclasses.replace(config, device=device or pick_device(config.device).type)
    spec = describe(config.env, frame_size=config.frame_size, gray=config.gray)
    return resolve(config, image=spec.image, atari=spec.family == "atari"), spec
