"""Each operation captured in a CUDA graph: a replay on new inputs gives what an eager call on them gives, bit for bit."""

import pytest
import torch

from tools.profile.operations import MAKERS, Work, sizes

pytestmark = pytest.mark.gpu
SEED = 7


def captured(work: Work) -> tuple[torch.cuda.CUDAGraph, tuple[torch.Tensor, ...]]:
    """A graph of one run, and the tensors that every replay writes its results to."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles, and fills the allocator: neither may happen in a capture
            work.ours()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    for generator in work.generators:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        outputs = work.ours()
    return graph, outputs


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor: memory that an operation never writes may hold NaN."""
    return x.detach().contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("preset", ["efficientzero", "cpu"])
@pytest.mark.parametrize("operation", MAKERS)
def test_a_replay_equals_an_eager_call_on_the_same_inputs(operation, preset):
    at = sizes(preset, "cuda")
    work = MAKERS[operation](at, 0)
    graph, outputs = captured(work)
    for seed in (1, 2):
        fresh = MAKERS[operation](at, seed)
        assert fresh.state.keys() == work.state.keys()
        with torch.no_grad():
            for name, tensor in work.state.items():
                tensor.copy_(fresh.state[name])
        for generator in (*work.generators, *fresh.generators):
            generator.manual_seed(SEED + seed)
        graph.replay()
        expected = fresh.ours()
        torch.cuda.synchronize()
        for got, want in zip(outputs, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        for name, tensor in work.state.items():
            assert torch.equal(bits(tensor), bits(fresh.state[name])), name
