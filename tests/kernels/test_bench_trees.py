"""`python -m speedyzero_kernels.bench`: what it times is the search that it says, and libraries that are missing are named."""

import importlib.util
import sys

import numpy as np
import pytest
import torch

from speedyzero.search import SearchConfig, search
from speedyzero_kernels import bench, peers

JOBS = [bench.Job(kind, simulations=12, roots=5, actions=4) for kind in ("puct", "gumbel")]


def searched(job):
    """Visits of the search of the trainer."""
    world = bench.World(job.actions)
    following, reward, logits, value = map(torch.from_numpy, (world.following, world.reward, world.logits, world.value))

    def step(latent, hidden, action):
        after = following[latent[:, 0], action]
        return after[:, None], hidden, reward[latent[:, 0], action], logits[after], value[after]

    starts = torch.from_numpy(world.starts(job.roots))
    config = SearchConfig(kind=job.kind, num_simulations=job.simulations, discount=job.discount, lstm_horizon=1)
    return search(starts[:, None], torch.zeros(job.roots, 0), logits[starts], value[starts], step, config).visits.numpy()


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.kind)
@pytest.mark.parametrize("layout", [None, "reference"])
def test_the_timed_search_is_the_trainers_and_does_not_ask_the_world(job, layout):
    world = bench.World(job.actions)
    again = bench.our_search(job, world, "cpu", layout)
    for table in vars(world).values():
        table[:] = 0
    np.testing.assert_array_equal(again(), searched(job))


def test_the_share_of_equal_visits():
    assert bench.same_visits(np.array([[3, 1], [0, 4]]), np.array([[1, 3], [0, 4]])) == 0.75


def test_a_line_for_each_search_and_libraries_that_are_missing_are_named_with_their_remedy(capsys, monkeypatch):
    for module in ("mctx", "lzero"):
        monkeypatch.setitem(sys.modules, module, None)
    bench.main(["--peers", "--device", "cpu", "--roots", "1", "3", "--simulations", "4", "--seconds", "0"])
    out = capsys.readouterr().out
    lines = [line.split()[:3] for line in out.splitlines() if line.startswith(("puct ", "gumbel "))]
    assert lines == [[kind, "4", roots] for kind in ("puct", "gumbel") for roots in ("1", "3")]
    assert "LightZero: not installed" in out
    assert "pip install --no-deps LightZero" in out
    assert "mctx: not installed" in out
    assert "as numba's: PyTorch 100.0 %" in out


@pytest.mark.parametrize(("flags", "named"), [(["--roots", "0"], "--roots"), (["--actions", "2000"], "--actions")])
def test_sizes_that_cannot_be_are_one_line_that_names_the_flag(flags, named, capsys):
    with pytest.raises(SystemExit) as end:
        bench.main(["--device", "cpu", *flags])
    line = end.value.code if isinstance(end.value.code, str) else capsys.readouterr().err.splitlines()[-1]
    assert "error: " in line
    assert named in line


def test_mctx_grows_our_gumbel_trees():
    pytest.importorskip("mctx")
    job = JOBS[1]
    ours, theirs = (make(job, bench.World(job.actions)) for make in (bench.ours("cpu")["numba"], peers.Mctx().searcher))
    np.testing.assert_array_equal(ours(), theirs())


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.kind)
def test_lightzero_searches_as_often_as_it_is_told(job):
    if importlib.util.find_spec("lzero") is None:
        pytest.skip("needs LightZero")
    visits = np.array(peers.LightZero().searcher(job, bench.World(job.actions))())
    assert visits.shape == (job.roots, job.actions)
    assert (visits.sum(axis=1) == job.simulations).all()
