"""How long a run takes on more GPUs, by arithmetic: work, launches and messages counted, the rates of device, network and cores given.

    python -m tools.profile.scaling --env Pong-v5 --preset efficientzero
    python -m tools.profile.scaling --env Pong-v5 --preset speedyzero --scaling weak --gpus 1 8 16 --json scaling.json
    python -m tools.profile.scaling --env Catch-v0 --preset cpu --gpus 1 2 --tflops 0.05 ...    # any machine, by its own rates

What a rank does is counted by launches.py, which runs the trainer's own iteration as one rank of so many, on tensors without memory; each
message that `speedyzero.ranks` would send is noted there with its bytes. The messages of the hosts are noted in a step of real emulators,
whose other ranks echo. So nothing here repeats how the ranks share the work.

An iteration is its launches and messages, one after the other, and what the emulators take beyond the work that hides them. A launch takes
its FLOPs at --tflops or its bytes at --tbs, whichever is longer, and --launch-us besides; a message takes a latency and its bytes at the
rate of the link. Not in it: that small launches do not reach these rates, the copy of the snapshot, logs, checkpoints, the evaluation.

    strong    the run is the preset's, whatever the number of ranks
    weak      lanes, batch and refreshed positions grow with the ranks: as many samples in all, in fewer and larger steps
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal
from unittest import mock

import tyro
from torch import Tensor

from speedyzero import ranks as ranks_module
from speedyzero.config import Config, ConfigError, check
from speedyzero.emulators import Emulators
from speedyzero.envs import EnvError, EnvSpec
from speedyzero.ranks import Ranks, RanksError, check_shares
from speedyzero.run.files import write_json
from speedyzero.schedule import Phase
from tools.profile.launches import DEPTH, Iterations, Launch, Launches, flops, moved, number, sent, size, summed
from tools.profile.roofline import recipe
from tools.profile.settings import read_config

PARTS = ("operations", "memory", "search launches", "launches", "messages", "emulators", "host")
"""What the time of an iteration is made of. operations, memory: work that waits for the one or the other. emulators: what the device
waits for them. host: the message by which the ranks agree to go on."""


@dataclass(frozen=True)
class Machine:
    """What the GPUs, their links and the cores do. All defaults but --tflops, --tbs and --emulator-rate are assumptions, not measured."""

    tflops: float = 790.0
    """TFLOP/s in bf16 that a GPU reaches; the default was measured on an H200 with other programs."""
    tbs: float = 4.3
    """TB/s that its memory reaches; the default was measured on an H200."""
    launch_us: float = 2.0
    """What a launch within a graph costs besides its work, in microseconds."""
    message_us: float = 15.0
    """What a message between GPUs of a node costs besides its bytes, in microseconds."""
    net_message_us: float = 10.0
    """What it costs more for each doubling of the nodes, in microseconds."""
    link_gbs: float = 350.0
    """GB/s that a GPU sends to the others of its node (NVLink)."""
    net_gbs: float = 40.0
    """GB/s that a GPU sends to other nodes, each over a network card of its own."""
    host_message_us: float = 100.0
    """What a message between the hosts' processes (gloo) costs besides its bytes for each doubling of the ranks, in microseconds."""
    host_gbs: float = 1.0
    """GB/s of such messages."""
    emulator_rate: float = 2000.0
    """Environment steps a second that a core emulates; the default is about what a core of BENCHMARKS.md does of Pong."""
    cores_per_gpu: int = 16
    """Cores that emulate, for each GPU."""
    gpus_per_node: int = 8
    """GPUs of a node."""

    def nodes(self, gpus: int) -> int:
        """Nodes of so many GPUs.

        Raises:
            ConfigError: they do not fill theirs.
        """
        if gpus > self.gpus_per_node and gpus % self.gpus_per_node:
            raise ConfigError(f"--gpus {gpus}: does not fill its nodes of --gpus-per-node {self.gpus_per_node}; give a multiple of it")
        return -(-gpus // self.gpus_per_node)

    def work(self, launch: Launch) -> tuple[float, float]:
        """Seconds of a launch's FLOPs, and of its bytes."""
        return launch.flops / (1e12 * self.tflops), launch.moved / (1e12 * self.tbs)

    def message(self, launch: Launch, gpus: int) -> float:
        """Seconds that a message between GPUs takes besides its launch: within each node first, then between the nodes, as by NCCL.

        A sum travels twice, there and back; between nodes every GPU carries its part of it.
        """
        nodes = self.nodes(gpus)
        inside = gpus // nodes
        times = 2 if launch.name == "all_reduce" else 1
        latency = self.message_us * (inside > 1) + self.net_message_us * math.ceil(math.log2(nodes))
        by_link = times * launch.sent * (inside - 1) / inside / (1e9 * self.link_gbs)
        by_net = times * launch.sent / inside * (nodes - 1) / nodes / (1e9 * self.net_gbs)
        return 1e-6 * latency + by_link + by_net

    def host_message(self, bytes_: float, ranks: int) -> float:
        """Seconds of a message after which all processes have `bytes_`."""
        return 1e-6 * self.host_message_us * math.ceil(math.log2(ranks)) + bytes_ * (ranks - 1) / ranks / (1e9 * self.host_gbs)


@contextlib.contextmanager
def echo() -> Iterator[list[float]]:
    """Within the block every other rank of `Ranks` says what this one says. Gives the bytes that all have after each message."""
    bytes_: list[float] = []

    def all_reduce(tensor: Tensor, greatest: object) -> None:
        bytes_.append(size(tensor))

    def all_gather(everyone: list[Tensor], mine: Tensor) -> None:
        bytes_.append(sum(map(size, everyone)))
        for theirs in everyone:
            theirs.copy_(mine)

    with mock.patch.multiple(ranks_module.dist, all_reduce=all_reduce, all_gather=all_gather):
        yield bytes_


def messages_of(found: Launches) -> Launches:
    """The messages among launches."""
    return Counter({launch: times for launch, times in found.items() if launch.sent})


@dataclass(frozen=True)
class HostMessages:
    """Bytes of each message between the hosts in an iteration."""

    emulators: tuple[float, ...]
    """While the emulators' turn lasts."""
    stop: tuple[float, ...]
    """After every iteration: whether a signal asks to stop."""


def host_messages(config: Config, spec: EnvSpec, ranks: Ranks) -> HostMessages:
    """Those that rank 0 sends, noted in a step of its share of the emulators."""
    emulators = Emulators(
        spec, config.lanes, config.seed, training=True, threads=1, max_episode_steps=config.max_episode_steps,
        sticky_actions=config.sticky_actions, ranks=ranks,
    )  # fmt: skip
    with contextlib.closing(emulators), echo() as bytes_:
        emulators.reset()
        bytes_.clear()
        emulators.send()
        emulators.recv()
        turn = tuple(bytes_)
        bytes_.clear()
        ranks.greatest(0)  # as the loop does
    return HostMessages(turn, tuple(bytes_))


def parts_of(found: Launches, phase: Phase, host: HostMessages, lanes: int, gpus: int, machine: Machine) -> dict[str, float]:
    """Seconds of an iteration by PARTS. `found`: of a rank. `lanes`: its own."""
    parts = dict.fromkeys(PARTS, 0.0)
    hidden = 0.0
    for launch, times in found.items():
        by_flops, by_bytes = machine.work(launch)
        begun = 1e-6 * machine.launch_us * launch.launches
        if launch.sent:
            mine = {"messages": machine.message(launch, gpus) + by_bytes + begun}
        else:
            begins = "search launches" if launch.stage.startswith("2") else "launches"
            mine = {"operations" if by_flops > by_bytes else "memory": max(by_flops, by_bytes), begins: begun}
        for name, seconds in mine.items():
            parts[name] += times * seconds
        if launch.stage[0] in "45":  # what comes after the actions
            hidden += times * sum(mine.values())
    if phase in ("collect", "train"):
        turn = math.ceil(lanes / machine.cores_per_gpu) / machine.emulator_rate
        turn += sum(machine.host_message(bytes_, gpus) for bytes_ in host.emulators)
        parts["emulators"] = max(0.0, turn - hidden)
    parts["host"] = sum(machine.host_message(bytes_, gpus) for bytes_ in host.stop)
    return parts


def grown(config: Config, times: int) -> Config:
    """The config of a run with as many samples, in steps that are `times` as large: lanes, batch, and the sweep as far as the ring allows.

    Raises:
        ConfigError: there is no such run; the line names the flag.
    """
    lanes = config.lanes * times
    most = min(config.refresh_roots * times, config.ring_positions // 4)
    roots = max(most // (8 * times), 1) * 8 * times
    start = max(config.start_transitions, lanes * (config.window + config.frame_stack + 1), lanes + roots // 8)
    larger = dataclasses.replace(
        config, lanes=lanes, batch_size=config.batch_size * times, refresh_roots=roots, start_transitions=start,
        refresh_values=min(config.refresh_values * times, start - lanes) // times * times,
        final_updates=-(-config.final_updates // times), snapshot_interval=max(1, config.snapshot_interval // times),
    )  # fmt: skip
    check(larger)
    return larger


@dataclass(frozen=True)
class Prediction:
    """What a run on so many GPUs takes."""

    config: Config
    gpus: int
    nodes: int
    counts: dict[str, float]
    """A rank's share of an iteration of training with R at its greatest: tflop, gb, launches, messages, mb sent, mb between hosts."""
    parts: dict[str, float]
    """Seconds of that iteration by PARTS."""
    run: dict[str, float]
    """Seconds of the run by PARTS."""

    @property
    def iteration(self) -> float:
        """Seconds."""
        return sum(self.parts.values())

    @property
    def limit(self) -> str:
        """The greatest part of the run."""
        return max(self.run, key=self.run.get)

    @property
    def minutes(self) -> float:
        """Of the run."""
        return sum(self.run.values()) / 60

    @property
    def sweep_iterations(self) -> float:
        """Iterations in which a sweep goes round the full ring: a target's greatest age."""
        return self.config.ring_positions / self.config.refresh_roots


def predict(config: Config, spec: EnvSpec, gpus: int, machine: Machine, depth: float = DEPTH) -> Prediction:
    """The time of a run of `gpus` ranks.

    Raises:
        ConfigError, RanksError: its work cannot be shared by so many; the line names the flag.
    """
    nodes = machine.nodes(gpus)
    check_shares(config, gpus)
    ranks = Ranks(0, gpus)
    counted, host = Iterations(config, spec, depth, ranks), host_messages(config, spec, ranks)

    def time(phase: Phase, roots: int) -> dict[str, float]:
        return parts_of(counted.iteration(phase, roots), phase, host, config.lanes // gpus, gpus, machine)

    run = dict.fromkeys(PARTS, 0.0)
    for (phase, roots), iterations in recipe(config).items():
        for name, seconds in time(phase, roots).items():
            run[name] += iterations * seconds
    largest = "train", config.refresh_roots if config.refresh == "sweep" else 0
    found = counted.iteration(*largest)
    counts = {
        "tflop": summed(found, flops) / 1e12, "gb": summed(found, moved) / 1e9, "launches": number(found),
        "messages": sum(messages_of(found).values()), "mb": summed(found, sent) / 1e6, "host_mb": sum(host.emulators + host.stop) / 1e6,
    }  # fmt: skip
    return Prediction(config, gpus, nodes, counts, time(*largest), run)


@dataclass(frozen=True)
class Arguments:
    """The time of a run on more GPUs, by arithmetic. Takes the flags of `python -m speedyzero` as well."""

    machine: Machine
    preset: Literal["efficientzero", "speedyzero", "cpu-atari", "cpu", "smoke"] = "efficientzero"
    """Preset to take the settings from."""
    gpus: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Numbers of GPUs."""
    scaling: tuple[Literal["strong", "weak"], ...] = ("strong", "weak")
    """strong: the run as it is. weak: lanes, batch and refreshed positions grow with the GPUs."""
    depth: float = DEPTH
    """Mean number of nodes that a simulation goes down (d of kernels/README.md)."""
    json: Path | None = None
    """File for all figures, and those of every part."""


HEAD = (f"{'GPUs':>4s} {'nodes':>5s} {'batch':>6s} {'R':>6s} {'TFLOP':>7s} {'GB':>7s} {'launches':>8s} {'messages':>8s} {'MB':>7s} |"
        f"{'oper.':>7s} {'memory':>7s} {'search':>7s} {'launch':>7s} {'message':>7s} {'emul.':>7s} {'host':>6s} = {'ms':>7s} |"
        f"{'minutes':>8s} {'speed-up':>8s} {'effic.':>7s}  limit of the run")  # fmt: skip


def line_of(found: Prediction, alone: Prediction) -> str:
    """A line of the table; `alone`: on one GPU."""
    counts, faster = found.counts, alone.minutes / found.minutes
    parts = " ".join(f"{1e3 * found.parts[name]:{6 if name == 'host' else 7}.2f}" for name in PARTS)
    return (f"{found.gpus:4d} {found.nodes:5d} {found.config.batch_size:6d} {found.config.refresh_roots:6d} {counts['tflop']:7.3f} "
            f"{counts['gb']:7.2f} {counts['launches']:8d} {counts['messages']:8d} {counts['mb']:7.1f} |"
            f"{parts} = {1e3 * found.iteration:7.2f} |"
            f"{found.minutes:8.2f} {faster:8.2f} {100 * faster / found.gpus:5.1f} %  {found.limit}")  # fmt: skip


def json_of(found: Prediction, alone: Prediction, scaling: str) -> dict:
    """All that is predicted, in seconds."""
    faster = alone.minutes / found.minutes
    sizes = ("lanes", "batch_size", "refresh_roots", "start_transitions", "total_updates")
    return {
        "scaling": scaling, "gpus": found.gpus, "nodes": found.nodes, **{name: getattr(found.config, name) for name in sizes},
        "iteration": found.counts | {"seconds": found.iteration, "parts": found.parts},
        "run": {"minutes": found.minutes, "parts": found.run},
        "speed_up": faster, "efficiency": faster / found.gpus, "limit": found.limit, "sweep_iterations": found.sweep_iterations,
    }  # fmt: skip


def _check(arguments: Arguments) -> None:
    """Raise ConfigError, which names the flag, on rates and numbers that make no sense."""
    for holder in (arguments, arguments.machine):
        for field in dataclasses.fields(holder):
            value = getattr(holder, field.name)
            for one in value if field.name == "gpus" else (value,):
                # Latencies may be nothing.
                if isinstance(one, float | int) and not (0 < one < math.inf or (one == 0 and field.name.endswith("_us"))):
                    raise ConfigError(f"--{field.name.replace('_', '-')} {one}: must be greater than 0")
    if not arguments.gpus or not arguments.scaling:
        raise ConfigError(f"--{'scaling' if arguments.gpus else 'gpus'}: names none; give one or more, or leave it out")
    for gpus in arguments.gpus:
        arguments.machine.nodes(gpus)
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        raise ConfigError(f"--json {arguments.json}: there is no folder {arguments.json.parent}; make it")


def main() -> None:
    arguments, rest = tyro.cli(
        Annotated[Arguments, tyro.conf.OmitArgPrefixes], prog="scaling", default=Arguments(Machine()), return_unknown_args=True
    )
    machine, rows = arguments.machine, []
    try:
        _check(arguments)
        config, spec = read_config(arguments.preset, rest, "scaling", "cuda")
        predicted: Callable[[Config, int], Prediction] = functools.lru_cache(
            lambda config, gpus: predict(config, spec, gpus, machine, arguments.depth)
        )
        alone = predicted(config, 1)
    except (ConfigError, EnvError) as error:
        sys.exit(f"error: {error}")
    rates = ", ".join(f"{field.name} {getattr(machine, field.name):g}" for field in dataclasses.fields(machine))
    print(
        f"{config.env}, preset {config.preset}: counted and calculated, nothing is measured\n{rates}\n"
        "a rank's share of an iteration of training, R at its greatest, its parts in ms; then the run"
    )
    for scaling in arguments.scaling:
        print(f"\n{scaling}\n{HEAD}")
        for gpus in arguments.gpus:
            try:
                found = predicted(grown(config, gpus) if scaling == "weak" else config, gpus)
            except (ConfigError, RanksError) as error:
                print(f"{gpus:4d} {machine.nodes(gpus):5d} cannot be: {error}")
                rows.append({"scaling": scaling, "gpus": gpus, "refused": str(error)})
                continue
            print(line_of(found, alone), flush=True)
            rows.append(json_of(found, alone, scaling))
    if arguments.json:
        try:
            write_json(arguments.json, {"env": config.env, "preset": config.preset, "machine": dataclasses.asdict(machine), "rows": rows})
        except OSError as error:
            sys.exit(f"error: --json {arguments.json}: {error.strerror or error}; give another file")


if __name__ == "__main__":
    main()
