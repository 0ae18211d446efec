"""`python -m speedyzero`: read the command line, start or resume a run."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import sys
import time
import typing
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import tyro

from speedyzero import schedule, settings
from speedyzero.config import Config, ConfigError, check, pick_device, pick_preset, preset_config, resolve
from speedyzero.config_file import read_settings
from speedyzero.envs import EnvError, describe
from speedyzero.graph import GraphError
from speedyzero.processor import before_cuda, prepare
from speedyzero.ranks import RanksError, check_shares, join
from speedyzero.run.checkpoint import CheckpointError
from speedyzero.run.directory import is_of_this_torchrun, vacant
from speedyzero.run.health import NonFiniteError
from speedyzero.run.track import find_wandb
from speedyzero.run.trained import read_config
from speedyzero.software import software
from speedyzero.torchrun import end_with_torchrun, is_first

# What a resumed run may change: nothing that the numbers depend on. Besides, --env-steps may grow.
FREE_ON_RESUME = {
    "run_dir", "resume", "env_threads", "eval_episodes", "eval_max_steps", "log_interval", "checkpoint_interval", "graph", "watchdog",
    "keep", "checkpoint_ring", "max_skipped", "track", "wandb_project_name", "wandb_entity",
}  # fmt: skip

SAME_ERROR_S = 2.0
"""How long the other ranks wait with an error: torchrun ends them before, if rank 0 has the same."""
MADE_FOR_A_GPU = {"efficientzero", "speedyzero"}
SAMPLE_FLOPS, ROOT_FLOPS, SIMULATION_FLOPS = 2.86e9, 304.6e6, 18.13e6
"""Of these presets' network on 96x96 RGB, as tools.profile.launches counts them: to learn from a window, to see a root, to simulate."""
CORE_FLOPS = 100e9
"""FLOP/s in fp32 that a core of a server reaches in large products, about: 32 in a cycle (two fused multiply-adds of 8 lanes) at 3 GHz."""


@dataclass(frozen=True)
class CommandLine:
    """Train an EfficientZero agent. All flags can be given on top of a preset; the defaults shown are those of this --env and --preset."""

    run: settings.RunSettings
    emulators: settings.EmulatorSettings
    ring: settings.RingSettings
    search: settings.SearchSettings
    refresh: settings.RefreshSettings
    learn: settings.LearnSettings
    network: settings.NetworkSettings
    records: settings.RecordSettings
    config: Path | None = None
    """A run's config.json, or part of one: its settings, and its preset, are the defaults of all other flags. Its folder, device, threads
    and graph are not taken."""
    dry_run: bool = False
    """Print what memory the run would take, and start nothing."""


def _parse_flags(arguments: list[str], default: Config) -> tuple[Config, bool]:
    """The flags on top of a default, and whether it is a dry run. Leaves with tyro's message on unknown ones."""
    groups = {name: kind for name, kind in typing.get_type_hints(CommandLine).items() if dataclasses.is_dataclass(kind)}

    def fields(values: object, kind: type) -> dict[str, object]:
        return {field.name: getattr(values, field.name) for field in dataclasses.fields(kind)}

    grouped = CommandLine(**{name: kind(**fields(default, kind)) for name, kind in groups.items()})
    given = tyro.cli(tyro.conf.OmitArgPrefixes[CommandLine], prog="python -m speedyzero", args=arguments, default=grouped)
    values = [fields(getattr(given, name), kind) for name, kind in groups.items()]
    return Config(**{name: value for group in values for name, value in group.items()}), given.dry_run


def _first_look(arguments: list[str]) -> argparse.Namespace:
    """The few flags that decide the defaults of the others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--preset", "--device", "--env", "--config"):
        parser.add_argument(flag)
    known, _ = parser.parse_known_args(arguments)
    return known


def _plays_atari(env_id: str) -> bool:
    """Whether an environment is one of Atari's; False if there is none of that name, which `describe` says later."""
    try:
        return describe(env_id).family == "atari"
    except EnvError:
        return False


def parse(arguments: list[str], say: Callable[[str], None] = print) -> tuple[Config, torch.device, bool]:
    """The config of a new run or of the run to go on with, its device, and whether it is a dry run. tyro refuses unknown flags.

    say: gets a line about each thing that a user may not expect of it; on the first rank alone.

    Raises:
        ConfigError, EnvError: one line each.
    """
    look = _first_look(arguments)
    device = pick_device(look.device if look.device in ("cpu", "cuda") else "auto")
    file = read_settings(Path(look.config)) if look.config else {}
    preset = look.preset or file.get("preset", "auto")
    try:
        default = preset_config(pick_preset(preset, device, _plays_atari(look.env or file.get("env", Config.env))))
    except KeyError:
        default = Config()  # tyro names the presets there are
    default = dataclasses.replace(default, **file | {"preset": default.preset})
    config, dry_run = _parse_flags(arguments, default)
    config = dataclasses.replace(config, preset=default.preset, device=device.type)
    if config.resume or is_of_this_torchrun(_run_dir(config)):
        if look.config and config.resume:
            raise ConfigError(f"--config {look.config}: a run that is resumed has settings of its own; leave it out")
        config = _resumed(config, arguments, say)
        return config, pick_device(config.device), dry_run
    spec = describe(config.env, frame_size=config.frame_size, gray=config.gray)
    try:
        config = resolve(config, image=spec.image, atari=spec.family == "atari")
    except ConfigError as error:
        raise ConfigError(f"{error} (with the settings of --config {look.config})" if look.config else str(error)) from None
    if not dry_run and not vacant(config.run_dir):
        raise ConfigError(f"--run-dir {config.run_dir}: exists already; go on with it by --resume, or give another folder")
    if preset == "auto" and device.type == "cpu" and is_first():
        say(f"preset {config.preset}, since there is no CUDA device in use: a smaller network and search than efficientzero's")
    if config.preset in MADE_FOR_A_GPU and device.type == "cpu" and is_first():
        say(_duration_on_a_cpu(config))
    return config, device, dry_run


