"""The least time that each stage of an iteration, and all of the recipe, can take on a card: counted from the config, nothing is run.

    python -m tools.profile.roofline --preset efficientzero --env Pong-v5
    python -m tools.profile.roofline --preset speedyzero --lanes 64 --refresh-roots 8192    # any flag of python -m speedyzero
    python -m tools.profile.roofline --measured stages.json                                 # of trace.py: share of the floor by stage

Launches, FLOPs and bytes are those of launches.py. The floor is of the convolutions, the products and the library's kernels alone, each
reading its operands and writing its result once: it takes at least its FLOPs at --tflops or its bytes at --tbs, whichever is longer, and
a stage takes them one after the other. Other work could be a part of these and costs nothing here. GB are those of all work as it is
launched. Only several convolutions in one launch can go below this floor; nothing below the FLOPs alone.

The recipe goes through the phases of `schedule`, R growing with the ring, one transition a lane and step (emulators that are reset need a
few more). Acting and joining are the emulators' time, which the device does not wait for: they have no floor here.
"""

import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from speedyzero import schedule
from speedyzero.config import Config, ConfigError, from_json
from speedyzero.envs import EnvError, EnvSpec, describe
from speedyzero.stages import PARTS, STAGES
from tools.profile.launches import DEPTH, Iterations, Launches, number, summed
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
                "launches": number(mine), "flops": summed(mine, lambda launch: launch.flops),
                "bytes": summed(mine, lambda launch: launch.moved), "seconds": floor_of(mine, tflops, tbs),
            }  # fmt: skip
    return rows


def read_trace(path: Path) -> dict:
    """A file that trace.py wrote with --json. Raises ConfigError if it is not one, or has stages that are not of this version."""
    try:
        trace = json.loads(path.read_text())
        for name in ("config", "phase", "roots", "device", "seconds"):
            trace[name]
        for name, row in trace["stages"].items():
            row["cpu_total"], row["device_total"]
            if name not in (*STAGES, *PARTS):
                raise KeyError(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"--measured {path}: is not a file that trace.py wrote with --json ({type(error).__name__}: {error})") from None
    return trace


@dataclass
class Arguments:
    """The floor of every stage and of the whole recipe. Takes the flags of `python -m speedyzero` as well."""

    preset: Literal["efficientzero", "speedyzero", "cpu", "smoke"] | None = None
    """Preset to take the settings from; default: efficientzero."""
    tflops: float = 790.0
    """TFLOP/s in bf16 that the card reaches; the default was measured on an H200 (DESIGN.md, section 5)."""
    tbs: float = 4.3
    """TB/s that its memory reaches; the default was measured on an H200."""
    depth: float = DEPTH
    """Mean number of nodes that a simulation goes down (d of kernels/README.md)."""
    measured: Path | None = None
    """What trace.py wrote with --json: its config and its R are taken, and its times compared with their floors."""
    json: Path | None = None
    """Also write everything as JSON to this file."""


def rows_of(stages: dict[str, dict[str, float]], measured: dict | None) -> list[str]:
    """The table of an iteration, a row a stage."""
    whole = sum(row["seconds"] for name, row in stages.items() if name in STAGES)
    clock = "device_total" if measured and measured["device"] != "cpu" else "cpu_total"
    title = f"{'stage':18s} {'launches':>9s} {'TFLOP':>9s} {'GB':>9s} {'floor, ms':>10s} {'share':>8s}"
    lines = [title + (f" {'measured, ms':>14s} {'of the floor':>13s}" if measured else "")]
    for name in sorted({*stages, *(measured["stages"] if measured else {})}):
        row = stages.get(name, dict.fromkeys(("launches", "flops", "bytes", "seconds"), 0.0))
        line = (f"{'  ' * (name in PARTS) + name:18s} {row['launches']:9.0f} {row['flops'] / 1e12:9.4g} {row['bytes'] / 1e9:9.4g} "
                f"{1e3 * row['seconds']:10.4g} {100 * row['seconds'] / whole:6.2f} %")
        if measured:
            spent = measured["stages"].get(name, {}).get(clock)
            share = f"{100 * row['seconds'] / spent:11.2f} %" if spent else "-"
            line += f" {1e3 * spent:14.4f} {share:>13s}" if spent is not None else f" {'-':>14s} {'-':>13s}"
        lines.append(line)
    return lines


