"""Iterations on CUDA: run once as they are, then captured, then replayed, one graph a phase and number of roots (all steps).

The only file besides the loop that knows streams and graphs. A graph holds everything that an iteration does: the kernels, the copies to
and from pinned memory, and on a side branch the emulators' turn, which a thread of the driver takes by calling back into Python. That
thread may not call CUDA, and it needs the interpreter's lock: the host waits only in calls that release it.

**Nothing here has run on a GPU yet.**
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Hashable

import torch

from speedyzero.envs import Emulators
from speedyzero.turn import Turn


class GraphError(RuntimeError):
    """An iteration could not be captured; the message is one line that names the flag and the mend."""


class StreamTurn(Turn):
    """The emulators' turn as a host function on a side stream, forked off by `begin` and joined by `end`; it can be captured."""

    def __init__(self, emulators: Emulators, device: torch.device):
        super().__init__(emulators)
        from cuda.bindings import runtime  # comes with PyTorch's CUDA builds, and only with them

        self._runtime = runtime
        self._side = torch.cuda.Stream(device)
        # ctypes frees the callback with its last reference: the graphs know only its address.
        self._callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: self._take())
        self._function = runtime.cudaHostFn_t(ctypes.cast(self._callback, ctypes.c_void_p).value)

    def begin(self) -> None:
        """Fork: what the current stream has done so far, the actions' copy included, comes before the turn."""
        self._side.wait_stream(torch.cuda.current_stream())
        (status,) = self._runtime.cudaLaunchHostFunc(self._runtime.cudaStream_t(self._side.cuda_stream), self._function, 0)
        if status != self._runtime.cudaError_t.cudaSuccess:
            raise GraphError(f"the emulators could not be put on a CUDA stream ({status.name}); run on --device cpu")

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
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}

    def run(self, key: Hashable, function: Callable[[], None]) -> None:
        """Do `function` once, and wait for it. Calls with one key must be of functions that launch the same work.

        Raises:
            GraphError: no memory is left for the graph, or the function does what a graph cannot hold.
        """
        with torch.cuda.stream(self._stream):
            if not self._capture or key not in self._graphs:
                function()
                self._graphs[key] = None
            else:
                if self._graphs[key] is None:
                    self._graphs[key] = self._captured(key, function)
                self._graphs[key].replay()
        # Releases the interpreter's lock, which the emulators' turn needs.
        self._stream.synchronize()

    def _captured(self, key: Hashable, function: Callable[[], None]) -> torch.cuda.CUDAGraph:
        torch.cuda.empty_cache()  # what the first run left would lie idle beside the graph's own pool
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        try:
            # thread_local: EnvPool's and the driver's threads do as they please meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                function()
        except torch.cuda.OutOfMemoryError as error:
            need = str(error).partition(".")[0]
            raise GraphError(
                f"--refresh-roots or --batch-size: the GPU has too little memory to capture {key} ({need}); lower one of them"
            ) from error
        except RuntimeError as error:
            raise GraphError(f"--graph on: {key} could not be captured ({str(error).splitlines()[0]}); use --graph off") from error
        return graph
