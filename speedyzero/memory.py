"""The memory plan: what a run will allocate, known before it allocates anything, and the refusal of one that does not fit.

What lives across iterations is made here by the functions that make it in a run, of tensors that have a shape and a dtype but no memory:
those rows are exact, and so are observations, trees and the states of their nodes. The rest is measured: the code that searches and
learns runs once on such tensors while `Live` counts what is alive.

How good the estimates are. On a CPU `Live` sees the same within 1% in a real iteration; MKL-DNN and the matrix library take more for
themselves (little where channels are a multiple of 16; it was up to two thirds with 4 channels). On CUDA the reference runs in place of
the kernels, whose convolutions on the latent and expectations of the heads need fewer temporaries: a little too high. The workspaces of
cuDNN and cuBLAS, the allocator's rounding and fragments, and the nodes of captured graphs are missing: too low. **No estimate was compared
with a GPU yet.** Left out everywhere: the CUDA context, EnvPool's own memory, the few numbers a position that sampling, targets and refresh
hold for a moment, and of the evaluation all but its search.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from speedyzero import learn
from speedyzero import ring as replay
from speedyzero.config import Config, ConfigError
from speedyzero.envs import Emulators, EnvSpec
from speedyzero.nets import Network, NetworkSpec, make_snapshot, network_spec
from speedyzero.ring import Ring
from speedyzero.schedule import search_roots
from speedyzero.stages import Progress
from speedyzero.state import LEARN_METRICS, SEARCH_METRICS, Averages, available_memory
from speedyzero_kernels import tree
from speedyzero_kernels.gather import observations
from speedyzero_kernels.support import to_scalar

META = torch.device("meta")
PINNED = "pinned host"
SEARCH, LEARN = "2 search", "5 learn"
SAVED = {
    ("network", "parameters, flat"), ("network", "BatchNorm statistics"), ("optimizer", "momentum, flat"), ("snapshot", "weights"),
    ("counters", "all"),
}  # fmt: skip
"""Rows that a checkpoint holds besides the ring's."""


@dataclass(frozen=True)
class Row:
    """One allocation, or several of a kind."""

    owner: str
    what: str
    shape: str
    dtype: str
    bytes: int
    where: str
    """The device type, or "pinned host"."""
    stage: str | None = None
    """The stage of the iteration that it lives in; None: it stays. What is of two stages is never there at once."""
    exact: bool = True


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that operations under it made and that are still alive: `now`, and the greatest so far, `peak`.

    What was there before does not count, whatever is done to it. Sizes are those asked for, before an allocator rounds them up.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, tuple[weakref.ref, int]] = {}

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self._meet((args, kwargs), own=False)
        out = func(*args, **(kwargs or {}))
        self._meet(out, own=True)
        return out

    def own(self, tensor: Tensor) -> int:
        """Bytes of the storage of `tensor` if it was made under this mode, else 0."""
        return self._known.get(tensor.untyped_storage()._cdata, (None, 0))[1]

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
    """Every allocation of a run with a resolved config. Takes a few seconds the first time, and next to no memory.

    Raises:
        ConfigError: a search, a batch or a network beyond what the kernels can do.
    """
    sizes = network_spec(config, spec.frame_shape, spec.num_actions)
    rows = _ring_rows(config, spec, device_type) + _emulator_rows(config, spec, device_type)
    with FakeTensorMode() as fake:
        network = Network(sizes).train()
        learner = learn.make_learner(network, config)
    rows += _learner_rows(learner, device_type)
    snapshot = _snapshot(sizes, config.amp, device_type)
    rows += [
        _sum("snapshot", "weights", snapshot.parameters(), device_type),
        _sum("snapshot", "constants", snapshot.buffers(), device_type),
    ]
    roots = max(search_roots(config).values())
    for flag, measure in (
        (_roots_flag(config), lambda: _search_rows(config, spec, snapshot, roots, device_type)),
        ("batch_size", lambda: _learn_rows(fake, config, spec, learner, device_type)),
    ):
        try:
            rows += measure()
        except ValueError as error:  # what the kernels refuse
            at_fault = f"{_flag(config, flag)} or {_flag(config, 'channels')}"
            raise ConfigError(f"{at_fault}: beyond what the kernels can do ({error}); lower it") from error
    rows += _checkpoint_rows(rows, device_type)
    if device_type == "cuda" and config.graph != "off":
        # `graph.Graphs` runs each function once as it is before it captures it, while the graphs before it keep their pool.
        rows.append(Row(
            "graphs", "the graphs' pool, beside the first run of another", "", "", _peak(rows, device_type)[1], device_type, exact=False
        ))  # fmt: skip
    return rows


