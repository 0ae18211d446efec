"""The least time that each stage of an iteration, and all of the recipe, can take on a card: counted from the config, nothing is run.

    python -m tools.profile.roofline --preset efficientzero --env Pong-v5
    python -m tools.profile.roofline --preset speedyzero --lanes 64 --refresh-roots 8192    # any flag of python -m speedyzero

Launches, FLOPs and bytes are those of launches.py. The floor is of the convolutions, the products and the library's kernels alone, each
reading its operands and writing its result once: it takes at least its FLOPs at --tflops or its bytes at --tbs, whichever is longer, and
a stage takes them one after the other. Other work could be a part of these and costs nothing here. GB are those of all work as it is
launched. Only several convolutions in one launch can go below this floor; nothing below the FLOPs alone.

The recipe goes through the phases of `schedule`, R growing with the ring, one transition a lane and step (emulators that are reset need a
few more). Acting and joining are the emulators' time, which the device does not wait for: they have no floor here.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import tyro

from speedyzero import schedule
from speedyzero.config import Config, ConfigError
from speedyzero.envs import EnvError
from speedyzero.stages import PARTS, STAGES
from tools.profile.launches import DEPTH, Iterations, Launches, flops, moved, number, summed
from tools.profile.settings import read_config


def recipe(config: Config) -> Counter[tuple[schedule.Phase, int]]:
    """How many iterations of each phase and R a run has."""
    return Counter(schedule.iterations(config))


def inside(name: str, stage: str) -> bool:
    """Whether `stage` is `name` or a part of it: "2.1 observe" belongs to "2 search"."""
    return stage == name or (name in STAGES and stage.startswith(name[0] + "."))


def floor_of(found: Launches, tflops: float, tbs: float) -> float:
    """Seconds at least."""
    return summed(found, lambda launch: launch.floor(tflops, tbs))


def by_stage(found: Launches, tflops: float, tbs: float) -> dict[str, dict[str, float]]:
    """Launches, FLOPs, bytes as launched, and seconds at least, of every stage and part; a stage holds its parts."""
    rows: dict[str, dict[str, float]] = {}
    for name in sorted((*STAGES, *PARTS)):
        mine = Counter({launch: times for launch, times in found.items() if inside(name, launch.stage)})
        if mine:
            rows[name] = {
                "launches": number(mine), "flops": summed(mine, flops), "bytes": summed(mine, moved),
                "seconds": floor_of(mine, tflops, tbs),
            }  # fmt: skip
    return rows


@dataclass
class Arguments:
    """The floor of every stage and of the whole recipe. Takes the flags of `python -m speedyzero` as well."""

    preset: Literal["efficientzero", "speedyzero", "cpu", "smoke"] = "efficientzero"
    """Preset to take the settings from."""
    tflops: float = 790.0
    """TFLOP/s in bf16 that the card reaches; the default was measured on an H200 with other programs."""
    tbs: float = 4.3
    """TB/s that its memory reaches; the default was measured on an H200."""
    depth: float = DEPTH
    """Mean number of nodes that a simulation goes down (d of kernels/README.md)."""


def rows_of(stages: dict[str, dict[str, float]], measured: dict[str, float]) -> list[str]:
    """The table of an iteration, a row a stage; `measured`: seconds of those that were timed."""
    whole = sum(row["seconds"] for name, row in stages.items() if name in STAGES)
    lines = [f"{'stage':18s} {'launches':>9s} {'TFLOP':>9s} {'GB':>9s} {'floor, ms':>10s} {'share':>8s}"
             + (f" {'measured, ms':>14s} {'of the floor':>13s}" if measured else "")]
    for name in sorted({*stages, *measured}):
        row = stages.get(name, dict.fromkeys(("launches", "flops", "bytes", "seconds"), 0.0))
        line = (f"{'  ' * (name in PARTS) + name:18s} {row['launches']:9.0f} {row['flops'] / 1e12:9.4g} {row['bytes'] / 1e9:9.4g} "
                f"{1e3 * row['seconds']:10.4g} {100 * row['seconds'] / whole:6.2f} %")
        if spent := measured.get(name):
            line += f" {1e3 * spent:14.4f} {100 * row['seconds'] / spent:11.2f} %"
        lines.append(line)
    return lines


def main() -> None:
    arguments, rest = tyro.cli(Arguments, prog="roofline", return_unknown_args=True)
    try:
        for name in ("tflops", "tbs", "depth"):
            if not 0 < getattr(arguments, name) < float("inf"):
                raise ConfigError(f"--{name} {getattr(arguments, name)}: must be greater than 0")
        config, spec = read_config(arguments.preset, rest, "roofline", "cuda")
    except (ConfigError, EnvError) as error:
        sys.exit(f"error: {error}")
    most = arguments.tflops, arguments.tbs
    counted, roots = Iterations(config, spec, arguments.depth), config.refresh_roots if config.refresh == "sweep" else 0
    found = counted.iteration("train", roots)
    print(f"{config.env}, preset {config.preset}, {config.search} with {config.simulations} simulations, {config.refresh}: ceilings "
          f"{most[0]:g} TFLOP/s and {most[1]:g} TB/s\none iteration of training, R {roots or 'as sampled'}")
    print("\n".join(rows_of(by_stage(found, *most), {})))
    print(f"an iteration: {summed(found, flops) / 1e12:.3f} TFLOP, at least {1e3 * floor_of(found, *most):.3f} ms\n\n"
          f"the whole recipe: {config.env_steps} steps, {config.total_updates} updates")
    total = {"flops": 0.0, "seconds": 0.0}
    for (phase, roots), iterations in sorted(recipe(config).items()):
        found = counted.iteration(phase, roots)
        mine = {"flops": iterations * summed(found, flops), "seconds": iterations * floor_of(found, *most)}
        total = {name: total[name] + mine[name] for name in total}
        print(f"{phase:8s} R {roots:6d} {iterations:7d} iterations {mine['flops'] / 1e15:10.4g} PFLOP {mine['seconds']:9.4g} s")
    alone = total["flops"] / (1e12 * arguments.tflops)
    print(f"in all {total['flops'] / 1e15:.4g} PFLOP, at least {total['seconds']:.4g} s = {total['seconds'] / 60:.2f} minutes; "
          f"the FLOPs alone {alone:.4g} s = {alone / 60:.2f} minutes")


if __name__ == "__main__":
    main()
