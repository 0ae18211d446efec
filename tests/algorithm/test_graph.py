"""Graphs through a stand-in for CUDA: when a function runs as it is, when it is captured, when replayed, and what is said when it fails."""

import contextlib
import ctypes
import dataclasses
import gc
import threading
from types import SimpleNamespace

import pytest
import torch

from speedyzero.envs import describe
from speedyzero.graph import GraphError, Graphs, StreamTurn
from speedyzero.loop import Trainer, train
from speedyzero.run import checkpoint

CPU = torch.device("cpu")


class StandIn:
    """What `Graphs` and `StreamTurn` use of CUDA, noting what is done. A graph holds what is launched within its capture, and a replay does
    it: host functions on a thread that is not ours."""

    def __init__(self, monkeypatch):
        self.log, self.capture_fails, self.capturing = [], False, None
        log, stand_in = self.log, self

        class Stream:
            cuda_stream = 7

            def __init__(self, device=None):
                pass

            def wait_stream(self, other):
                if stand_in.capturing is None:  # else it is an edge of the graph
                    log.append("wait")

            def synchronize(self):
                log.append("synchronize")

        class Event:
            def record(self):
                log.append("event")

            def synchronize(self):
                log.append("wait for event")

        class Graph:
            def __init__(self):
                self.nodes = []

            def register_generator_state(self, generator):
                log.append(f"register {generator}")

            def replay(self):
                log.append("replay")
                for node in self.nodes:
                    node()

        @contextlib.contextmanager
        def capturing(graph, pool, stream, capture_error_mode):
            assert (pool, capture_error_mode) == ("pool", "thread_local")
            log.append("capture")
            stand_in.capturing = graph
            try:
                yield
            finally:
                stand_in.capturing = None
                # As the driver: a capture that failed cannot be ended either.
                if stand_in.capture_fails:
                    raise RuntimeError("operation failed due to a previous error during capture")
            log.append("captured")

        def launch_host_function(stream, function, data):
            assert stream == Stream.cuda_stream
            called = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function.value)

            def on_a_thread_of_the_driver():
                thread = threading.Thread(target=called, args=(data,))
                thread.start()
                thread.join()

            stand_in.capturing.nodes.append(on_a_thread_of_the_driver)
            return 0

        monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(cuLaunchHostFunc=launch_host_function))
        monkeypatch.setattr(gc, "collect", lambda: log.append("collect"))
        monkeypatch.setattr(gc, "freeze", lambda: log.append("freeze"))
        for name, value in {
            "Stream": Stream, "Event": Event, "CUDAGraph": Graph, "is_current_stream_capturing": lambda: stand_in.capturing is not None,
            "graph": capturing, "graph_pool_handle": lambda: "pool",
            "current_stream": Stream, "stream": lambda stream: contextlib.nullcontext(),
            "synchronize": lambda: log.append("synchronize all"), "empty_cache": lambda: log.append("empty"),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        for flag in ("deterministic", "benchmark"):
            monkeypatch.setattr(torch.backends.cudnn, flag, getattr(torch.backends.cudnn, flag))

    def launch(self, name: str) -> None:
        """A kernel: done, or captured."""
        if self.capturing is None:
            self.log.append(name)
        else:
            self.capturing.nodes.append(lambda: self.log.append(name))

    def taken(self) -> list[str]:
        """What was done since the last call."""
        done = list(self.log)
        self.log.clear()
        return done


@pytest.fixture
def cuda(monkeypatch):
    return StandIn(monkeypatch)


class Emulators:
    """Note when they step, on whose thread, and whether garbage may be collected meanwhile."""

    def __init__(self, cuda):
        self.cuda = cuda

    def send(self):
        self.note("send")

    def recv(self):
        self.note("recv")

    def note(self, verb):
        on = "main" if threading.current_thread() is threading.main_thread() else "driver"
        self.cuda.log.append(f"{verb} on {on}" + (", collecting" if gc.isenabled() else ""))


UNCAPTURED = ["wait", "ingest", "event", "wait for event", "send on main, collecting", "learn", "recv on main, collecting", "synchronize"]
CAPTURE = ["register generator", "capture", "captured"]
REPLAYED = {
    "off": UNCAPTURED,
    "on": ["wait", "replay", "ingest", "send on driver", "recv on driver", "learn", "synchronize"],
    "split": [
        "wait", "replay", "ingest", "event", "replay", "learn", "wait for event", "send on main, collecting", "recv on main, collecting",
        "synchronize",
    ],
}  # fmt: skip
CAPTURED = {"off": [], "on": ["empty", *CAPTURE, "collect", "freeze"], "split": ["empty", *CAPTURE, *CAPTURE]}


def graphs_with_a_turn(cuda, form):
    """Graphs, and an iteration that they run."""
    turn = StreamTurn(Emulators(cuda), CPU)

    def iteration():
        cuda.launch("ingest")
        turn.begin()
        cuda.launch("learn")
        turn.end()

    return Graphs(CPU, "generator", form, turn), turn, iteration


@pytest.mark.parametrize("form", ["off", "on", "split"])
def test_the_emulators_step_once_the_actions_are_there_on_the_thread_of_the_form(cuda, form):
    graphs, _, iteration = graphs_with_a_turn(cuda, form)
    graphs.run("train", iteration)
    assert cuda.taken() == UNCAPTURED
    graphs.run("train", iteration)
    assert cuda.taken() == REPLAYED[form][:1] + CAPTURED[form] + REPLAYED[form][1:]
    for _ in range(2):
        graphs.run("train", iteration)
        assert cuda.taken() == REPLAYED[form]
        assert gc.isenabled()


def test_what_begins_no_turn_is_one_graph_in_the_split_form_too(cuda):
    graphs, _, _ = graphs_with_a_turn(cuda, "split")
    for _ in range(3):
        cuda.taken()
        graphs.run("learn", lambda: cuda.launch("learn"))
    assert cuda.taken() == ["wait", "replay", "learn", "synchronize"]


@pytest.mark.parametrize("form", ["on", "split"])
def test_after_a_capture_that_failed_past_the_turn_the_next_one_is_as_the_first(cuda, form):
    graphs, turn, iteration = graphs_with_a_turn(cuda, form)
    graphs.run("train", iteration)

    def failing():
        turn.begin()
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried")

    with pytest.raises(GraphError, match="too little memory") as error:
        graphs.run("train", failing)
    assert error.value.clean
    assert gc.isenabled()
    cuda.taken()
    graphs.run("train", iteration)
    assert cuda.taken() == REPLAYED[form][:1] + CAPTURED[form] + REPLAYED[form][1:]


@pytest.mark.parametrize("form", ["on", "split"])
def test_what_the_emulators_raise_in_a_replay_is_raised_after_it(cuda, form):
    graphs, turn, iteration = graphs_with_a_turn(cuda, form)
    for _ in range(2):
        graphs.run("train", iteration)
    turn.emulators.recv, turn.emulators.withdraw = lambda: 1 / 0, lambda: cuda.log.append("withdraw")
    cuda.taken()
    graphs.run("train", iteration)
    assert cuda.taken()[-1] == "synchronize"
    with pytest.raises(ZeroDivisionError):
        turn.check()
    assert cuda.taken() == ["withdraw"]


def out_of_memory() -> None:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of")


def test_a_function_runs_as_it_is_then_is_captured_then_replayed(cuda):
    graphs, calls = Graphs(CPU, "generator", form="on"), []
    work = lambda: (calls.append(graphs.doing), cuda.log.append("work"))  # noqa: E731
    graphs.run("train", work)
    assert cuda.taken() == ["wait", "work", "synchronize"]
    graphs.run("train", work)
    assert cuda.taken() == ["wait", "empty", "register generator", "capture", "work", "captured", "replay", "synchronize"]
    for _ in range(3):
        graphs.run("train", work)
        assert cuda.taken() == ["wait", "replay", "synchronize"]
    graphs.run("learn", work)
    assert cuda.taken() == ["wait", "work", "synchronize"]
    assert calls == ["the first run of train", "the capture of train", "the first run of learn"]
    assert graphs.doing is None
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark


def test_without_capture_every_run_is_the_function_itself(cuda):
    graphs = Graphs(CPU, "generator", form="off")
    for _ in range(3):
        graphs.run("train", lambda: cuda.log.append("work"))
        assert cuda.taken() == ["wait", "work", "synchronize"]


def test_too_little_memory_in_a_first_run_says_so_and_that_the_state_is_half_done(cuda):
    graphs = Graphs(CPU, "generator", form="on")
    with pytest.raises(GraphError, match=r"^--refresh-roots or --batch-size: .* little memory for \('train', 512\) \(CUDA out") as error:
        graphs.run(("train", 512), out_of_memory)
    assert not error.value.clean
    assert "synchronize all" in cuda.taken()
    assert graphs.doing is None


def not_permitted() -> None:
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCompile with TORCH_USE_CUDA_DSA")


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (out_of_memory, "^--refresh-roots or --batch-size: the GPU has too little memory for train"),
        (not_permitted, r"^--graph on: train could not be captured \(CUDA error: .* is capturing\); use --graph off$"),
    ],
)
def test_a_capture_that_fails_is_told_leaves_the_state_as_it_was_and_is_tried_again(cuda, function, says):
    graphs = Graphs(CPU, "generator", form="on")
    graphs.run("train", lambda: None)
    cuda.capture_fails = True
    with pytest.raises(GraphError, match=says) as error:
        graphs.run("train", function)
    assert error.value.clean
    assert "replay" not in cuda.taken()
    cuda.capture_fails = False
    graphs.run("train", lambda: None)
    assert "captured" in cuda.taken()