def total(rows: list[Row], where: str) -> int:
    """Bytes that are there at once at the most: what stays, and the greatest stage."""
    return sum(row.bytes for row in rows if row.where == where and row.stage is None) + _peak(rows, where)[1]


def check_memory(config: Config, spec: EnvSpec, device: torch.device) -> None:
    """Refuse a run that does not fit, before anything is allocated.

    Raises:
        ConfigError: with what the run takes, what is available, the biggest owner, and the flag that makes it smaller.
    """
    rows = plan(config, spec, device.type)
    for where, holder in ((device.type, device), (PINNED, torch.device("cpu"))):
        need, have = total(rows, where), available_memory(holder)
        if need > have:
            raise ConfigError(_refusal(config, rows, where, need, have))


def table(rows: list[Row]) -> str:
    """The plan as text: a line a row, the sum of each owner, and what it comes to."""
    cells = [("owner", "what", "shape", "dtype", "size", "where", "")]
    for row in rows:
        notes = ([] if row.stage is None else [f"in {row.stage}"]) + ([] if row.exact else ["estimate"])
        cells.append((row.owner, row.what, row.shape, row.dtype, size_text(row.bytes), row.where, ", ".join(notes)))
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = []
    for line in cells:
        fitted = [text.ljust(width) for text, width in zip(line, widths, strict=True)]
        fitted[4] = line[4].rjust(widths[4])
        lines.append("  ".join(fitted).rstrip())
    lines += ["", "by owner"]
    owners = list(dict.fromkeys((row.owner, row.where) for row in rows))
    for owner, where in owners:
        size = sum(row.bytes for row in rows if (row.owner, row.where) == (owner, where))
        lines.append(f"  {owner.ljust(widths[0])}  {size_text(size).rjust(widths[4])}  {where}")
    lines.append("")
    for where in dict.fromkeys(row.where for row in rows):
        stage, peak = _peak(rows, where)
        at_most = f", of which {size_text(peak)} only during {stage}, the largest stage" if stage else ""
        lines.append(f"total on {where}: {size_text(total(rows, where))}{at_most}")
    return "\n".join(lines)