def _duration_on_a_cpu(config: Config) -> str:
    """The line that says how long a run of a GPU's preset, with its network, takes on a CPU at the least."""
    flops = config.total_updates * config.batch_size * SAMPLE_FLOPS
    for (phase, roots), times in Counter(schedule.iterations(config)).items():
        if config.refresh == "sampled":
            roots = schedule.search_roots(config)["learn"]
        searched = 0 if phase == "collect" else roots + config.lanes * (phase == "train")
        flops += times * searched * (ROOT_FLOPS + config.simulations * SIMULATION_FLOPS)
    days = flops / (CORE_FLOPS * config.threads) / 86_400
    cores = "a core" if config.threads == 1 else f"{config.threads} cores"
    return (
        f"warning: --preset {config.preset} is made for a GPU: {flops / 1e15:.3g} PFLOP, at least {days:.2g} days on {cores} of "
        f"{CORE_FLOPS / 1e9:.0f} GFLOP/s; cpu-atari and cpu are made for a CPU"
    )


def _run_dir(config: Config) -> Path:
    """The folder of a config's run, given or by default."""
    return config.run_dir or resolve(config, image=True, atari=True).run_dir


def _resumed(config: Config, arguments: list[str], say: Callable[[str], None]) -> Config:
    """The config of the run to go on with; refuses flags that would make it another run."""
    run_dir = _run_dir(config)
    saved = dataclasses.replace(read_config(run_dir), run_dir=run_dir, resume=True)
    asked, _ = _parse_flags(arguments, saved)
    if any(argument.partition("=")[0] == "--preset" for argument in arguments):
        asked = dataclasses.replace(asked, preset=config.preset)
    if asked.device == "auto":
        asked = dataclasses.replace(asked, device=config.device)
    for field in dataclasses.fields(Config):
        mine, theirs = getattr(asked, field.name), getattr(saved, field.name)
        if field.name == "env_steps" and mine > theirs:
            if is_first():
                say(f"--env-steps {mine}: extends the run from {theirs} steps; all schedules follow the new horizon from here on")
        elif mine != theirs and field.name not in FREE_ON_RESUME:
            flag = "--" + field.name.replace("_", "-")
            raise ConfigError(
                f"{flag} {mine}: the run in {run_dir} was made with {theirs}; leave the flag out or start a new run with another --run-dir"
            )
    check(asked)
    return asked


def _settings(config: Config) -> dict[str, object]:
    """What all ranks of a run must have alike, by flag or name of a software."""
    fields = {"--" + name.replace("_", "-"): value for name, value in config.to_json().items() if name not in ("threads", "env_threads")}
    versions = {f"speedyzero's {name}": value for name, value in software().items()}
    return fields | versions | {"torch": torch.__version__, "envpool": version("envpool")}


def _print_memory(config: Config, device: torch.device) -> None:
    """Print what a run would allocate, and start nothing.

    Raises:
        ConfigError: it would not fit.
    """
    from speedyzero import memory  # late, as the loop is

    spec = describe(config.env, frame_size=config.frame_size, gray=config.gray)
    print(memory.table(memory.plan(config, spec, device.type)))
    memory.check_memory(config, spec, device)


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    end_with_torchrun()
    before_cuda()
    notes: list[str] = []
    try:
        config, device, dry_run = parse(arguments, notes.append)
        if config.track and is_first():
            find_wandb()  # before anything that takes time
        if dry_run:
            if is_first():
                print(*notes, sep="\n", end="\n" * bool(notes))
                _print_memory(config, device)
            return
        ranks = join(device, config.watchdog)
        if ranks.size > 1:
            ranks.check_started_alike(_settings(config))
        check_shares(config, ranks.size)
        prepare(config.threads)
        from speedyzero.loop import train  # late: --help and bad flags need no emulators

        ended_by = train(config, describe(config.env, frame_size=config.frame_size, gray=config.gray), device, ranks, notes)
    except RanksError as error:
        sys.exit(f"error: {error}" if str(error) else 1)  # empty: another rank says it
    except (ConfigError, EnvError, CheckpointError, GraphError, NonFiniteError) as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:  # as a shell reports a program that writes where nobody reads: `--help | head`
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        sys.exit(f"error: --run-dir: {error.strerror or error} ({error.filename}); make it writable, make room, or give another folder")
    except KeyboardInterrupt:
        ended_by = signal.SIGINT
    # As a shell reports a program that a signal ended: 130 for Ctrl-C, 143 for SIGTERM, 138 for SIGUSR1, 129 for SIGHUP.
    sys.exit(128 + ended_by if ended_by else 0)


def run() -> None:
    """The program: `main`, and then the process ends at once.

    Taking the interpreter apart saves nothing and takes seconds, which a run that a signal stops may not have.
    """
    code: int | str | None = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    if isinstance(code, str):
        if not is_first():
            time.sleep(SAME_ERROR_S)
        print(code, file=sys.stderr)
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    run()
