"""Iterations on CUDA: run once as they are, then captured, then replayed, one graph a phase and number of roots (all steps).

The only file that knows streams and graphs. A graph holds everything that an iteration does: the kernels, the copies to
and from pinned memory, and on a side branch the emulators' turn, which a thread of the driver takes by calling back into Python. That
thread may not call CUDA, and it needs the interpreter's lock: the host waits only in calls that release it.

**Nothing here has run on a GPU yet.**
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch

from speedyzero.envs import Emulators


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
    """The emulators' turn as a host function on a side stream, forked off by `begin` and joined by `end`; it can be captured."""

    def __init__(self, emulators: Emulators, device: torch.device):
        super().__init__(emulators)
        # The driver itself, not cuda-bindings' cudaLaunchHostFunc: some versions of that free what they wrap a callback in after its
        # first call, and a graph calls it at every replay (NVIDIA/cuda-python issue 790).
        self._launch = ctypes.CDLL("libcuda.so.1").cuLaunchHostFunc
        self._launch.argtypes = [ctypes.c_void_p] * 3
        self._side = torch.cuda.Stream(device)
        # ctypes frees the callback with its last reference: the graphs know only its address.
        self._callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: self._take())

    def begin(self) -> None:
        """Fork: what the current stream has done so far, the actions' copy included, comes before the turn."""
        self._side.wait_stream(torch.cuda.current_stream())
        status = self._launch(self._side.cuda_stream, ctypes.cast(self._callback, ctypes.c_void_p), None)
        if status != 0:
            raise RuntimeError(f"cuLaunchHostFunc failed with CUDA error {status}")

    def end(self) -> None:
        """Join: the current stream waits for the turn."""
        torch.cuda.current_stream().wait_stream(self._side)

    def _take(self) -> None:
        self.attempt(self.emulators.send)
        self.attempt(self.emulators.recv)


class Graphs:
    """Runs functions that work on fixed tensors: as they are the first time, captured and replayed from the second on.

    The first run compiles the kernels and lets the libraries allocate what a capture may not; it counts like any other. All graphs
    share one memory pool: they run one after another, and nothing that one of them allocates outlives it.
    """

    def __init__(self, device: torch.device, generator: torch.Generator, capture: bool):
        self._generator, self._capture = generator, capture
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
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
            if not self._capture or key not in self._graphs:
                self._run_uncaptured(key, function)
                self._graphs[key] = None
            else:
                if self._graphs[key] is None:
                    self._graphs[key] = self._captured(key, function)
                self._graphs[key].replay()
        # Releases the interpreter's lock, which the emulators' turn needs.
        self._stream.synchronize()

    def _run_uncaptured(self, key: Hashable, function: Callable[[], None]) -> None:
        self.doing = f"the first run of {key}"
        try:
            function()
        except BaseException as error:
            torch.cuda.synchronize()  # the emulators' turn may still be under way, and must find this process as it was
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise GraphError(f"{_too_little_memory(key, error)}", clean=False) from error
            raise
        finally:
            self.doing = None

    def _captured(self, key: Hashable, function: Callable[[], None]) -> torch.cuda.CUDAGraph:
        self.doing = f"the capture of {key}"
        torch.cuda.empty_cache()  # what the first run left would lie idle beside the graph's own pool
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        try:
            # thread_local: EnvPool's and the driver's threads do as they please meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                function()
        except Exception as error:
            first = first_error(error)
            if isinstance(first, torch.cuda.OutOfMemoryError):
                raise GraphError(_too_little_memory(key, first), clean=True) from error
            why = str(first).partition("\n")[0]
            raise GraphError(f"--graph on: {key} could not be captured ({why}); use --graph off", clean=True) from error
        finally:
            self.doing = None
        return graph


def first_error(error: BaseException) -> BaseException:
    """The error that came first: ending a capture that failed fails too, and hides why."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _too_little_memory(key: Hashable, error: BaseException) -> str:
    need = str(error).partition(".")[0]
    return f"--refresh-roots or --batch-size: the GPU has too little memory for {key} ({need}); start a new run with less"


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
