"""Kernels, native walks and reference grow the same trees, selection by selection; and a search on the kernels is the oracle's."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speedyzero.search import SearchConfig
from speedyzero_kernels.backup import expand_and_backup
from speedyzero_kernels.root import considered_visit_of, considered_visits, root_prior
from speedyzero_kernels.select import completed_q, mean_q, select_gumbel, select_puct
from speedyzero_kernels.tree import allocate, plant
from tests.algorithm.test_search import World, assert_agrees, draw_noise


@pytest.fixture
def device(tree_device):
    return tree_device


def both_layouts(device, **sizes):
    return [allocate(device=device, layout=layout, **sizes) for layout in ("kernel", "reference")]


def assert_same_trees(ours, theirs, bound):
    for field in dataclasses.fields(ours):
        got, want = getattr(ours, field.name), getattr(theirs, field.name)
        if isinstance(got, torch.Tensor):
            close = dict.fromkeys(("rtol", "atol"), bound(field.name))
            torch.testing.assert_close(got.double(), want.double(), **close, msg=lambda text, f=field: f"{f.name}: {text}")
    for read in (lambda tree: mean_q(tree, tree.simulations + 1), lambda tree: completed_q(tree, tree.simulations + 1, 50.0, 0.1)):
        torch.testing.assert_close(read(ours), read(theirs), rtol=1e-9, atol=1e-9)


def spread(x):
    """The same numbers with gaps between them, as the columns of a network's one output."""
    return None if x is None else torch.stack((x, x), -1)[..., 0]


def grow(trees, kind, dtype=torch.float32, masked=False, scale=1.0, floor=None, noisy=True, seed=None):
    """Plants and grows two trees with the same outputs of a model, in the first with gaps; yields their selections, and what is legal."""
    roots, actions, simulations, device = trees[0].roots, trees[0].actions, trees[0].simulations, trees[0].device
    generator = torch.Generator().manual_seed(actions if seed is None else seed)

    def draw(*shape, times=1.0):
        return (times * torch.randn(*shape, generator=generator)).to(dtype).to(device)

    logits, value = draw(roots, actions, times=scale), draw(roots)
    noise = draw_noise(kind, roots, actions, actions).to(dtype).to(device) if noisy else None
    legal = None
    if masked:
        legal = torch.rand(roots, actions, generator=generator) < 0.5
        legal[torch.arange(roots), torch.randint(actions, (roots,), generator=generator)] = True
        legal = legal.to(device)
    prior = root_prior(spread(logits), spread(noise) if kind == "puct" else None, 0.25, spread(legal))
    plant(trees[0], *map(spread, (prior, logits, value, legal)))
    plant(trees[1], prior, logits, value, legal)
    considered = min(5, actions)
    floor = {} if floor is None else {"value_delta_min": floor}
    table = considered_visits(considered, simulations)
    for i in range(simulations):
        if kind == "puct":
            leaves = [select_puct(tree, i, c_base=20.0, **floor) for tree in trees]
        else:
            visit = table[i] if legal is None else considered_visit_of(legal, considered, simulations, i)
            draws = spread(noise), noise
            leaves = [select_gumbel(tree, i, visit, gumbel, c_scale=0.02, **floor) for tree, gumbel in zip(trees, draws, strict=True)]
        yield *leaves, legal
        outputs = draw(roots), draw(roots, actions, times=scale), draw(roots)
        expand_and_backup(trees[0], i, leaves[0], *map(spread, outputs))
        expand_and_backup(trees[1], i, leaves[1], *outputs)


CASES = [
    # roots, actions, simulations, options: awkward sizes, and one step past every block
    (1, 1, 1, {}),
    (3, 1, 9, {"horizon": 1}),
    (1, 2, 17, {"discount": 1.0}),
    (1, 3, 30, {"scale": 6.0}),
    (2, 6, 50, {"horizon": 5, "discount": 0.997**4}),
    (2, 6, 24, {"masked": True}),
    (3, 4, 12, {"masked": True, "horizon": 2}),
    (1, 18, 33, {"dtype": torch.bfloat16}),
    (1, 32, 20, {"dtype": torch.float16}),
    (1, 33, 20, {"dtype": torch.float64, "discount": 0.0}),
    (1, 200, 12, {"masked": True}),
    (1, 3, 66, {"scale": 1.5}),
    (3, 6, 24, {"floor": 0.5}),
]


