"""Time of training iterations by stage, from torch.profiler: a table, and a Chrome trace to look at (https://ui.perfetto.dev).

    python -m tools.profile.trace --preset smoke --env Catch-v0 --device cpu
    python -m tools.profile.trace --preset efficientzero --env Pong-v5 --device cuda --iterations 5

Takes every flag of `python -m speedyzero`, and runs with --graph off, since the kernels of a replayed graph belong to no stage. R grows
with the ring: for that of a full one, give a --start-transitions just below --ring-positions.

Stages are those of speedyzero/stages.py. CPU time is the host's, waiting included. The device time of a stage is that of the kernels and
copies that the host launched in it from any thread: backward launches from autograd's, so the profiler's own table gives it nothing.
`self` leaves the parts of a stage out. Times are means of an iteration; `outside` is in no stage, as the snapshot.
"""

import dataclasses
import gzip
import json
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Literal

import numpy as np
import torch
import tyro
from torch.profiler import ProfilerActivity, profile, record_function

from speedyzero.config import Config, ConfigError
from speedyzero.envs import EnvError, EnvSpec
from speedyzero.stages import PARTS, STAGES
from tools.profile.checks.trainers import start, step
from tools.profile.settings import read_config

ITERATION, OUTSIDE = "an iteration", "outside"
HOST_CALLS = ("cuda_runtime", "cuda_driver")
DEVICE_WORK = {"kernel", "gpu_memcpy", "gpu_memset"}


@dataclass
class Arguments:
    """Profile some training iterations. Takes the flags of `python -m speedyzero` as well."""

    preset: Literal["efficientzero", "speedyzero", "cpu", "smoke"] = "smoke"
    """Preset to take the settings from."""
    iterations: int = 10
    """Training iterations to profile."""
    warmup: int = 3
    """Training iterations before them."""
    out: Path = Path("trace.json.gz")
    """The Chrome trace to write; compressed if its name ends in .gz."""


