"""Graphs through a stand-in for CUDA: when a function runs as it is, when it is captured, when replayed, and what is said when it fails."""

import contextlib
import dataclasses

import pytest
import torch

from speedyzero.envs import describe
from speedyzero.graph import GraphError, Graphs
from speedyzero.loop import Trainer, train
from speedyzero.run import checkpoint

CPU = torch.device("cpu")


class StandIn:
    """What `Graphs` uses of torch.cuda, noting what is done."""

    def __init__(self, monkeypatch):
        self.log, self.capture_fails = [], False
        log, stand_in = self.log, self

        class Stream:
            def __init__(self, device=None):
                pass

            def wait_stream(self, other):
                log.append("wait")

            def synchronize(self):
                log.append("synchronize")

        class Graph:
            def register_generator_state(self, generator):
                log.append(f"register {generator}")

            def replay(self):
                log.append("replay")

        @contextlib.contextmanager
        def capturing(graph, pool, stream, capture_error_mode):
            assert (pool, capture_error_mode) == ("pool", "thread_local")
            log.append("capture")
            try:
                yield
            finally:
                # As the driver: a capture that failed cannot be ended either.
                if stand_in.capture_fails:
                    raise RuntimeError("operation failed due to a previous error during capture")
            log.append("captured")

        for name, value in {
            "Stream": Stream, "CUDAGraph": Graph, "graph": capturing, "graph_pool_handle": lambda: "pool",
            "current_stream": lambda: "current", "stream": lambda stream: contextlib.nullcontext(),
            "synchronize": lambda: log.append("synchronize all"), "empty_cache": lambda: log.append("empty"),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        for flag in ("deterministic", "benchmark"):
            monkeypatch.setattr(torch.backends.cudnn, flag, getattr(torch.backends.cudnn, flag))

    def taken(self) -> list[str]:
        """What was done since the last call."""
        done = list(self.log)
        self.log.clear()
        return done


@pytest.fixture
def cuda(monkeypatch):
    return StandIn(monkeypatch)


def out_of_memory() -> None:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of")


def test_a_function_runs_as_it_is_then_is_captured_then_replayed(cuda):
    graphs, calls = Graphs(CPU, "generator", capture=True), []
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
    graphs = Graphs(CPU, "generator", capture=False)
    for _ in range(3):
        graphs.run("train", lambda: cuda.log.append("work"))
        assert cuda.taken() == ["wait", "work", "synchronize"]


def test_too_little_memory_in_a_first_run_says_so_and_that_the_state_is_half_done(cuda):
    graphs = Graphs(CPU, "generator", capture=True)
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
    graphs = Graphs(CPU, "generator", capture=True)
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
    graphs = Graphs(CPU, "generator", capture=True)
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
