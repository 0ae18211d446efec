"""Everything that lives across iterations: allocated once, here, and written in place ever after."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from speedyzero import ring as replay
from speedyzero.config import Config, ConfigError
from speedyzero.emulators import Emulators
from speedyzero.envs import EnvSpec
from speedyzero.graph import StreamTurn, Turn
from speedyzero.learn import LEARN_METRICS
from speedyzero.nets import Network, outline
from speedyzero.norm_over_ranks import normalise_over_ranks
from speedyzero.optim import Learner, make_learner
from speedyzero.pixels import measure_pixels
from speedyzero.ranks import ALONE, Ranks
from speedyzero.ring import Inbox, Ring
from speedyzero.search import SearchResult
from speedyzero.sizes import NetworkSpec, network_spec
from speedyzero.snapshot import fold, make_snapshot
from speedyzero.stages import Progress
from speedyzero.torchrun import on_this_machine
from speedyzero_kernels import dispatch

SEARCH_METRICS = ("search/visit_entropy", "search/depth", "search/root_value", "search/priority_age")


def search_metrics(ring: Ring, result: SearchResult, updates: Tensor) -> dict[str, Tensor]:
    """SEARCH_METRICS [] each of a search after `updates` []."""
    policy = result.policy.float()
    searched = (ring.refreshed_at >= 0) & ~ring.done
    age = torch.where(searched, updates - ring.refreshed_at, 0).sum() / searched.sum().clamp_min(1)
    return {
        "search/visit_entropy": -(policy * policy.clamp_min(1e-12).log()).sum(1).mean(),
        "search/depth": result.depth.float().mean(),
        "search/root_value": result.value.float().mean(),
        "search/priority_age": age,
    }


class Averages:
    """Sums of metrics on the device, read by the host now and then; a name that ends in `_max` keeps its greatest value.

    What is not finite is left out, or one NaN would make the mean of a log interval NaN.
    """

    def __init__(self, names: tuple[str, ...], device: torch.device):
        self.names = names
        self.sums = torch.zeros(len(names), device=device)
        self.counts = torch.zeros(len(names), device=device)
        self._greatest = torch.tensor([name.endswith("_max") for name in names], device=device)

    def add(self, values: dict[str, Tensor]) -> None:
        """Take in one [] value of each name."""
        row = torch.stack([values[name].to(torch.float32) for name in self.names])
        known = row.abs() < torch.inf  # `isfinite` in half the launches
        row = torch.where(known, row, 0.0)
        self.sums.copy_(torch.where(self._greatest, torch.maximum(self.sums, row), self.sums + row))
        self.counts += known

    def drain(self) -> dict[str, float]:
        """Means since the last call, of the names that have any. Waits for the device: for the host loop only."""
        means = torch.where(self._greatest, self.sums, self.sums / self.counts).tolist()
        counts = self.counts.tolist()
        self.sums.zero_()
        self.counts.zero_()
        return {name: mean for name, mean, count in zip(self.names, means, counts, strict=True) if count}


@dataclass
class State:
    """What `iteration` works on."""

    config: Config
    spec: EnvSpec
    emulators: Emulators
    inbox: Inbox
    ring: Ring
    learner: Learner
    snapshot: Network
    generator: torch.Generator
    """The one source of randomness on the device."""
    updates: Tensor
    """[] int64, updates done."""
    search_averages: Averages
    learn_averages: Averages
    turn: Turn
    progress: Progress
    ranks: Ranks = ALONE
    """Who shares the work; all of them hold this state."""

    @property
    def device(self) -> torch.device:
        return self.updates.device

    def refold(self) -> None:
        """Bring the snapshot up to the training network."""
        fold(self.learner.network, self.snapshot)

    def measure_pixels(self) -> None:
        """Let the networks normalise pixels by the frames that are in the ring."""
        pixels = self.learner.network.pixels
        measure_pixels(self.ring, pixels.mean, pixels.scale)
        self.refold()

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that outlives an iteration by name, the emulators' buffers aside."""
        flat = self.learner.optimizer.flat
        return {
            **{f"ring.{name}": tensor for name, tensor in replay.tensors(self.ring).items()},
            **{f"network.{name}": tensor for name, tensor in self.learner.network.state_dict().items()},
            **{f"momentum.{name}": tensor for name, tensor in flat.views(flat.momentum).items()},
            "learner.skipped": self.learner.skipped,
            "learner.skipped_in_a_row": self.learner.skipped_in_a_row,
            **{f"snapshot.{name}": tensor for name, tensor in self.snapshot.state_dict().items()},
            "updates": self.updates,
            "averages.search": self.search_averages.sums,
            "averages.search_counts": self.search_averages.counts,
            "averages.learn": self.learn_averages.sums,
            "averages.learn_counts": self.learn_averages.counts,
        }


