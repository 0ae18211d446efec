"""Iterations on CUDA: run once as they are, then captured, then replayed, one graph a phase and number of roots (all steps).

The only file that knows streams and graphs. A graph holds everything that an iteration does: the kernels, and the copies to and from
pinned memory. Who takes the emulators' turn depends on the form of the run:

    off     the main thread, once the actions are there: it sends, launches what comes after, and receives. A first run does the same
    on      a thread of the driver, which calls back into Python from a node on a side branch of the graph
    split   the main thread: the graph ends where the turn begins, a second one holds the rest, and the thread waits for the first alone

A thread of the driver may not call CUDA, and it needs the interpreter's lock. So the host waits only in calls that release the lock, and
while such a thread may run nothing collects garbage: a finalizer may call CUDA, on that thread, or on another one that then waits for the
device with the lock held.

**Nothing here has run on a GPU yet.**
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Literal

import torch

from speedyzero.emulators import Emulators


class Turn:
    """What the emulators do in an iteration, on the host's own thread: `begin` hands them their actions, `end` waits for what they say."""

    def __init__(self, emulators: Emulators):
        self.emulators = emulators
        self.error: BaseException | None = None

    def begin(self) -> None:
        """The actions are in the emulators' buffer: step."""
        self.attempt(self.emulators.send)

    def end(self) -> None:
        """Wait until the emulators' buffers hold the step."""
        self.attempt(self.emulators.recv)

    def attempt(self, verb: Callable[[], None]) -> None:
        """Do it, unless something failed before; keep what it raises for `check`."""
        if self.error is None:
            try:
                verb()
            except BaseException as error:  # the caller may be a thread of the driver, where nobody else would see it
                self.error = error

    def check(self) -> None:
        """Raise what the emulators raised in this iteration, as itself. Their failed step is taken back, so that it can be tried again."""
        if self.error is not None:
            error, self.error = self.error, None
            self.emulators.withdraw()
            raise error


class GraphError(RuntimeError):
    """An iteration could not be run or captured; the message is one line that names the flag and the remedy.

    clean: nothing of the iteration was done, and the state can be saved as it is.
    """

    def __init__(self, message: str, clean: bool):
        super().__init__(message)
        self.clean = clean


class StreamTurn(Turn):
    """The emulators' turn in an iteration on CUDA: on this thread in a run that is not captured, else as the capture's form has it."""

    def __init__(self, emulators: Emulators, device: torch.device):
        super().__init__(emulators)
        # The driver itself, not cuda-bindings' cudaLaunchHostFunc: some versions of that free what they wrap a callback in after its
        # first call, and a graph calls it at every replay (NVIDIA/cuda-python issue 790).
        self._launch = ctypes.CDLL("libcuda.so.1").cuLaunchHostFunc
        self._launch.argtypes = [ctypes.c_void_p] * 3
        self._side = torch.cuda.Stream(device)
        # ctypes frees the callback with its last reference: the graphs know only its address.
        self._callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: self.take())
        self.cut: Callable[[], None] | None = None
        """Set while `Graphs` captures in two parts: ends the first and begins the second. The turn is then no part of either."""

    def begin(self) -> None:
        """The actions are on their way to the emulators' buffer: let the turn begin when they are there.

        Not captured, it waits for them here and sends. Captured, it forks: what the current stream has done so far, the actions' copy
        included, comes before the turn.
        """
        if not torch.cuda.is_current_stream_capturing():
            actions_copied = torch.cuda.Event()
            actions_copied.record()
            actions_copied.synchronize()
            super().begin()
        elif self.cut is not None:
            self.cut()
        else:
            self._side.wait_stream(torch.cuda.current_stream())
            status = self._launch(self._side.cuda_stream, ctypes.cast(self._callback, ctypes.c_void_p), None)
            if status != 0:
                raise RuntimeError(f"cuLaunchHostFunc failed with CUDA error {status}")

    def end(self) -> None:
        """Wait for the turn. Captured, the current stream does; in two parts, whoever replays them."""
        if not torch.cuda.is_current_stream_capturing():
            super().end()
        elif self.cut is None:
            torch.cuda.current_stream().wait_stream(self._side)

    def take(self) -> None:
        """All of the turn, on the thread that calls."""
        self.attempt(self.emulators.send)
        self.attempt(self.emulators.recv)


Form = Literal["off", "on", "split"]
"""How a run is captured: not at all, in one graph, in two with the emulators' turn between them."""