@pytest.mark.parametrize("kind", ["puct", "gumbel"])
@pytest.mark.parametrize(("roots", "actions", "simulations", "options"), CASES)
@pytest.mark.parametrize("tree_device", ["kernel", "native"], indirect=True)
def test_kernel_and_reference_grow_the_same_trees(tree_device, kind, roots, actions, simulations, options):
    options = dict(options)
    discount, horizon = options.pop("discount", 0.9), options.pop("horizon", 3)
    ours, theirs = both_layouts(tree_device, roots=roots, actions=actions, simulations=simulations, discount=discount, lstm_horizon=horizon)
    for leaf, expected, legal in grow((ours, theirs), kind, **options):
        assert all(torch.equal(x, y) for x, y in zip(leaf, expected, strict=True))
        if legal is not None:
            at_root = leaf.parent == 0
            assert legal[at_root, leaf.action[at_root]].all()
    assert_same_trees(ours, theirs, lambda name: 1e-11)


@settings(max_examples=60)
@given(
    kind=st.sampled_from(["puct", "gumbel"]),
    roots=st.integers(1, 4),
    actions=st.integers(1, 9),
    simulations=st.integers(1, 24),
    horizon=st.integers(1, 4),
    discount=st.sampled_from([1.0, 0.988, 0.5, 0.0]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    masked=st.booleans(),
    noisy=st.booleans(),
    scale=st.sampled_from([0.3, 1.0, 6.0]),
    floor=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 2**31),
)
def test_native_walks_grow_the_trees_of_the_reference(kind, roots, actions, simulations, horizon, discount, **options):
    ours, theirs = both_layouts("cpu", roots=roots, actions=actions, simulations=simulations, discount=discount, lstm_horizon=horizon)
    assert (ours.form, theirs.form) == ("native", "reference")
    for leaf, expected, _ in grow((ours, theirs), kind, **options):
        assert all(torch.equal(x, y) for x, y in zip(leaf, expected, strict=True))
    # What is copied or counted is the same to the last bit; an exponential or a sum of products may round otherwise.
    assert_same_trees(ours, theirs, lambda name: 1e-12 * (name in ("prior", "value_sum", "child_q", "q_low", "q_high")))


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:All-NaN")
@pytest.mark.parametrize("kind", ["puct", "gumbel"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["value_prefix", "logits", "value"])
def test_outputs_that_are_not_finite_stay_within_their_root(device, kind, bad, where):
    """Root 1 of three is spoiled from its third node on; its walk stays within the tree, and the other two never notice."""
    simulations, actions, grown = 7, 3, []
    for spoiled in (True, False):
        generator = torch.Generator().manual_seed(0)
        tree = allocate(roots=3, actions=actions, simulations=simulations, discount=0.9, lstm_horizon=2, device=device)
        logits = torch.randn(3, actions, generator=generator).to(device)
        plant(tree, root_prior(logits), logits, torch.zeros(3, device=device))
        seen = []
        for i in range(simulations):
            leaf = select_puct(tree, i) if kind == "puct" else select_gumbel(tree, i, considered_visits(2, simulations)[i])
            assert ((leaf.parent >= 0) & (leaf.parent <= i) & (leaf.action >= 0) & (leaf.action < actions)).all()
            seen += leaf[:3]
            outputs = {"value_prefix": torch.randn(3, generator=generator), "logits": torch.randn(3, actions, generator=generator),
                       "value": torch.randn(3, generator=generator)}  # fmt: skip
            if spoiled and i >= 2:
                outputs[where][1] = bad
            expand_and_backup(tree, i, leaf, **{name: x.to(device) for name, x in outputs.items()})
        grown.append([x[[0, 2]] for x in (*seen, tree.value_sum, tree.q_high)])
    assert all(torch.equal(x, y) for x, y in zip(*grown, strict=True))


@pytest.mark.parametrize(
    ("kind", "actions", "simulations", "horizon"),
    [("puct", 6, 20, 5), ("puct", 3, 14, 1), ("puct", 18, 10, 3), ("gumbel", 6, 16, 5), ("gumbel", 18, 10, 2), ("gumbel", 2, 14, 3)],
)
def test_a_search_on_the_kernels_is_the_oracles(device, kind, actions, simulations, horizon):
    config = SearchConfig(kind=kind, num_simulations=simulations, lstm_horizon=horizon)
    noise = draw_noise(kind, 2, actions, actions)
    assert_agrees(World(actions, actions, logit_scale=2.0), 2, config, noise, device=device)
