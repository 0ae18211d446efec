"""What an iteration launches on CUDA, counted on any machine: the trainer's own code, run on tensors without memory.

    python -m tools.profile.launches                               # an update and a simulation of efficientzero and of speedyzero
    python -m tools.profile.launches --operations --env Pong-v5    # and by operation

Each operation of PyTorch that does work, and each launch of a Triton kernel, becomes a `Launch` of the stage that it is made in, with its
FLOPs and bytes; views and allocations launch nothing. The tensors are fake ones of the CPU, as autocast knows no `meta` tensors; in their
place stands what CUDA does otherwise: kernels instead of references, the fused cell of the LSTM, and the operations of SEVERAL.

Little is run: every simulation launches the same, and so does every update. `sampled` refresh is counted as a sweep of as many roots.
"""

import contextlib
import dataclasses
import functools
import math
import operator
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, KernelInterface

from speedyzero import nets, ranks, schedule
from speedyzero.config import Config, ConfigError
from speedyzero.envs import EnvError, EnvSpec
from speedyzero.iteration import iteration
from speedyzero.ranks import ALONE, Ranks
from speedyzero_kernels import dispatch
from tools.profile.blank import blank_state
from tools.profile.settings import read_config

DEPTH = 4.0
"""Mean number of nodes that a simulation goes down (d of kernels/README.md), unless told."""
OUTSIDE = "outside"
SEVERAL = {"native_batch_norm": (3, (0,)), "native_batch_norm_backward": (2, (0, 1)), "convolution_backward": (2, (0,))}
"""Operations that CUDA does in several launches: how many, and which arguments a second one reads again. A BatchNorm in bf16 is PyTorch's
own there: statistics, running statistics, the result; its backward pass reduces first. A convolution has a gradient of its input and one
of its weight."""
NO_WORK = {"_unsafe_view", "promote_types", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
PARTLY = {"index_select", "index", "gather", "index_put_", "index_copy_", "index_fill_", "scatter_reduce_"}
"""Operations that touch no more of their first argument than their other tensors, or their result, have numbers."""
WITHOUT_FLOOR = {"speedyzero_kernels.norm"}
"""Kernels whose work could be a part of the convolutions around them."""
ONLY_WRITE = {"copy_", "zero_", "fill_"}


@dataclass(frozen=True)
class Launch:
    """An operation of an iteration."""

    stage: str
    """The innermost of speedyzero/stages.py, or OUTSIDE."""
    name: str
    launches: int
    flops: float
    """A multiply-add as 2."""
    moved: float
    """Bytes, as it is launched."""
    least: float
    """Bytes, each operand read and each result written once."""
    has_floor: bool
    """A convolution, a product or one of the library's kernels. All other work could be done within these, at no cost; so could that of the
    kernels WITHOUT_FLOOR."""
    sent: float = 0.0
    """Bytes that all ranks have after a message between them; 0 if it is none."""

    def floor(self, tflops: float, tbs: float) -> float:
        """Seconds at least, at so many TFLOP/s and TB/s."""
        return max(self.flops / (1e12 * tflops), self.least / (1e12 * tbs)) if self.has_floor else 0.0

    def seconds(self, tflops: float, tbs: float, launch_us: float) -> float:
        """As it is launched, each launch costing `launch_us` besides."""
        return max(self.flops / (1e12 * tflops), self.moved / (1e12 * tbs)) + 1e-6 * launch_us * self.launches


Launches = Counter[Launch]
"""How often each is made."""


def summed(found: Launches, value: Callable[[Launch], float]) -> float:
    """The sum of a value over all launches."""
    return sum(times * value(launch) for launch, times in found.items())


flops, moved, sent = (operator.attrgetter(name) for name in ("flops", "moved", "sent"))


def number(found: Launches) -> int:
    """How many launches they are."""
    return round(summed(found, operator.attrgetter("launches")))


def size(x: Tensor) -> int:
    """Bytes of a tensor; what a stride of 0 repeats counts once."""
    return x.itemsize * math.prod(length for length, step in zip(x.shape, x.stride(), strict=True) if step)


def tensors_in(*trees: Any) -> list[Tensor]:
    """The tensors among arguments or results, each once."""
    return list({id(x): x for x in tree_leaves(trees) if isinstance(x, Tensor)}.values())


def operation_bytes(name: str, args: tuple, kwargs: dict, out: Any) -> float:
    """Bytes of an operation of PyTorch that reads every operand once and writes every result once."""
    read, written = tensors_in(args, kwargs), sum(map(size, tensors_in(out)))
    if name in ONLY_WRITE:
        return written + sum(map(size, read[1:]))
    if name in PARTLY:
        others = max(map(size, read[1:] if name.endswith("_") else tensors_in(out)), default=0)
        return 2 * min(size(read[0]), others) + sum(map(size, read[1:]))
    return written + sum(map(size, read))


def kernel_cost(name: str, given: dict[str, Any], depth: float, simulations: int | None) -> tuple[float, float]:
    """FLOPs and bytes of a launch of a kernel of the library with the arguments `given`, as kernels/README.md states them.

    A kernel that is not named here moves each of its tensors once.
    """
    once = sum(map(size, tensors_in(given)))
    if name == "_conv3x3_kernel":
        return 18.0 * given["rows"] * given["INPUTS"] * given["OUTPUTS"], once
    if name == "_head_kernel":
        convolved = given["PIXELS"] * given["INPUTS"] * given["CHANNELS"]
        hidden = max(given["PIXELS"] * given["CHANNELS"], given["INPUTS"] * (not given["PIXELS"])) * given["HIDDEN"]
        return 2.0 * given["boards"] * (convolved + hidden + given["HIDDEN"] * given["OUTPUTS"]), once
    if name == "_sums_kernel" and not given["LAYERED"]:  # plain SGD clips by the gradient alone
        return 0.0, once - size(given["weights"])
    if name == "_step_kernel":  # weights and momentum are written, too
        return 0.0, once + size(given["weights"]) + size(given["momentum"])
    if name == "_observations_kernel":
        # The stacks of neighbours share their frames: each is read once.
        frame = given["C"] * given["H"] * given["W"] * given["frames"].itemsize
        return 0.0, size(given["out"]) + given["index"].numel() * frame
    if name == "_targets_kernel":
        unroll, outputs = given["unroll"], ("value_out", "prefix_out", "policy_out", "action_out", "mask_out", "policy_mask_out")
        read = 16 + 5 * (unroll + given["n_max"] + 1) + (unroll + 1) * (4 + 2 * given["actions"]) + 8 * unroll
        return 0.0, given["samples"] * read + sum(size(given[name]) for name in outputs)
    if name in ("_puct_kernel", "_gumbel_kernel", "_backup_kernel", "_plant_kernel"):
        actions, nodes = given["A"], given["M"] if simulations is None else simulations + 1
        return 0.0, given["visits"].shape[0] * {
            "_puct_kernel": depth * (24 * actions + 4) + 25, "_gumbel_kernel": depth * (28 * actions + 12) + 25,
            "_backup_kernel": 14 * nodes + 24 * depth + 32 * actions + 36, "_plant_kernel": 34 * actions + 48 * given["M"],
        }[name]  # fmt: skip
    return 0.0, once


def multi_tensor_launches(tensors: list[Tensor]) -> int:
    """Launches of a `torch._foreach` operation on pairs of tensors: each of at most 64 of them, and of 320 chunks of 65,536 numbers.

    PyTorch's `multi_tensor_apply` (aten/src/ATen/native/cuda/MultiTensorApply.cuh).
    """
    launches = held = blocks = 0
    for tensor in tensors:
        held += 1
        for last in [False] * (-(-tensor.numel() // 65536) - 1) + [True]:
            blocks += 1
            if blocks == 320 or (last and held == 64):
                launches, blocks, held = launches + 1, 0, 0 if last else 1
    return launches + (blocks > 0)


class Counting(TorchDispatchMode):
    """Notes every launch that is made under it in `found`; those of kernels are not made, and no message to other ranks is sent.

    depth: mean number of nodes that a simulation goes down. simulations: of the search whose backups are seen, for their mean; those of
    the trees unless told.
    """

    def __init__(self, depth: float = DEPTH, simulations: int | None = None):
        super().__init__()
        self.found: Launches = Counter()
        self.simulations, self.depth = simulations, depth
        self._stages = [OUTSIDE]
        self._patches = contextlib.ExitStack()

    def __enter__(self):
        note = self.note_kernel

        def run(self: KernelInterface, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            note(self, args, kwargs)

        for kind in (JITFunction, InterpretedFunction):  # what `triton.jit` makes, and what it makes for the interpreter
            self._patches.enter_context(mock.patch.object(kind, "run", run))
        self._patches.enter_context(mock.patch.object(dispatch, "runs_kernel", return_value=True))
        self._patches.enter_context(mock.patch.object(nn.LSTMCell, "forward", _lstm_cell))
        self._patches.enter_context(mock.patch.object(nets, "lstm_cell", _fused_lstm_cell))
        self._patches.enter_context(mock.patch.object(ranks.dist, "all_reduce", self._note_all_reduce))
        self._patches.enter_context(mock.patch.object(ranks.dist, "all_gather", self._note_all_gather))
        return super().__enter__()

    def __exit__(self, *error: Any):
        super().__exit__(*error)
        self._patches.close()

    def note_kernel(self, kernel: KernelInterface, args: tuple, kwargs: dict[str, Any]) -> None:
        """Note a launch of a kernel with these arguments."""
        name, given = kernel.fn.__name__, dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        try:
            work, once = kernel_cost(name, given, self.depth, self.simulations)
        except KeyError as error:
            raise ValueError(f"{name}: takes no {error} any more; tell launches.kernel_cost what it moves now") from error
        self.found[Launch(self._stages[-1], name, 1, work, once, once, kernel.fn.__module__ not in WITHOUT_FLOOR)] += 1

    def _note_message(self, name: str, launches: int, whole: float, mine: Tensor) -> None:
        moved = size(mine) + whole
        self.found[Launch(self._stages[-1], name, launches, 0.0, moved, moved, False, whole)] += 1

    def _note_all_reduce(self, tensor: Tensor) -> None:
        self._note_message("all_reduce", 1, size(tensor), tensor)

    def _note_all_gather(self, everyone: list[Tensor], mine: Tensor) -> None:
        # NCCL's is one launch; PyTorch then copies what came into each tensor of the list (ProcessGroupNCCL::allgather).
        self._note_message("all_gather", 1 + len(everyone), sum(map(size, everyone)), mine)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = kwargs or {}, func._overloadpacket.__name__
        if name == "_record_function_enter_new":
            self._stages.append(args[0])
        elif name == "_record_function_exit":
            self._stages.pop()
        out = func(*args, **kwargs)
        if func.namespace == "aten" and name not in NO_WORK and not func.is_view:
            formula = flop_registry.get(func._overloadpacket)
            work = float(formula(*args, **kwargs, out_val=out)) if formula else 0.0
            least = operation_bytes(name, args, kwargs, out)
            launches, again = SEVERAL.get(name, (1, ()))
            one_gradient = name == "convolution_backward" and not all(args[-1][:2])
            by_given_statistics = name == "native_batch_norm" and not args[5]
            if one_gradient or by_given_statistics:
                launches, again = 1, ()
            elif name == "_foreach_copy_":
                launches = multi_tensor_launches(args[0])
            most = least + sum(size(args[i]) for i in again)
            self.found[Launch(self._stages[-1], name, launches, work, most, least, formula is not None)] += 1
        return out


def _fused_lstm_cell(inputs: Tensor, more: Tensor, cell: Tensor, *biases: Tensor) -> tuple[Tensor, Tensor]:
    """`layers.lstm_cell` as it is on CUDA: one launch."""
    if not biases:  # CUDA does without, tensors without memory do not
        biases = (inputs.new_empty(inputs.shape[1]),) * 2
    return torch.ops.aten._thnn_fused_lstm_cell(inputs, more, cell.to(inputs.dtype), *biases)[:2]


def _lstm_cell(self: nn.LSTMCell, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """`nn.LSTMCell.forward` as it is on CUDA: two products and one launch for the rest."""
    gates = F.linear(x, self.weight_ih), F.linear(state[0], self.weight_hh)
    return _fused_lstm_cell(*gates, state[1], self.bias_ih, self.bias_hh)


class Iterations:
    """The launches of a config's iterations, counted as they are asked for: those of one rank, if several share the work."""

    def __init__(self, config: Config, spec: EnvSpec, depth: float = DEPTH, ranks: Ranks = ALONE):
        self.config, self.spec, self.depth, self.ranks = config, spec, depth, ranks

    def _run(self, phase: str, roots: int, simulations: int, updates: int) -> Launches:
        config = dataclasses.replace(
            self.config, refresh="sweep", refresh_roots=roots, simulations=simulations, updates_per_iteration=updates
        )
        fake = FakeTensorMode()
        blank = blank_state(config, self.spec, fake, self.ranks)
        with fake, Counting(self.depth, self.config.simulations) as counting:
            iteration(blank, phase, roots)
        return counting.found

    @functools.cached_property
    def update(self) -> Launches:
        """Of one update: drawing, learning, priorities, averages."""
        found = self._run("learn", self.config.lanes, 1, 1)
        found.subtract(self._run("learn", self.config.lanes, 1, 0))
        return found

    def simulation(self, roots: int) -> Launches:
        """Of one simulation of a search of `roots`, one of those that another follows."""
        found = self._run("sweep", roots, 2, 0)
        found.subtract(self._run("sweep", roots, 1, 0))
        return found

    @functools.lru_cache  # noqa: B019 - as many as a run has phases, and the tool ends with it
    def iteration(self, phase: str, roots: int) -> Launches:
        """Of an iteration. `roots`: R of a sweep, 0 under `sampled` refresh, which has its own count."""
        config = self.config
        if config.refresh == "sampled":
            roots = config.updates_per_iteration * config.batch_size * config.window
        found = self._run(phase, roots, 1, 0)
        if phase != "collect":
            more = self.simulation(roots + config.lanes * (phase == "train"))
            found.update({launch: (config.simulations - 1) * times for launch, times in more.items()})
        if phase in ("train", "learn"):
            found.update({launch: config.updates_per_iteration * times for launch, times in self.update.items()})
        return found


@dataclass
class Arguments:
    """Launches, bytes and time of an update and of a simulation. Takes the flags of `python -m speedyzero` as well."""

    presets: tuple[str, ...] = ("efficientzero", "speedyzero")
    """Presets to take the settings from."""
    tflops: float = 790.0
    """TFLOP/s in bf16 that the card reaches; the default was measured on an H200 with other programs."""
    tbs: float = 4.3
    """TB/s that its memory reaches; the default was measured on an H200."""
    launch_us: float = 2.0
    """What a launch within a graph costs besides its work, in microseconds; assumed, not measured."""
    operations: bool = False
    """Also list the operations of an update and of a simulation."""


def row(name: str, found: Launches, arguments: Arguments) -> str:
    """A line of the table."""
    seconds = summed(found, lambda launch: launch.seconds(arguments.tflops, arguments.tbs, arguments.launch_us))
    floor = summed(found, lambda launch: launch.floor(arguments.tflops, arguments.tbs))
    return (f"{name:44s} {number(found):9d} {summed(found, flops) / 1e9:10.4g} {summed(found, moved) / 1e9:9.4g} {1e3 * seconds:10.4g} "
            f"{1e3 * floor:9.4g}")


def main() -> None:
    arguments, rest = tyro.cli(Arguments, prog="launches", return_unknown_args=True)
    print(f"at {arguments.tflops:g} TFLOP/s, {arguments.tbs:g} TB/s and {arguments.launch_us:g} us a launch: counted, nothing is measured\n"
          f"{'':44s} {'launches':>9s} {'GFLOP':>10s} {'GB':>9s} {'ms':>10s} {'floor, ms':>9s}")
    for preset in arguments.presets:
        try:
            config, spec = read_config(preset, ["--env", "Pong-v5", *rest], "launches", "cuda")
        except (ConfigError, EnvError) as error:
            sys.exit(f"error: {error}")
        counted, roots = Iterations(config, spec), max(schedule.search_roots(config).values())
        simulation = counted.simulation(roots)
        for name, found in ((f"an update of {config.batch_size}", counted.update), (f"a simulation of {roots} roots", simulation)):
            print(row(f"{preset}: {name}", found, arguments))
            by_name: dict[str, Launches] = {}
            for launch, times in found.items() if arguments.operations else ():
                by_name.setdefault(launch.name, Counter())[launch] = times
            for operation in sorted(by_name, key=lambda name: -summed(by_name[name], moved)):
                if number(by_name[operation]):
                    print(row(f"  {operation}", by_name[operation], arguments))
        whole = counted.iteration("train", config.refresh_roots if config.refresh == "sweep" else 0)
        print(row(f"{preset}: an iteration of training", whole, arguments))


if __name__ == "__main__":
    main()