def size_text(size: int) -> str:
    """Bytes for people: 2.57 GiB, 12.00 MiB, 8 B."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size} B"


def _peak(rows: list[Row], where: str) -> tuple[str | None, int]:
    """The stage that holds the most besides what stays, and how much."""
    stages: dict[str | None, int] = {}
    for row in rows:
        if row.where == where and row.stage is not None:
            stages[row.stage] = stages.get(row.stage, 0) + row.bytes
    return max(stages.items(), key=lambda item: item[1], default=(None, 0))


def _row(owner: str, what: str, tensor: Tensor, where: str, stage: str | None = None, shape: tuple[int, ...] | None = None) -> Row:
    shape = tuple(tensor.shape) if shape is None else shape
    elements = 1
    for size in shape:
        elements *= size
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Row(owner, what, " x ".join(map(str, shape)), dtype, elements * tensor.element_size(), where, stage)


def _sum(owner: str, what: str, tensors: Iterable[Tensor], where: str, stage: str | None = None) -> Row:
    """One row of several tensors, none of them a view of another."""
    tensors = list(tensors)
    dtypes = " ".join(dict.fromkeys(str(tensor.dtype).removeprefix("torch.") for tensor in tensors))
    return Row(owner, what, f"{len(tensors)} tensors", dtypes, sum(tensor.nbytes for tensor in tensors), where, stage)


def _one_slot(config: Config, spec: EnvSpec, device: torch.device) -> Ring:
    """The ring of one lane and one slot: PyTorch cannot even name the size of the largest that a flag can ask for."""
    one = dataclasses.replace(config, lanes=1, ring_positions=1)
    return replay.allocate(one, spec.frame_shape, torch.uint8 if spec.image else torch.float32, spec.num_actions, device)


def _ring_rows(config: Config, spec: EnvSpec, device_type: str) -> list[Row]:
    rows = []
    for name, tensor in replay.tensors(_one_slot(config, spec, META)).items():
        shape = (config.lanes, config.slots, *tensor.shape[2:]) if tensor.dim() else ()
        rows.append(_row("ring", name, tensor, device_type, shape=shape))
    return rows


def _emulator_rows(config: Config, spec: EnvSpec, device_type: str) -> list[Row]:
    emulators = Emulators(spec, 1, config.seed, training=True)  # starts nothing; a numpy view has no meta form
    host = PINNED if device_type == "cuda" else device_type
    rows = []
    for name in ("frames", "reward", "done", "first", "game_over", "actions"):
        tensor = getattr(emulators, name)
        rows.append(_row("emulators", name, tensor, host, shape=(config.lanes, *tensor.shape[1:])))
    for name in (field.name for field in dataclasses.fields(replay.Inbox)):
        tensor = getattr(emulators, name)
        rows.append(_row("inbox", name, tensor, device_type, shape=(config.lanes, *tensor.shape[1:])))
    return rows


def _learner_rows(learner: learn.Learner, device_type: str) -> list[Row]:
    network, optimizer = learner.network, learner.optimizer
    kept = network.state_dict().keys() - dict(network.named_parameters()).keys()
    statistics = [tensor for name, tensor in network.named_buffers() if name in kept]
    constants = [tensor for name, tensor in network.named_buffers() if name not in kept]
    rows = [
        _row("network", "parameters, flat", optimizer.flat.values, device_type),
        _sum("network", "BatchNorm statistics", statistics, device_type),
        Row("network", "padding between them", "", "", learner.statistics.words.nbytes - sum(s.nbytes for s in statistics), device_type),
        _sum("network", "constants", constants, device_type),
        _row("optimizer", "gradients, flat", optimizer.flat.grads, device_type),
        _row("optimizer", "momentum, flat", optimizer.flat.momentum, device_type),
        _row("learner", "BatchNorm statistics to go back to", learner.statistics.kept, device_type),
        _row("learner", "the last update that was skipped", learner.evidence.words, device_type),
    ]
    small = [optimizer.lr]
    if isinstance(optimizer, learn.ClippedLARS):
        small.append(optimizer.segments.chunks)
    averages = [Averages(names, META) for names in (SEARCH_METRICS, LEARN_METRICS)]
    counters = [tensor for each in averages for tensor in vars(each).values() if isinstance(tensor, Tensor)]
    counters += [tensor for tensor in vars(Progress(META)).values() if isinstance(tensor, Tensor)]
    counters += [learner.skipped, learner.skipped_in_a_row, learner.reported]
    counters += [torch.zeros((), dtype=torch.int64, device=META)]  # updates
    return [*rows, _sum("optimizer", "learning rate and layers", small, device_type), _sum("counters", "all", counters, device_type)]


def _snapshot(sizes: NetworkSpec, amp: bool, device_type: str) -> Network:
    with META:
        snapshot = make_snapshot(sizes, META, amp)
    return snapshot.to(dtype=torch.bfloat16, memory_format=torch.channels_last) if device_type == "cuda" else snapshot


@torch.no_grad()
def _search_rows(config: Config, spec: EnvSpec, snapshot: Network, roots: int, device_type: str) -> list[Row]:
    """One search as `iteration` does it, of `roots` positions, with the last two of its simulations only: they hold the most.

    The reference's own temporaries count on a CPU alone, since the kernel of the gather has none; nor has any form of the tree.
    """
    kernels, actions, ring = device_type == "cuda", spec.num_actions, _one_slot(config, spec, META)
    layout = snapshot.input_format | ({"memory_format": torch.channels_last} if kernels else {})

    with META, Live() as live:
        index = torch.empty(roots, dtype=torch.int64)
        frames = observations(ring.frames, ring.first, index, config.frame_stack, **layout)
        if kernels:
            live.peak = live.now
        noise = torch.empty(roots, actions)
        latent = snapshot.represent(frames)
        prediction = snapshot.predict(latent)
        value = to_scalar(prediction.value)
        hidden = snapshot.initial_hidden(roots)

        before = live.now
        trees = tree.allocate(
            roots=roots, actions=actions, simulations=config.simulations, discount=config.discount, lstm_horizon=config.lstm_horizon,
            device=META, layout="kernel",
        )  # fmt: skip
        tree_bytes = live.now - before
        latents, hiddens = (state.new_empty(config.simulations, *state.shape) for state in (latent, hidden))
        for _ in range(min(2, config.simulations)):
            leaf = tree.Selection(*torch.empty(3, roots, dtype=torch.int64), torch.empty(roots, dtype=torch.bool))
            rows = leaf.parent * roots + index
            # The name holds on to what the model said at the simulation before, as names do in `search`.
            said = snapshot.model_step(
                latents.flatten(0, 1).index_select(0, rows), hiddens.flatten(0, 1).index_select(0, rows), leaf.action
            )
        del trees, value, said

    each = f"{roots} roots, {config.simulations} simulations"
    rows = [
        _row("search", "observations", frames, device_type, SEARCH),
        _row("search", "noise", noise, device_type, SEARCH),
        Row("tree", "nodes and edges", each, "float64 and indices", tree_bytes, device_type, SEARCH),
        _row("tree", "latents of nodes", latents, device_type, SEARCH),
        _row("tree", "LSTM states of nodes", hiddens, device_type, SEARCH),
    ]
    return [*rows, _working("search", "representation and model step", rows, live.peak, device_type, SEARCH)]


def _learn_rows(
    fake: FakeTensorMode, config: Config, spec: EnvSpec, learner: learn.Learner, device_type: str
) -> list[Row]:
    """One update as `learn.update` does it; its own temporaries count on a CPU alone where the kernels have none."""
    kernels, cpu, saved = device_type == "cuda", torch.device("cpu"), {}
    with fake:
        ring = _one_slot(config, spec, cpu)
    with fake, Live() as live:
        weights = torch.zeros(config.batch_size)
        batch = learn.gather_batch(ring, weights.long(), weights, config, torch.Generator(cpu))
        if kernels:
            live.peak = live.now
        frames, rest = (batch.observation, batch.future), [*vars(batch.targets).values(), weights]
        given = {tensor.untyped_storage()._cdata for tensor in (*frames, *rest)}

        def keep(tensor: Tensor) -> Tensor:
            key = tensor.untyped_storage()._cdata
            if key not in given:
                saved[key] = live.own(tensor)
            return tensor

        with learn.mixed_precision(config, weights), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss, _, _ = learn.losses(learner.network, batch, config)
        loss.backward()
        del loss
        peak, before = live.peak, live.now
        if not kernels:  # the kernel needs a few sums
            live.peak = before
            learner.optimizer.step()
            scratch = live.peak - before

    each = f"batch {config.batch_size}, unroll {config.unroll}"
    rows = [
        _row("learn", "observations", frames[0], device_type, LEARN),
        _row("learn", "futures", frames[1], device_type, LEARN),
        _sum("learn", "targets and weights", rest, device_type, LEARN),
        Row("learn", "activations for backward", each, "", sum(saved.values()), device_type, LEARN, exact=False),
    ]
    if not kernels:
        rows.append(Row("optimizer", "scratch", "", "", scratch, device_type, LEARN, exact=False))
    return [*rows, _working("learn", "forward and backward", rows, peak, device_type, LEARN)]


def _checkpoint_rows(rows: list[Row], device_type: str) -> list[Row]:
    """What `saver.Saver` keeps on the host: a copy of what is saved."""
    frames = next(row.bytes for row in rows if (row.owner, row.what) == ("ring", "frames"))
    saved = sum(row.bytes for row in rows if row.owner == "ring" or (row.owner, row.what) in SAVED) - frames
    host = PINNED if device_type == "cuda" else device_type
    return [Row("checkpoint", "copy of the state", "", "", saved, host, exact=False)]


def _working(owner: str, what: str, rows: list[Row], peak: int, device_type: str, stage: str) -> Row:
    """What is alive at the stage's peak beyond its other rows."""
    beyond = max(0, peak - sum(row.bytes for row in rows))
    return Row(owner, f"working memory of {what}", "", "", beyond, device_type, stage, exact=False)


