"""The least time that each stage of an iteration, and all of the recipe, can take on a card: counted from the config, nothing is run.

    python -m tools.profile.roofline --preset efficientzero --env Pong-v5
    python -m tools.profile.roofline --preset speedyzero --lanes 64 --refresh-roots 8192    # any flag of python -m speedyzero
    python -m tools.profile.roofline --measured stages.json                                 # of trace.py: share of the floor by stage

FLOPs are those of the real networks and the real loss, forward and backward, on `meta` tensors: convolutions and matrix products, a
multiply-add counted as 2. Each is a launch that reads its operands and writes its result once, in bf16 (in fp32 for the last layers, for
a trace of the CPU, and in learning with --amp False); pointwise work and BatchNorm cost nothing. The bytes of the library's kernels are
those of kernels/README.md. A launch takes at least its FLOPs at --tflops or its bytes at --tbs, whichever is longer; a stage takes its
launches one after the other. Only several convolutions in one launch can go below this floor; nothing below the FLOPs alone.

The recipe goes through the phases of `schedule`, R growing with the ring, one transition a lane and step (emulators that are
reset need a few more). Acting and joining are the emulators' time, which the device does not wait for: they have no floor here.
"""

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest import mock

import torch
import tyro
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from speedyzero import layers, learn, schedule
from speedyzero.batch import Batch
from speedyzero.config import Config, ConfigError, from_json, pick_device, preset_config, resolve
from speedyzero.envs import EnvError, EnvSpec, describe
from speedyzero.nets import Network, make_snapshot
from speedyzero.sizes import NetworkSpec, network_spec
from speedyzero.stages import PARTS, STAGES
from speedyzero_kernels.nstep import Targets
from tools.profile.kernel_bytes import (
    backup_bytes,
    cross_entropy_bytes,
    observations_bytes,
    optimizer_bytes,
    plant_bytes,
    root_prior_bytes,
    select_bytes,
    targets_bytes,
    to_scalar_bytes,
)  # fmt: skip

META = torch.device("meta")
BF16, FP32 = 2, 4
"""Bytes of a number."""
Launched = tuple[tuple[float, float], ...]
"""FLOPs and bytes of launches that come one after the other."""
SNAPSHOT = "snapshot"
"""Not a stage: every `snapshot_interval` updates, between two iterations."""


@dataclass(frozen=True)
class Work:
    """Launches of a stage, `times` over."""

    stage: str
    what: str
    launches: Launched
    times: int = 1

    @property
    def flops(self) -> float:
        return self.times * sum(flops for flops, _ in self.launches)

    @property
    def bytes(self) -> float:
        return self.times * sum(moved for _, moved in self.launches)

    def seconds(self, tflops: float, tbs: float) -> float:
        """The floor at so many TFLOP/s and TB/s."""
        return self.times * sum(max(flops / (1e12 * tflops), moved / (1e12 * tbs)) for flops, moved in self.launches)


class Launches(TorchDispatchMode):
    """Notes FLOPs and bytes of every convolution and matrix product, on numbers of `item` bytes; the last layers' are fp32."""

    def __init__(self, item: int) -> None:
        super().__init__()
        self.item = item
        self.found: list[tuple[float, float]] = []

    def __enter__(self):
        self._autocast = mock.patch.object(layers, "full_precision", self._in_fp32)
        self._autocast.start()
        return super().__enter__()

    def __exit__(self, *error):
        self._autocast.stop()
        return super().__exit__(*error)

    @contextmanager
    def _in_fp32(self, x: Tensor) -> Iterator[None]:
        item, self.item = self.item, FP32
        yield
        self.item = item

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if formula := flop_registry.get(func._overloadpacket):
            floats = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor) and x.is_floating_point()]
            self.found.append((formula(*args, **kwargs, out_val=out), self.item * sum(x.numel() for x in floats)))
        return out


def count(function: Callable[[], object], item: int) -> Launched:
    """FLOPs and bytes of the convolutions and products that `function` does on meta tensors."""
    with Launches(item) as launches:
        function()
    return tuple(launches.found)


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=META)