def profiled(iterate, iterations: int, cuda: bool, out: Path) -> tuple[list[dict], float]:
    """Profile `iterations` calls of `iterate`: the events, and seconds of a call. Writes the Chrome trace to `out`."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with profile(activities=activities) as profiler:
        begin = perf_counter()
        for _ in range(iterations):
            with record_function(ITERATION):
                iterate()
        if cuda:
            torch.cuda.synchronize()
        seconds = (perf_counter() - begin) / iterations
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(plain))
        data = plain.read_bytes()
    out.write_bytes(gzip.compress(data) if out.suffix == ".gz" else data)
    return json.loads(data)["traceEvents"], seconds


def table_of(events: list[dict], iterations: int) -> dict[str, dict[str, float]]:
    """Calls an iteration by stage, and its seconds on host and device with (`total`) and without (`self`) the parts inside.

    Raises:
        ConfigError: a range is named as a stage and is none of speedyzero/stages.py.
    """
    launched = {
        event["args"]["correlation"]: event["ts"]
        for event in events if event.get("cat") in HOST_CALLS and "correlation" in event.get("args", {})
    }
    work = [(launched.get(event["args"].get("correlation")), event["dur"]) for event in events if event.get("cat") in DEVICE_WORK]
    work = sorted((at, duration) for at, duration in work if at is not None)
    times, spent = np.array([at for at, _ in work]), np.cumsum([0.0, *(duration for _, duration in work)])
    rows: dict[str, dict[str, float]] = {}
    for event in events:
        name = event.get("name")
        if event.get("ph") != "X" or event.get("cat") != "user_annotation" or not re.match(rf"\d+(\.\d+)? |{ITERATION}", name):
            continue
        if name not in (*STAGES, *PARTS, ITERATION):
            raise ConfigError(f"{name!r}: the trainer has a stage of this name that speedyzero/stages.py does not list; add it there")
        row = rows.setdefault(name, dict.fromkeys(("calls", "cpu_total", "device_total"), 0.0))
        first, last = np.searchsorted(times, (event["ts"], event["ts"] + event["dur"]))
        row["calls"] += 1 / iterations
        row["cpu_total"] += event["dur"] / 1e6 / iterations
        row["device_total"] += float(spent[last] - spent[first]) / 1e6 / iterations
    for name, row in rows.items():
        # Parts are numbered as their stage: "2.1 observe" belongs to "2 search".
        if name == ITERATION:
            inside = [stage for stage in rows if stage in STAGES]
        else:
            inside = [part for part in rows if part in PARTS and name in STAGES and part[0] == name[0]]
        for clock in ("cpu", "device"):
            row[f"{clock}_self"] = row[f"{clock}_total"] - sum(rows[part][f"{clock}_total"] for part in inside)
    outside = rows.pop(ITERATION)
    outside |= {f"{clock}_total": outside[f"{clock}_self"] for clock in ("cpu", "device")}
    return {name: rows[name] for name in sorted(rows)} | {OUTSIDE: outside}


def text_of(rows: dict[str, dict[str, float]], cuda: bool) -> list[str]:
    """The table, a line a stage, in milliseconds; shares of the device's time on CUDA, else of the host's."""
    clock = "device" if cuda else "cpu"
    total = sum(row[f"{clock}_self"] for row in rows.values())
    columns = ["cpu_total", "cpu_self", *(["device_total", "device_self"] if cuda else [])]
    lines = [f"{'ms an iteration':18s} {'calls':>7s} " + " ".join(f"{name:>12s}" for name in columns) + f" {'share':>8s} {'self':>8s}"]
    for name, row in rows.items():
        shares = [row[f"{clock}_{what}"] / total if total else 0.0 for what in ("total", "self")]
        lines.append(f"{'  ' * (name in PARTS) + name:18s} {row['calls']:7.1f} " + " ".join(f"{1e3 * row[key]:12.3f}" for key in columns)
                     + "".join(f" {100 * share:6.2f} %" for share in shares))
    return lines


def trained(config: Config, spec: EnvSpec, warmup: int, iterations: int, out: Path) -> tuple[dict[str, dict[str, float]], int, float]:
    """Profile training iterations after a warm-up: the table, R as they begin, seconds of an iteration.

    Raises:
        ConfigError: the run is over before.
    """
    trainer = start(config, spec)

    def train() -> None:
        if trainer.phase() != "train":
            raise ConfigError(f"--iterations {iterations}: the run ends before; give fewer, or more --env-steps than {config.env_steps}")
        step(trainer)

    while trainer.phase() in ("collect", "sweep"):
        step(trainer)
    for _ in range(warmup):
        train()
    roots = trainer.roots()
    events, seconds = profiled(train, iterations, config.device == "cuda", out)
    return table_of(events, iterations), roots, seconds


def main() -> None:
    arguments, rest = tyro.cli(Arguments, prog="trace", return_unknown_args=True)
    try:
        if arguments.iterations < 1 or arguments.warmup < 0:
            raise ConfigError(f"--iterations {arguments.iterations} --warmup {arguments.warmup}: must be at least 1 and 0")
        if not arguments.out.absolute().parent.is_dir():
            raise ConfigError(f"--out: there is no folder {arguments.out.parent}; make it or give another file")
        config, spec = read_config(arguments.preset, rest, "trace")
        config = dataclasses.replace(config, graph="off")
        torch.set_num_threads(config.threads)
        rows, roots, seconds = trained(config, spec, arguments.warmup, arguments.iterations, arguments.out)
    except (ConfigError, EnvError) as error:
        sys.exit(f"error: {error}")
    where = torch.cuda.get_device_name() if config.device == "cuda" else "cpu"
    print(f"{config.env}, preset {config.preset}, {config.search}, {config.refresh}, on {where}: R {roots or 'as sampled'}, "
          f"{config.simulations} simulations, {config.updates_per_iteration} updates of {config.batch_size}; under the profiler "
          f"{1e3 * seconds:.3f} ms an iteration")
    print("\n".join(text_of(rows, config.device == "cuda")))
    print(f"Chrome trace: {arguments.out}")


if __name__ == "__main__":
    main()