def _flag(config: Config, name: str) -> str:
    return f"--{name.replace('_', '-')} {getattr(config, name)}"


def _roots_flag(config: Config) -> str:
    """The flag that most of the roots of the largest search come from."""
    phases = search_roots(config)
    if max(phases, key=phases.__getitem__) == "evaluation":
        return "eval_episodes"
    if config.lanes > phases["learn"]:
        return "lanes"
    return "batch_size" if config.refresh == "sampled" else "refresh_roots"


def _refusal(config: Config, rows: list[Row], where: str, need: int, have: int) -> str:
    stage, _ = _peak(rows, where)
    owners: dict[str, int] = {}
    for row in rows:
        if row.where == where and row.stage in (None, stage):
            # The graphs' pool is the largest stage once more: it shrinks with it.
            owners[row.owner] = owners.get(row.owner, 0) + (0 if row.owner == "graphs" else row.bytes)
    biggest = max(owners, key=owners.__getitem__)
    flags = {
        "ring": ["ring_positions"], "emulators": ["lanes"], "inbox": ["lanes"], "search": [_roots_flag(config)],
        "tree": ["simulations", _roots_flag(config)], "learn": ["batch_size"],
    }  # fmt: skip
    first, *others = [_flag(config, name) for name in flags.get(biggest, ["channels", "lstm", "projection"])]
    advice = " or ".join(("lower it", *others))
    if biggest == "ring":
        fit = (have * 9 // 10 - need + owners["ring"]) * config.ring_positions // owners["ring"]
        advice = f"at most about {fit} positions fit" if fit > 0 else "lower it, and what else takes much: --dry-run lists it"
    return (
        f"{first}: the run takes {size_text(need)} and {size_text(have)} are free on {where}; the biggest part is the {biggest} with "
        f"{size_text(owners[biggest])}; {advice}"
    )