class Model:
    """A config's work by stage. `depth` is the mean number of nodes that a simulation goes down."""

    def __init__(self, config: Config, spec: EnvSpec, depth: float):
        self.config, self.spec, self.depth = config, spec, depth
        self.net: NetworkSpec = network_spec(config, spec.frame_shape, spec.num_actions)
        with META:
            self.network = Network(self.net).train()
        self.snapshot = make_snapshot(self.net, META)
        self.parameters = sum(p.numel() for p in self.network.parameters())
        self.frame = spec.frame_shape[0] * spec.frame_shape[1] * spec.frame_shape[2]
        self.frame_item = 1 if spec.image else 4
        self.search_item, self.learn_item = BF16 if config.device == "cuda" else 4, BF16 if config.amp else 4
        self.observation = (self.net.in_channels, self.net.height, self.net.width)

    def iteration(self, phase: str, roots: int) -> list[Work]:
        """All work of an iteration. `roots` is the R of a sweep, 0 under `sampled` refresh, which has its own count."""
        config, works = self.config, []
        if config.refresh == "sampled":
            roots = config.updates_per_iteration * config.batch_size * config.window
        if phase in ("collect", "train"):
            works += self.ingest()
        if phase == "train":
            roots += config.lanes
        if phase != "collect":
            works += self.search(roots) + self.refresh(roots)
        if phase in ("train", "learn"):
            works += self.learn()
        return works

    def ingest(self) -> list[Work]:
        """Frames into the inbox and on into the ring; the greatest priority of the buffer is looked up (priority and its flag)."""
        lanes, slots = self.config.lanes, self.config.lanes * self.config.slots
        moved = 3 * lanes * self.frame * self.frame_item + 5 * slots
        return [Work("1 ingest", "frames, greatest priority", ((0, moved),))]

    def represent(self, batch: int) -> Launched:
        """The snapshot's representation of a batch of observations."""
        with torch.no_grad():
            return count(lambda: self.snapshot.represent(_zeros(batch, *self.observation)), self.search_item)

    def model_step(self, batch: int) -> Launched:
        """Dynamics, LSTM and prediction of the snapshot for a batch of states."""
        latent, hidden = _zeros(batch, self.net.channels, *self.net.board), self.snapshot.initial_hidden(batch)
        with torch.no_grad():
            return count(lambda: self.snapshot.model_step(latent, hidden, _zeros(batch, dtype=torch.int64)), self.search_item)

    def search(self, roots: int) -> list[Work]:
        """Observations, representation and prediction of the roots, and S simulations."""
        config, actions, steps, bins = self.config, self.net.actions, self.config.simulations, self.net.bins
        frames = observations_bytes(roots, roots * config.frame_stack, self.frame, self.frame_item, config.frame_stack, self.search_item)
        latent = _zeros(roots, self.net.channels, *self.net.board)
        with torch.no_grad():
            prediction = count(lambda: self.snapshot.predict(latent), self.search_item)
        noise = 4 if config.search == "puct" else 0
        planting = plant_bytes(roots, actions, steps + 1), root_prior_bytes(roots, actions, FP32, noise)
        backups = [backup_bytes(roots, actions, self.depth, simulation) for simulation in range(steps)]
        select = select_bytes(config.search, roots, actions, self.depth)
        scalars = (0, to_scalar_bytes(roots, bins, FP32))
        return [
            Work("2.1 observe", "stacks of frames", ((0, frames),)),
            Work("2.2 tree search", "representation", self.represent(roots)),
            Work("2.2 tree search", "prediction of the roots", (*prediction, scalars)),
            Work("2.2 tree search", "model steps", (*self.model_step(roots), scalars, scalars), steps),
            Work("2.2 tree search", "trees", tuple((0, moved) for moved in (*planting, *[select] * steps, *backups))),
        ]

    def refresh(self, roots: int) -> list[Work]:
        """Targets of the searched positions for their priorities; policy, values, priority, flags and date into the ring."""
        written = roots * (4 * self.net.actions + 8 + 2 * self.net.actions + 4 + 4 + 4 + 4 + 1)
        moved = (targets_bytes(roots, self.net.actions, 0, self.config.n_step), written)
        return [Work("4 refresh", "targets, results into the ring", tuple((0, part) for part in moved))]

    def learn(self) -> list[Work]:
        """U updates. Which positions may be drawn is found once; `sampled` refresh does it before its search, in step 2."""
        config, batch, unroll, bins = self.config, self.config.batch_size, self.config.unroll, self.net.bins
        updates = config.updates_per_iteration
        slots, stack = config.lanes * config.slots, config.frame_stack
        frames = observations_bytes(batch * (unroll + 1), batch * (unroll + stack), self.frame, self.frame_item, stack, self.learn_item)
        goals = targets_bytes(batch, self.net.actions, unroll, config.n_step)
        forward, backward = self.losses()
        rows = batch * (unroll + 1), batch * unroll

        def entropies(forward: bool) -> Launched:
            return tuple((0, cross_entropy_bytes(count, bins, FP32, forward=forward)) for count in rows)

        scalars = (0, to_scalar_bytes(batch, bins, FP32))
        return [
            Work("5 learn", "eligible positions", ((0, 6 * slots),)),
            Work("5.1 sample", "priorities", ((0, 4 * slots),), updates),
            Work("5.2 gather", "stacks of frames", ((0, frames),), updates),
            Work("5.2 gather", "targets", ((0, goals),), updates),
            Work("5.3 losses", "forward", (*forward, *entropies(True), scalars), updates),
            Work("5.4 backward", "backward", (*backward, *entropies(False)), updates),
            Work("5.5 optimizer", config.optimizer, ((0, optimizer_bytes(config.optimizer, self.parameters)),), updates),
            Work("5.6 priorities", "into the ring", ((0, batch * 17),), updates),
        ]

    def losses(self) -> tuple[Launched, Launched]:
        """Convolutions and products of one update: forward, and backward."""
        batch, unroll, actions = self.config.batch_size, self.config.unroll, self.net.actions
        goals = Targets(
            value=_zeros(batch, unroll + 1), prefix=_zeros(batch, unroll), policy=_zeros(batch, unroll + 1, actions),
            action=_zeros(batch, unroll, dtype=torch.int64), mask=_zeros(batch, unroll + 1), policy_mask=_zeros(batch, unroll + 1),
        )  # fmt: skip
        data = Batch(_zeros(batch, *self.observation), _zeros(batch * unroll, *self.observation), goals, _zeros(batch))
        loss: list[Tensor] = []
        forward = count(lambda: loss.append(learn.losses(self.network, data, self.config)[0]), self.learn_item)
        return forward, count(loss[0].backward, self.learn_item)

    def fold(self) -> Work:
        """The training network in fp32 into its snapshot in bf16; the projection, which a snapshot lacks, is counted too."""
        return Work(SNAPSHOT, "folded into bf16", ((0, (4 + BF16) * self.parameters),))


