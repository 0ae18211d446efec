"""Where the time of training iterations goes, by stage, from torch.profiler: a table, and a Chrome trace to look at.

    python tools/profile/trace.py --preset smoke --env Catch-v0 --device cpu
    python tools/profile/trace.py --preset efficientzero --env Pong-v5 --device cuda --iterations 5 --out trace.json.gz --json stages.json
    python tools/profile/roofline.py --measured stages.json

Takes every flag of `python -m speedyzero`, and runs as with --graph off, since the kernels of a replayed graph belong to no stage. R grows
with the ring: for that of a full one, give a --start-transitions just below --ring-positions. Open the trace in https://ui.perfetto.dev.

Stages are those of speedyzero/stages.py. CPU time is the host's, waiting included; on CUDA the device time of a stage is that of the
kernels and copies that the host launched in it, from whichever thread (backward's come from autograd's). `self` leaves the parts out.
Times are means of an iteration; `outside` is what no stage holds, as the snapshot. Profiling itself costs time, on the host above all.
"""

import dataclasses
import gzip
import json
import re
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Literal

import torch
import tyro
from roofline import read_config
from torch.profiler import ProfilerActivity, profile, record_function

from speedyzero.config import Config, ConfigError
from speedyzero.envs import EnvError, EnvSpec
from speedyzero.loop import Trainer
from speedyzero.stages import PARTS, STAGES

ITERATION, OUTSIDE = "an iteration", "outside"
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
    json: Path | None = None
    """Also write the table as JSON to this file, for roofline.py --measured."""


@dataclass
class Span:
    """A range on the host, in microseconds."""

    name: str
    start: float
    end: float
    inner: float = 0.0
    """Time of the ranges directly inside."""
    device: float = 0.0
    """Device time of what was launched in it and in no range inside."""
    parent: "Span | None" = None


def spans_of(events: list[dict]) -> list[Span]:
    """The stages, and the iterations around them, in the order they began, each knowing what it lies in.

    Raises:
        ConfigError: a range that is named as a stage and is none of speedyzero/stages.py.
    """
    found, open_spans = [], []
    ranges = [e for e in events if e.get("ph") == "X" and e.get("cat") == "user_annotation"]
    for event in sorted(ranges, key=lambda event: (event["ts"], -event["dur"])):
        name = event["name"]
        if name not in (*STAGES, *PARTS, ITERATION):
            if re.match(r"\d+(\.\d+)? ", name):
                raise ConfigError(f"{name!r}: the trainer has a stage of this name that speedyzero/stages.py does not list; add it there")
            continue
        span = Span(name, event["ts"], event["ts"] + event["dur"])
        while open_spans and open_spans[-1].end < span.end:
            open_spans.pop()
        if open_spans:
            span.parent = open_spans[-1]
            span.parent.inner += span.end - span.start
        open_spans.append(span)
        found.append(span)
    return found


def give_device_time(spans: list[Span], events: list[dict]) -> None:
    """Count every kernel and copy for the innermost range that the host was in when it launched it."""
    launched = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    work = [(launched.get(e["args"].get("correlation")), e["dur"]) for e in events if e.get("cat") in DEVICE_WORK]
    index, current = 0, None
    for start, duration in sorted((start, duration) for start, duration in work if start is not None):
        while index < len(spans) and spans[index].start <= start:
            current, index = spans[index], index + 1
        while current is not None and current.end < start:
            current = current.parent
        if current is not None:
            current.device += duration


def table_of(spans: list[Span], iterations: int) -> dict[str, dict[str, float]]:
    """Calls, and seconds of host and device with (`total`) and without (`self`) the ranges inside, an iteration, by stage."""
    columns = ("calls", "cpu_total", "cpu_self", "device_total", "device_self")
    rows: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(columns, 0.0))
    for span in spans:
        name = OUTSIDE if span.name == ITERATION else span.name
        row = rows[name]
        own = span.end - span.start - span.inner
        row["calls"] += 1 / iterations
        row["cpu_self"] += own / 1e6 / iterations
        row["device_self"] += span.device / 1e6 / iterations
        row["cpu_total"] += (own if name == OUTSIDE else span.end - span.start) / 1e6 / iterations
        # The iteration counts only what is in no stage: its own is its total.
        within = span
        while within is not None and within.name != ITERATION:
            rows[within.name]["device_total"] += span.device / 1e6 / iterations
            within = within.parent
        if name == OUTSIDE:
            row["device_total"] += span.device / 1e6 / iterations
    return {name: rows[name] for name in (*sorted((*STAGES, *PARTS)), OUTSIDE) if name in rows}


