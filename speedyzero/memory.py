"""The memory plan: what a run will allocate, known before it allocates anything, and the refusal of one that does not fit.

What stays is made by the functions that make it in a run, of tensors with a shape but no memory: exact. A search and an update run
once on such tensors while `Live` counts what is alive: estimates, without the workspaces of cuDNN, cuBLAS and MKL-DNN, the allocator's
rounding, captured graphs' nodes, the CUDA context, and EnvPool's own memory. **No estimate was compared with a GPU yet.**
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from math import prod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from speedyzero import learn
from speedyzero import ring as replay
from speedyzero.config import Config, ConfigError
from speedyzero.emulators import Emulators
from speedyzero.envs import EnvSpec
from speedyzero.nets import Network
from speedyzero.optim import Learner, make_learner
from speedyzero.schedule import search_roots
from speedyzero.sizes import network_spec
from speedyzero.snapshot import make_snapshot
from speedyzero.state import available_memory
from speedyzero_kernels import tree

CPU, META = torch.device("cpu"), torch.device("meta")
PINNED = "pinned host"
SEARCH, LEARN = "2 search", "5 learn"
WIDTHS = ("channels", "lstm", "projection")
FLAGS = {
    "ring": ("ring_positions",), "emulators": ("lanes",), "inbox": ("lanes",), "learn": ("batch_size", *WIDTHS),
    "search": ("simulations", "refresh_roots", "batch_size", "lanes", "eval_episodes", *WIDTHS),
}  # fmt: skip
"""The flags that make an owner smaller; of the others, WIDTHS."""


class Row(NamedTuple):
    """What one owner allocates."""

    owner: str
    what: str
    bytes: int
    where: str
    """The device type, or "pinned host"."""
    stage: str | None = None
    """The stage of the iteration that it lives in; None: it stays. What is of two stages is never there at once."""


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that operations under it made and that are still alive: `now`, and the most so far, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, tuple[weakref.ref, int]] = {}

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self._meet((args, kwargs), own=False)
        out = func(*args, **(kwargs or {}))
        self._meet(out, own=True)
        return out

    def _meet(self, tensors: Any, own: bool) -> None:
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._known:
                    size = storage.nbytes() if own else 0
                    self._known[key] = (weakref.ref(storage, lambda _, key=key: self._forget(key)), size)
                    self.now += size
                    self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self._known.pop(key)[1]


def plan(config: Config, spec: EnvSpec, device_type: Literal["cpu", "cuda"]) -> list[Row]:
    """Every owner's memory in a run with a resolved config. Takes a few seconds the first time, and next to no memory.

    Raises:
        ConfigError: a search, a batch or a network beyond what the kernels can do.
    """
    cuda, host = device_type == "cuda", PINNED if device_type == "cuda" else device_type
    dtype = torch.uint8 if spec.image else torch.float32
    ring = replay.ring_bytes(config.lanes, config.slots, spec.frame_shape, dtype, spec.num_actions)
    frames = config.lanes * config.slots * prod(spec.frame_shape) * dtype.itemsize
    one = vars(Emulators(spec, 1, config.seed, training=True))  # starts nothing
    inbox = config.lanes * sum(one[field.name].nbytes for field in dataclasses.fields(replay.Inbox))
    with FakeTensorMode() as fake, Live() as live:
        learner = make_learner(Network(network_spec(config, spec.frame_shape, spec.num_actions)).train(), config)
    momentum, statistics = learner.optimizer.flat.momentum.nbytes, learner.statistics.words.nbytes
    with META:
        snapshot = make_snapshot(learner.network.spec, META, config.amp or cuda)
    folded = sum(tensor.nbytes for tensor in (*snapshot.parameters(), *snapshot.buffers()))
    rows = [
        Row("ring", "frames, searches, priorities", ring, device_type),
        Row("emulators", "what they say, their actions", inbox + config.lanes * (one["game_over"].nbytes + one["actions"].nbytes), host),
        Row("inbox", "what they said last", inbox, device_type),
        Row("network", "weights, statistics", live.now - 2 * momentum - statistics, device_type),
        Row("optimizer", "gradients, momentum, statistics to go back to", 2 * momentum + statistics, device_type),
        Row("snapshot", "folded weights", folded, device_type),
        Row("checkpoint", "copy of the state", ring - frames + 2 * momentum + statistics + folded, host),
    ]
    stage = "search"
    try:
        rows.append(Row("search", "at its peak", _search_peak(config, snapshot), device_type, SEARCH))
        stage = "learn"
        rows.append(Row("learn", "at its peak", _learn_peak(fake, config, spec, learner), device_type, LEARN))
    except ValueError as error:  # what the kernels refuse
        raise ConfigError(f"{_flags(config, stage)}: beyond what the kernels can do ({error}); lower one") from error
    if cuda and config.graph != "off":
        # `graph.Graphs` runs each function once as it is before it captures it, while the graphs before it keep their pool.
        rows.append(Row("graphs", "their pool, beside the first run of another", _peak(rows, device_type)[1], device_type))
    return rows


@torch.no_grad()
def _search_peak(config: Config, snapshot: Network) -> int:
    """The peak of the largest search, but for the passing temporaries of its trees: every allocation of `act.search_observations`."""
    roots, spec = max(search_roots(config).values()), snapshot.spec
    with META, Live() as live:
        observation = torch.empty(roots, spec.in_channels, spec.height, spec.width, dtype=snapshot.input_format["dtype"])
        noise, action = torch.empty(roots, spec.actions), torch.empty(roots, dtype=torch.int64)
        latent, hidden = snapshot.represent(observation), snapshot.initial_hidden(roots)
        kept = tree.allocate(
            roots=roots, actions=spec.actions, simulations=config.simulations, discount=config.discount,
            lstm_horizon=config.lstm_horizon, device=META, layout="kernel",
        ), noise, *(state.new_empty(config.simulations, *state.shape) for state in (latent, hidden))  # fmt: skip
        for _ in range(2):  # the second begins while what the first said is still held
            said = snapshot.model_step(latent.clone(), hidden.clone(), action)
        del said, kept
    return live.peak


def _learn_peak(fake: FakeTensorMode, config: Config, spec: EnvSpec, learner: Learner) -> int:
    """The peak of one update, without the ring."""
    with fake:
        ring = replay.allocate(1, 1, spec.frame_shape, torch.uint8 if spec.image else torch.float32, spec.num_actions, CPU)
    with fake, Live() as live:
        weights, updates = torch.ones(config.batch_size), torch.zeros((), dtype=torch.int64)
        learn.update(learner, ring, weights.long(), weights, updates, config, torch.Generator())
    return live.peak


def total(rows: list[Row], where: str) -> int:
    """Bytes that are there at once at the most: what stays, and the greatest stage."""
    return sum(row.bytes for row in rows if row.where == where and row.stage is None) + _peak(rows, where)[1]


def _peak(rows: list[Row], where: str) -> tuple[str | None, int]:
    """The stage that holds the most besides what stays, and how much."""
    return max(((row.stage, row.bytes) for row in rows if row.where == where and row.stage), key=lambda item: item[1], default=(None, 0))


def table(rows: list[Row]) -> str:
    """The plan as text: a line a row, and what it comes to."""
    lines = []
    for row in rows:
        when = f", only in {row.stage}" if row.stage else ""
        lines.append(f"{row.owner:12} {row.what:46} {size_text(row.bytes):>12}  {row.where}{when}")
    lines += [f"total on {where}: {size_text(total(rows, where))}" for where in dict.fromkeys(row.where for row in rows)]
    return "\n".join(lines)


def size_text(size: int) -> str:
    """Bytes for people: 2.57 GiB, 12.00 MiB, 8 B."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size} B"