def make_network(spec: NetworkSpec, seed: int, device: torch.device) -> Network:
    """A new training network whose weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Network(spec).to(device).train()
    return network.to(memory_format=dispatch.board_format(next(network.parameters())))


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        limits += [int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:")]
    return min(limits) // on_this_machine()


def check_memory(config: Config, spec: EnvSpec, device: torch.device) -> None:
    """Refuse a ring or a network that does not fit, before anything is allocated: what every start can afford. All of a run's memory is
    `memory.check_memory`'s to weigh, which takes seconds.

    Raises:
        ConfigError: with the size, what is available, and for the ring how many positions would fit.
    """
    have = available_memory(device)
    ring = replay.ring_bytes(config.lanes, config.slots, spec.frame_shape, torch.uint8 if spec.image else torch.float32, spec.num_actions)
    if ring > have:
        fit = have * 9 // 10 * config.ring_positions // ring
        raise ConfigError(
            f"--ring-positions {config.ring_positions}: the ring takes {ring / 2**30:.1f} GiB and {have / 2**30:.1f} GiB are free on "
            f"{device.type}; at most about {fit} positions fit"
        )
    # Weights, gradients and momentum, and the snapshot's weights.
    network = 4 * sum(p.nbytes for p in outline(network_spec(config, spec.frame_shape, spec.num_actions)).parameters())
    if network > have:
        raise ConfigError(
            f"--channels {config.channels}, --lstm {config.lstm} or --projection {config.projection}: the network takes "
            f"{network / 2**30:.1f} GiB and {have / 2**30:.1f} GiB are free on {device.type}; lower the largest"
        )


def allocate(config: Config, spec: EnvSpec, device: torch.device, ranks: Ranks = ALONE) -> State:
    """The state at the start of a run. The emulators are not started yet.

    Raises:
        ConfigError: the ring does not fit in memory.
    """
    check_memory(config, spec, device)
    dtype = torch.uint8 if spec.image else torch.float32
    sizes = network_spec(config, spec.frame_shape, spec.num_actions)
    network = make_network(sizes, config.seed, device)
    normalise_over_ranks(network, ranks)
    lanes = config.lanes
    on_cuda = device.type == "cuda"
    emulators = Emulators(
        spec, lanes, config.seed, training=True, threads=config.env_threads, max_episode_steps=config.max_episode_steps,
        sticky_actions=config.sticky_actions, pin=on_cuda, ranks=ranks,
    )  # fmt: skip
    state = State(
        config=config,
        spec=spec,
        emulators=emulators,
        inbox=Inbox(
            frames=torch.zeros(lanes, *spec.frame_shape, dtype=dtype, device=device),
            reward=torch.zeros(lanes, device=device),
            done=torch.zeros(lanes, dtype=torch.bool, device=device),
            first=torch.zeros(lanes, dtype=torch.bool, device=device),
        ),
        ring=replay.allocate(config.lanes, config.slots, spec.frame_shape, dtype, spec.num_actions, device),
        learner=make_learner(network, config),
        snapshot=make_snapshot(sizes, device, config.amp),
        generator=torch.Generator(device).manual_seed(config.seed),
        updates=torch.zeros((), dtype=torch.int64, device=device),
        search_averages=Averages(SEARCH_METRICS, device),
        learn_averages=Averages(LEARN_METRICS, device),
        turn=StreamTurn(emulators, device) if on_cuda else Turn(emulators),
        progress=Progress(device),
        ranks=ranks,
    )
    state.refold()
    return state