class Graphs:
    """Runs functions that work on fixed tensors: as they are the first time, captured and replayed from the second on.

    The first run compiles the kernels and lets the libraries allocate what a capture may not; it counts like any other. All graphs
    share one memory pool: they run one after another, and nothing that one of them allocates outlives it, or its second part.

    generator: what the functions draw from. turn: the emulators', if a function begins one. too_little: the flags to lower and how to go
    on, where no memory is left.
    """

    def __init__(
        self, device: torch.device, generator: torch.Generator | None, form: Form, turn: StreamTurn | None = None,
        too_little: tuple[str, str] = ("--refresh-roots or --batch-size", "start a new run with less"),
    ):  # fmt: skip
        self._generator, self._form, self._turn, self._too_little = generator, form, turn, too_little
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[Hashable, list[torch.cuda.CUDAGraph]] = {}
        """The parts of each key that had its first run; none until it is captured."""
        self.doing: str | None = None
        """What is run uncaptured or captured now, for the watchdog; None during a replay."""
        # Else cuDNN may choose gradients that add up in whatever order, and the seed no longer makes the run.
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False

    def run(self, key: Hashable, function: Callable[[], None]) -> None:
        """Do `function` once, and wait for it. Calls with one key must be of functions that launch the same work.

        Raises:
            GraphError: no memory is left, or the function does what a graph cannot hold.
        """
        # What the host did meanwhile on its own stream (averages drained, a checkpoint loaded) comes first.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            if self._form == "off" or key not in self._graphs:
                self._run_uncaptured(key, function)
                self._graphs[key] = []
            else:
                self._graphs[key] = self._graphs[key] or self._captured(key, function)
                self._replay(self._graphs[key])
                return
        # Releases the interpreter's lock.
        self._stream.synchronize()

    def _run_uncaptured(self, key: Hashable, function: Callable[[], None]) -> None:
        self.doing = f"the first run of {key}"
        try:
            function()
        except BaseException as error:
            torch.cuda.synchronize()  # its copies may still be under way, and must find this process as it was
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise GraphError(self._no_memory(key, error), clean=False) from error
            raise
        finally:
            self.doing = None

    def _captured(self, key: Hashable, function: Callable[[], None]) -> list[torch.cuda.CUDAGraph]:
        """The graphs of what `function` launches: two if the form is split and it begins the emulators' turn, else one."""
        self.doing = f"the capture of {key}"
        torch.cuda.empty_cache()  # what the first run left would lie idle beside the graph's own pool
        parts: list[torch.cuda.CUDAGraph] = []
        capturing = ExitStack()

        def begin_part() -> None:
            parts.append(torch.cuda.CUDAGraph())
            if self._generator is not None:
                parts[-1].register_generator_state(self._generator)
            # thread_local: EnvPool's and the driver's threads do as they please meanwhile.
            capturing.enter_context(torch.cuda.graph(parts[-1], pool=self._pool, stream=self._stream, capture_error_mode="thread_local"))

        def cut() -> None:
            # Tensors of the first part that the second reads stay allocated in the pool, which both share.
            capturing.close()
            begin_part()

        if self._turn is not None:
            self._turn.cut = cut if self._form == "split" else None
        try:
            # A finalizer that calls CUDA would end the capture.
            with no_collection(), capturing:
                begin_part()
                function()
        except Exception as error:
            first = first_error(error)
            if isinstance(first, torch.cuda.OutOfMemoryError):
                raise GraphError(self._no_memory(key, first), clean=True) from error
            why = str(first).partition("\n")[0]
            raise GraphError(f"--graph {self._form}: {key} could not be captured ({why}); use --graph off", clean=True) from error
        finally:
            self.doing = None
            if self._turn is not None:
                self._turn.cut = None
        if self._has_host_nodes:
            # What lives now lives on: collections between the replays need not walk it.
            gc.collect()
            gc.freeze()
        return parts

    @property
    def _has_host_nodes(self) -> bool:
        return self._form == "on" and self._turn is not None

    def _replay(self, parts: list[torch.cuda.CUDAGraph]) -> None:
        """Replay the parts and wait for them; between two, take the emulators' turn while the second runs."""
        # No collection begins, on any thread, from before the driver may call back into Python until after it has.
        with no_collection() if self._has_host_nodes else nullcontext():
            parts[0].replay()
            if len(parts) == 2:
                acted = torch.cuda.Event()
                acted.record()
                parts[1].replay()
                acted.synchronize()
                self._turn.take()
            # Releases the interpreter's lock, which a turn on a thread of the driver needs.
            self._stream.synchronize()

    def _no_memory(self, key: Hashable, error: BaseException) -> str:
        flags, remedy = self._too_little
        return f"{flags}: the GPU has too little memory for {key} ({str(error).partition('.')[0]}); {remedy}"


@contextmanager
def no_collection() -> Iterator[None]:
    """Within the block the garbage collector begins nothing, on any thread."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def first_error(error: BaseException) -> BaseException:
    """The error that came first: ending a capture that failed fails too, and hides why."""
    while error.__context__ is not None:
        error = error.__context__
    return error


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """The mode within the block, as it was after it. Begin it before the first matrix product on CUDA: cuBLAS reads its setting then."""
    if not wanted:  # and not a call to say so: that would import PyTorch's compiler, a second or two
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Every tensor is written before it is read: the tests poison what is not.
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