def text_of(rows: dict[str, dict[str, float]], cuda: bool) -> list[str]:
    """The table, a line a stage, in milliseconds; shares of the device's time on CUDA, else of the host's."""
    clock = "device" if cuda else "cpu"
    whole = sum(row[f"{clock}_self"] for row in rows.values())
    head = f"{'ms an iteration':18s} {'calls':>7s} {'CPU total':>10s} {'CPU self':>10s}"
    lines = [head + (f" {'CUDA total':>10s} {'CUDA self':>10s}" if cuda else "") + f" {'share':>8s} {'self':>8s}"]
    for name, row in rows.items():
        label = f"  {name}" if name in PARTS else name
        times = [row["cpu_total"], row["cpu_self"], *([row["device_total"], row["device_self"]] if cuda else [])]
        shares = [row[f"{clock}_{what}"] / whole if whole else 0.0 for what in ("total", "self")]
        lines.append(f"{label:18s} {row['calls']:7.1f} " + " ".join(f"{1e3 * time:10.3f}" for time in times)
                     + "".join(f" {100 * share:6.2f} %" for share in shares))
    return lines


def run(config: Config, spec: EnvSpec, device: torch.device, warmup: int, iterations: int) -> tuple[profile, float, int]:
    """Profile training iterations after a warm-up: the profile, seconds of an iteration, and the R of the last, 0 under `sampled`.

    Raises:
        ConfigError: the run is over before.
    """
    trainer = Trainer(config, spec, device)
    trainer.start()

    def train_once() -> None:
        if trainer.phase() != "train":
            raise ConfigError(f"--iterations {iterations}: the run ends before; give fewer, or more --env-steps than {config.env_steps}")
        trainer.step("train")
        trainer.state.turn.check()

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    while trainer.phase() in ("collect", "sweep"):
        trainer.step(trainer.phase())
        trainer.state.turn.check()
    for _ in range(warmup):
        train_once()
    wait()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as profiler:
        start = perf_counter()
        for _ in range(iterations):
            roots = trainer.roots()
            with record_function(ITERATION):
                train_once()
        wait()
        seconds = (perf_counter() - start) / iterations
    return profiler, seconds, roots


def events_of(profiler: profile, out: Path) -> list[dict]:
    """Write the Chrome trace to `out`, and read its events back."""
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(plain))
        data = plain.read_bytes()
    out.write_bytes(gzip.compress(data) if out.suffix == ".gz" else data)
    return json.loads(data)["traceEvents"]


def main() -> None:
    prog = "trace.py"
    arguments, rest = tyro.cli(Arguments, prog=prog, return_unknown_args=True)
    try:
        for name, least in (("iterations", 1), ("warmup", 0)):
            if getattr(arguments, name) < least:
                raise ConfigError(f"--{name} {getattr(arguments, name)}: must be at least {least}")
        for name in ("out", "json"):
            path = getattr(arguments, name)
            if path is not None and not path.absolute().parent.is_dir():
                raise ConfigError(f"--{name} {path}: there is no folder {path.parent}; make it or give another file")
        config, spec = read_config(arguments.preset, rest, prog)
        config, device = dataclasses.replace(config, graph="off"), torch.device(config.device)
        torch.set_num_threads(config.threads)
        profiler, seconds, roots = run(config, spec, device, arguments.warmup, arguments.iterations)
        events = events_of(profiler, arguments.out)
        spans = spans_of(events)
    except (ConfigError, EnvError) as error:
        sys.exit(f"error: {error}")
    give_device_time(spans, events)
    rows = table_of(spans, arguments.iterations)
    cuda = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if cuda else "cpu"
    print(f"{config.env}, preset {config.preset}, {config.search}, {config.refresh}, on {where}: R {roots or 'as sampled'}, "
          f"{config.simulations} simulations, {config.updates_per_iteration} updates of {config.batch_size}; "
          f"under the profiler {1e3 * seconds:.3f} ms an iteration")
    print("\n".join(text_of(rows, cuda)))
    print(f"Chrome trace: {arguments.out}")
    if arguments.json:
        facts = {"config": config.to_json(), "phase": "train", "roots": roots, "device": where, "iterations": arguments.iterations}
        stages = {name: row for name, row in rows.items() if name != OUTSIDE}
        arguments.json.write_text(json.dumps(facts | {"seconds": seconds, "stages": stages, "outside": rows[OUTSIDE]}, indent=1))


if __name__ == "__main__":
    main()
