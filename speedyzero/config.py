"""`Config`: all settings of a run as one flat object, what fills and checks it, and its form in a file."""

from __future__ import annotations

import dataclasses
import json
import reprlib
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from speedyzero import settings
from speedyzero.envs import FRAME_SIZE, frame_fault, sticky_fault
from speedyzero.presets import PRESETS
from speedyzero.processor import has_fast_bf16, usable_cores
from speedyzero.search import LEAST_RANGE

# Steps of the longest game of an evaluation: Atari's 108k frames.
LONGEST_GAME = 27_000
# Fields that the config.json of an older run lacks; their defaults are what such a run did.
NEWER = {"priority_refresh", "sticky_actions", "track", "wandb_project_name", "wandb_entity"}
# What config.json says beside the settings: the software that wrote it. Reading passes over it.
SOFTWARE = "speedyzero"


def short_repr(value: object) -> str:
    """A value that a file holds, for a message: on one line, printable, and short however long or deep it is."""
    plain = isinstance(value, str) and value.isprintable() and 0 < len(value) <= 80
    return value if plain else reprlib.repr(value)


class ConfigError(ValueError):
    """A setting that cannot work; the message is one line that names the flag and the remedy."""


@dataclass(frozen=True)
class Config(
    settings.RecordSettings, settings.NetworkSettings, settings.LearnSettings, settings.RefreshSettings, settings.SearchSettings,
    settings.RingSettings, settings.EmulatorSettings, settings.RunSettings,
):  # fmt: skip
    """All settings of a run. What uses those of one group alone asks for the group."""

    @property
    def planned_updates(self) -> int:
        """Updates that go with all environment steps: the horizon of every schedule."""
        return self.env_steps * self.updates_per_iteration // self.lanes

    @property
    def total_updates(self) -> int:
        """Updates after which the run ends."""
        return self.planned_updates + self.final_updates

    @property
    def slots(self) -> int:
        """Slots of a lane of the ring (T)."""
        return -(-self.ring_positions // self.lanes)

    @property
    def window(self) -> int:
        """Slots that the targets of one sampled position read: K + n + 1."""
        return self.unroll + self.n_step + 1

    def to_json(self) -> dict:
        """All fields as plain JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))


def fits(value: object, expected: object) -> bool:
    """Whether a JSON value is of a field's type; a whole number that a float holds is one too, a bool is no number."""
    origin, inner = typing.get_origin(expected), typing.get_args(expected)
    if origin is Literal:
        return value in inner and isinstance(value, str)
    if origin is tuple:
        return isinstance(value, list) and len(value) == len(inner) and all(map(fits, value, inner))
    if inner:
        return any(fits(value, choice) for choice in inner)
    if expected is float:
        return type(value) is float or (type(value) is int and abs(value) <= 2**53)
    return type(value) is (str if expected is Path else expected)


def from_json(fields: object, source: Path) -> Config:
    """A `Config` from what `to_json` gave, or from a config.json, which has more to it.

    Raises:
        ConfigError: a field that is unknown, missing or of the wrong type; the line names `source`.
    """
    remedy = "start a new run in another --run-dir"
    names = {field.name for field in dataclasses.fields(Config)}
    if isinstance(fields, dict):
        older = {field.name: field.default for field in dataclasses.fields(Config) if field.name in NEWER}
        fields = older | {name: value for name, value in fields.items() if name != SOFTWARE}
    if not isinstance(fields, dict) or set(fields) != names:
        odd = sorted(set(fields) ^ names) if isinstance(fields, dict) else ["not an object"]
        said = ", ".join(map(short_repr, odd[:5])) + (f" and {len(odd) - 5} more" if len(odd) > 5 else "")
        raise ConfigError(f"{source}: not a config of this version of speedyzero ({said}); {remedy}")
    return Config(**settings_from_json(fields, source, remedy))


def settings_from_json(fields: dict[str, object], source: Path | str, remedy: str) -> dict[str, object]:
    """The values of some settings, as `Config` takes them, from JSON values. All names are settings.

    Raises:
        ConfigError: a value of the wrong type; the line names `source` and ends with `remedy`.
    """
    types = typing.get_type_hints(Config)
    values = {}
    for name, value in fields.items():
        if not fits(value, types[name]):
            raise ConfigError(f"{source}: {name} is {reprlib.repr(value)}; {remedy}")
        if types[name] in (float, float | None) and value is not None:
            value = float(value)
        elif isinstance(value, list):
            value = tuple(map(float, value))
        elif name == "run_dir" and value is not None:
            value = Path(value)
        values[name] = value
    return values


def pick_device(device: str) -> torch.device:
    """The device that `--device` names.

    Raises:
        ConfigError: `cuda` where PyTorch sees no CUDA device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch finds no CUDA device here; use --device cpu or install a CUDA build of torch")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def pick_preset(preset: str, device: torch.device, atari: bool) -> str:
    """The preset that `auto` stands for on a device and a family of environments; others stand for themselves."""
    if preset != "auto":
        return preset
    if device.type == "cuda":
        return "efficientzero"
    return "cpu-atari" if atari else "cpu"


def preset_config(preset: str) -> Config:
    """The defaults of a preset."""
    return Config(preset=preset, **PRESETS[preset])


def resolve(config: Config, *, image: bool, atari: bool) -> Config:
    """Fill what depends on the environment or on other flags, and check that the flags go together.

    Raises:
        ConfigError: an impossible value or combination; the line names the flags.
    """
    if fault := frame_fault(config.env, atari, config.frame_size, config.gray):
        raise ConfigError(fault)
    if fault := sticky_fault(config.env, atari, config.sticky_actions):
        raise ConfigError(fault)
    if config.normalize_frames and not image:
        raise ConfigError(f"--normalize-frames True: {config.env} shows no pixels; leave it out")
    heavy = config.preset == "cpu-atari"
    fill = {
        "simulations": 50 if config.search == "puct" else 16,
        "frame_size": FRAME_SIZE if atari else None,
        "gray": False if atari else None,
        "value_delta_min": LEAST_RANGE[config.search],
        "frame_stack": 4 if image else 1,
        "clip_reward": atari,
        "augment": image,
        "amp": config.device == "cuda" or (heavy and has_fast_bf16()),
        "threads": usable_cores() if heavy else 1,
        "run_dir": Path("runs") / f"{config.env.replace('/', '_')}_{config.preset}_seed{config.seed}",
        "eval_max_steps": config.max_episode_steps or LONGEST_GAME,
    }
    config = dataclasses.replace(config, **{name: value for name, value in fill.items() if getattr(config, name) is None})
    check(config)
    return config


def _ranges() -> dict[str, settings.Range]:
    """The range of every setting that has one."""

    def find(kind: object) -> settings.Range | None:
        own = [extra for extra in getattr(kind, "__metadata__", ()) if isinstance(extra, settings.Range)]
        return next(filter(None, own + [find(inner) for inner in typing.get_args(kind)]), None)

    hints = typing.get_type_hints(Config, include_extras=True)
    return {name: bounds for name, kind in hints.items() if (bounds := find(kind))}


def check(config: Config) -> None:
    """Raise ConfigError on the first impossible value or combination of a resolved config; ranges are in `settings`."""

    def flag(name: str) -> str:
        return "--" + name.replace("_", "-")

    depends = "simulations value_delta_min frame_stack clip_reward augment amp threads run_dir eval_max_steps"
    for name in depends.split():
        if getattr(config, name) is None:
            raise ConfigError(f"{flag(name)}: is not set, though it depends on the environment alone")
    for name, bounds in _ranges().items():
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and (fault := bounds.fault(number)):
                raise ConfigError(f"{flag(name)} {reprlib.repr(value)}: {fault}")
    if short_repr(config.env) is not config.env:
        raise ConfigError(f"--env {short_repr(config.env)}: not an EnvPool id")
    # Whether it is an Atari game is not known here: `describe` refuses them for others.
    if fault := frame_fault(config.env, True, config.frame_size, config.gray) or sticky_fault(config.env, True, config.sticky_actions):
        raise ConfigError(fault)
    if config.graph in ("on", "split") and config.device != "cuda":
        raise ConfigError(f"--graph {config.graph}: there are no CUDA graphs on --device {config.device}; leave it out")
    if config.batch_size < 2:
        raise ConfigError("--batch-size 1: BatchNorm needs at least 2")
    if config.projection < 2:
        raise ConfigError("--projection 1: its predictor is half as wide; must be at least 2")
    if config.start_transitions >= config.env_steps:
        raise ConfigError(f"--start-transitions {config.start_transitions}: must be below --env-steps {config.env_steps}")
    if config.ring_positions <= config.start_transitions:
        raise ConfigError(
            f"--ring-positions {config.ring_positions}: must exceed --start-transitions {config.start_transitions}, or the ring "
            "forgets the start before training begins"
        )
    needed = config.lanes * (config.window + config.frame_stack + 1)
    if config.start_transitions < needed:
        raise ConfigError(
            f"--start-transitions {config.start_transitions}: {config.lanes} lanes need {needed} for one window of "
            f"--unroll {config.unroll} and --n-step {config.n_step} in each; raise it or take fewer --lanes"
        )
    if config.refresh_values > config.start_transitions - config.lanes:
        raise ConfigError(
            f"--refresh-values {config.refresh_values}: must be at most --start-transitions less --lanes, "
            f"{config.start_transitions - config.lanes}, or a sweep meets a position twice"
        )
    if config.refresh == "sweep":
        if config.refresh_roots % 8:
            raise ConfigError(f"--refresh-roots {config.refresh_roots}: must be a multiple of 8")
        if config.refresh_roots // 8 > config.start_transitions - config.lanes or 4 * config.refresh_roots > config.ring_positions:
            raise ConfigError(
                f"--refresh-roots {config.refresh_roots}: must be at most a quarter of --ring-positions {config.ring_positions} and an "
                f"eighth of it at most --start-transitions less --lanes, {config.start_transitions - config.lanes}, or a sweep meets a "
                "position twice"
            )