def test_other_errors_of_a_first_run_come_out_as_they_are_after_the_device_is_done(cuda):
    graphs = Graphs(CPU, "generator", form="on")
    with pytest.raises(ZeroDivisionError):
        graphs.run("train", lambda: 1 / 0)
    assert cuda.taken() == ["wait", "synchronize all"]


@pytest.mark.parametrize("clean", [True, False])
def test_a_run_whose_capture_fails_ends_with_its_line_and_a_checkpoint_that_goes_on(tiny_config, monkeypatch, clean):
    config, whole = tiny_config(checkpoint_interval=20), tiny_config(run_dir=tiny_config().run_dir.with_name("whole"))
    spec = describe(config.env)
    assert train(whole, spec, CPU) is None
    with monkeypatch.context() as patch:
        run = Trainer.run

        def failing(trainer, key, function):
            if trainer.iterations == 33 and key != "snapshot":  # that is captured before the first iteration
                raise GraphError("--refresh-roots or --batch-size: the GPU has too little memory", clean=clean)
            run(trainer, key, function)

        patch.setattr(Trainer, "run", failing)
        with pytest.raises(GraphError, match=r"^--refresh-roots or --batch-size"):
            train(config, spec, CPU)
    # Half an iteration is saved nowhere.
    assert checkpoint.latest(config.run_dir / "checkpoints").name == f"checkpoint_{33 if clean else 20:09d}.safetensors"
    assert train(dataclasses.replace(config, resume=True), spec, CPU) is None
    ends = [checkpoint.load(checkpoint.latest(one.run_dir / "checkpoints"))[0] for one in (config, whole)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])