def main() -> None:
    prog = "roofline"
    arguments, rest = tyro.cli(Arguments, prog=prog, return_unknown_args=True)
    measured = None
    try:
        for name in ("tflops", "tbs", "depth"):
            if not 0 < getattr(arguments, name) < float("inf"):
                raise ConfigError(f"--{name} {getattr(arguments, name)}: must be greater than 0")
        if arguments.measured is None:
            config, spec = read_config(arguments.preset or "efficientzero", rest, prog, "cuda")
        elif rest or arguments.preset:
            raise ConfigError(f"{(rest or ['--preset'])[0]}: --measured brings the settings of its run; leave the flag out")
        else:
            measured = read_trace(arguments.measured)
            config = from_json(measured["config"], arguments.measured)
            spec = describe(config.env, frame_size=config.frame_size, gray=config.gray)
        facts = report(arguments, config, spec, measured)
        if arguments.json:
            arguments.json.write_text(json.dumps(facts, indent=1))
    except (ConfigError, EnvError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: --json {arguments.json}: {error.strerror}; give another file")


def report(arguments: Arguments, config: Config, spec: EnvSpec, measured: dict | None) -> dict:
    """Print the tables; returns what is in them, for JSON."""
    most = arguments.tflops, arguments.tbs
    counted = Iterations(config, spec, arguments.depth)
    phase, roots = "train", config.refresh_roots if config.refresh == "sweep" else 0
    if measured:
        phase, roots = measured["phase"], measured["roots"]
    found = counted.iteration(phase, roots)
    stages, floor = by_stage(found, *most), floor_of(found, *most)
    print(f"{config.env}, preset {config.preset}, {config.search} with {config.simulations} simulations, {config.refresh}: ceilings "
          f"{most[0]:g} TFLOP/s and {most[1]:g} TB/s")
    print(f"one iteration, phase {phase}, R {roots or 'as sampled'}" + (f", measured on {measured['device']}" if measured else ""))
    print("\n".join(rows_of(stages, measured)))
    print(f"an iteration: {summed(found, lambda launch: launch.flops) / 1e12:.3f} TFLOP, at least {1e3 * floor:.3f} ms")
    if measured:
        print(f"measured {1e3 * measured['seconds']:.3f} ms; the floor is {100 * floor / measured['seconds']:.2f} % of that")

    phases = []
    for (name, replayed), iterations in sorted(recipe(config).items()):
        found = counted.iteration(name, replayed)
        phases.append({
            "phase": name, "roots": replayed, "iterations": iterations, "flops": iterations * summed(found, lambda launch: launch.flops),
            "seconds": iterations * floor_of(found, *most),
        })  # fmt: skip
    total = {key: sum(row[key] for row in phases) for key in ("iterations", "flops", "seconds")}
    print(f"\nthe whole recipe: {config.env_steps} steps, {config.total_updates} updates")
    for row in phases:
        print(f"{row['phase']:8s} R {row['roots']:6d} {row['iterations']:7d} iterations {row['flops'] / 1e15:10.4g} PFLOP "
              f"{row['seconds']:9.4g} s {100 * row['seconds'] / total['seconds']:6.2f} %")
    alone = total["flops"] / (1e12 * arguments.tflops)
    print(f"in all {total['flops'] / 1e15:.4g} PFLOP, at least {total['seconds']:.4g} s = {total['seconds'] / 60:.2f} minutes; "
          f"the FLOPs alone {alone:.4g} s = {alone / 60:.2f} minutes")
    facts = {"config": config.to_json(), "tflops": most[0], "tbs": most[1], "depth": arguments.depth, "phase": phase, "roots": roots}
    return facts | {"stages": stages, "recipe": phases, "total": total}


if __name__ == "__main__":
    main()