def recipe(config: Config) -> Counter[tuple[schedule.Phase, int]]:
    """How many iterations of each phase and R a run has."""
    return Counter(schedule.iterations(config))


def by_stage(works: list[Work], tflops: float, tbs: float) -> dict[str, dict[str, float]]:
    """FLOPs, bytes and seconds at least, of every stage and part that has any; a stage holds its parts."""
    found: dict[str, dict[str, float]] = {}
    for name in (*sorted((*STAGES, *PARTS)), SNAPSHOT):
        # Parts are numbered as their stage: "2.1 observe" belongs to "2 search".
        mine = [work for work in works if work.stage == name or (name in STAGES and work.stage.startswith(name[0] + "."))]
        if mine:
            found[name] = {
                "flops": sum(work.flops for work in mine),
                "bytes": sum(work.bytes for work in mine),
                "seconds": sum(work.seconds(tflops, tbs) for work in mine),
            }
    return found


def read_config(preset: str, rest: list[str], prog: str, device: str | None = None) -> tuple[Config, EnvSpec]:
    """The resolved config of a preset and more flags of python -m speedyzero, for `device` or else the one they name; its environment.

    Raises:
        ConfigError, EnvError: one line each.
    """
    config = tyro.cli(Config, prog=prog, args=rest, default=preset_config(preset))
    config = dataclasses.replace(config, device=device or pick_device(config.device).type)
    spec = describe(config.env, frame_size=config.frame_size, gray=config.gray)
    return resolve(config, image=spec.image, atari=spec.family == "atari"), spec


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
    depth: float = 4.0
    """Mean number of nodes that a simulation goes down (d of kernels/README.md)."""
    measured: Path | None = None
    """What trace.py wrote with --json: its config and its R are taken, and its times compared with their floors."""
    json: Path | None = None
    """Also write everything as JSON to this file."""