def check_memory(config: Config, spec: EnvSpec, device: torch.device) -> None:
    """Raise ConfigError, which names the flags of the biggest owner, if a run does not fit."""
    rows = plan(config, spec, device.type)
    for where, holder in ((device.type, device), (PINNED, CPU)):
        need, have, stage = total(rows, where), available_memory(holder), _peak(rows, where)[0]
        if need <= have:
            continue
        # Not the graphs' pool, which is the largest stage once more and shrinks with it.
        there = [row for row in rows if row.where == where and row.stage in (None, stage) and row.owner != "graphs"]
        biggest = max(there, key=lambda row: row.bytes)
        fit = (have * 9 // 10 - need + biggest.bytes) * config.ring_positions // biggest.bytes
        raise ConfigError(
            f"{_flags(config, biggest.owner)}: the run takes {size_text(need)} and {size_text(have)} are free on {where}; the biggest part "
            f"is the {biggest.owner} with {size_text(biggest.bytes)}; "
            + (f"at most about {fit} positions fit" if biggest.owner == "ring" and fit > 0 else "lower one")
        )


def _flags(config: Config, owner: str) -> str:
    return " or ".join(f"--{name.replace('_', '-')} {getattr(config, name)}" for name in FLAGS.get(owner, WIDTHS))