def rows_of(stages: dict[str, dict[str, float]], tflops: float, tbs: float, measured: dict | None) -> list[str]:
    """The table of an iteration, a row a stage."""
    whole = sum(row["seconds"] for name, row in stages.items() if name in STAGES)
    clock = "device_total" if measured and measured["device"] != "cpu" else "cpu_total"
    title = f"{'stage':18s} {'TFLOP':>9s} {'GB':>9s} {'floor, ms':>10s} {'share':>8s} bound by"
    lines = [title + (f" {'measured, ms':>14s} {'of the floor':>13s}" if measured else "")]
    for name in [name for name in sorted({*stages, *(measured["stages"] if measured else {})}) if name != SNAPSHOT]:
        row = stages.get(name, {"flops": 0.0, "bytes": 0.0, "seconds": 0.0})
        bound = "FLOPs" if row["flops"] / (1e12 * tflops) > row["bytes"] / (1e12 * tbs) else "bytes" if row["bytes"] else "-"
        label = f"  {name}" if name in PARTS else name
        line = (f"{label:18s} {row['flops'] / 1e12:9.4g} {row['bytes'] / 1e9:9.4g} {1e3 * row['seconds']:10.4g} "
                f"{100 * row['seconds'] / whole:6.2f} % {bound:8s}")
        if measured:
            spent = measured["stages"].get(name, {}).get(clock)
            share = f"{100 * row['seconds'] / spent:11.2f} %" if spent else "-"
            line += f" {1e3 * spent:14.4f} {share:>13s}" if spent is not None else f" {'-':>14s} {'-':>13s}"
        lines.append(line)
    return lines


def main() -> None:
    prog = "roofline.py"
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
        report(arguments, config, spec, measured)
    except (ConfigError, EnvError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: --json {arguments.json}: {error.strerror}; give another file")


def report(arguments: Arguments, config: Config, spec: EnvSpec, measured: dict | None) -> None:
    """Print the tables, and write the JSON."""
    tflops, tbs = arguments.tflops, arguments.tbs
    model = Model(config, spec, arguments.depth)
    phase, roots = "train", config.refresh_roots if config.refresh == "sweep" else 0
    if measured:
        phase, roots = measured["phase"], measured["roots"]
    works = model.iteration(phase, roots)
    stages, floor = by_stage(works, tflops, tbs), sum(work.seconds(tflops, tbs) for work in works)
    print(f"{config.env}, preset {config.preset}, {config.search} with {config.simulations} simulations, {config.refresh}: ceilings "
          f"{tflops:g} TFLOP/s and {tbs:g} TB/s")
    print(f"one iteration, phase {phase}, R {roots or 'as sampled'}" + (f", measured on {measured['device']}" if measured else ""))
    print("\n".join(rows_of(stages, tflops, tbs, measured)))
    print(f"an iteration: {sum(work.flops for work in works) / 1e12:.3f} TFLOP, at least {1e3 * floor:.3f} ms")
    if measured:
        print(f"measured {1e3 * measured['seconds']:.3f} ms; the floor is {100 * floor / measured['seconds']:.2f} % of that")

    fold, phases = model.fold(), []
    for (name, replayed), iterations in sorted(recipe(config).items()):
        works = model.iteration(name, replayed)
        flops, seconds = sum(work.flops for work in works), sum(work.seconds(tflops, tbs) for work in works)
        phases.append({
            "phase": name, "roots": replayed, "iterations": iterations, "flops": iterations * flops, "seconds": iterations * seconds,
        })  # fmt: skip
    snapshots = config.total_updates // config.snapshot_interval
    total = {key: sum(row[key] for row in phases) for key in ("iterations", "flops", "seconds")}
    total["seconds"] += snapshots * fold.seconds(tflops, tbs)
    print(f"\nthe whole recipe: {config.env_steps} steps, {config.total_updates} updates, {snapshots} snapshots")
    for row in phases:
        print(f"{row['phase']:8s} R {row['roots']:6d} {row['iterations']:7d} iterations {row['flops'] / 1e15:10.4g} PFLOP "
              f"{row['seconds']:9.4g} s {100 * row['seconds'] / total['seconds']:6.2f} %")
    alone = total["flops"] / (1e12 * tflops)
    print(f"in all {total['flops'] / 1e15:.4g} PFLOP, at least {total['seconds']:.4g} s = {total['seconds'] / 60:.2f} minutes; "
          f"the FLOPs alone {alone:.4g} s = {alone / 60:.2f} minutes")
    if arguments.json:
        facts = {"config": config.to_json(), "tflops": tflops, "tbs": tbs, "depth": arguments.depth, "phase": phase, "roots": roots}
        arguments.json.write_text(json.dumps(facts | {"stages": stages, "recipe": phases, "total": total}, indent=1))


if __name__ == "__main__":
    main()
