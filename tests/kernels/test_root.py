"""The root's prior and the schedule of Gumbel search, against numbers worked out by hand and plain Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speedyzero_kernels.root import considered_visit_of, considered_visits, gumbel_root_score, root_prior, root_prior_reference


@pytest.mark.parametrize(
    ("considered", "simulations", "expected"),
    [
        (1, 4, [0, 1, 2, 3]),
        (2, 6, [0, 0, 1, 1, 2, 2]),  # one phase: 6 / (1 x 2) = 3 visits each
        (4, 8, [0, 0, 0, 0, 1, 1, 2, 2]),  # two phases: 8 / (2 x 4) = 1 visit to each of 4, then 8 / (2 x 2) = 2 to each of 2
        # Two phases for 3 actions: 7 / (2 x 3) = 1, then 3 // 2 = 1 counts as 2 actions, 7 / (2 x 2) = 1, and again.
        (3, 7, [0, 0, 0, 1, 1, 2, 2]),
        # Three phases for 8: 32 / 24 = 1 each of 8, 32 / 12 = 2 each of 4, 32 / 6 = 5 each of 2, and what is left.
        (8, 32, [0] * 8 + [1] * 4 + [2] * 4 + [n for n in range(3, 11) for _ in range(2)]),
        (4, 2, [0, 0]),
    ],
)
def test_sequential_halving_table_by_hand(considered, simulations, expected):
    assert considered_visits(considered, simulations) == expected


def test_gumbel_root_score_by_hand():
    score = gumbel_root_score(
        torch.tensor([[1.0, 3.0, -2e9]]).double(),
        torch.tensor([[0.5, 9.0, 0.0]]),
        torch.tensor([[2.0, 0.0, 1.0]]),
        torch.tensor([[1.0, 2.0, 1.0]]),
        considered_visit=1,
    )
    assert score.tolist() == [[0.5, -math.inf, -1e9]]


def test_root_prior_by_hand(device):
    """Logits 0, 0, log 3: without the first action (1, 3)/4. Noise 0.5, 0.1, 0.4: without it (1, 4)/5. Half of each."""
    logits, noise = torch.tensor([[0.0, 0.0, math.log(3)]], device=device), torch.tensor([[0.5, 0.1, 0.4]], device=device)
    legal = torch.tensor([[False, True, True]], device=device)
    assert root_prior(logits)[0].tolist() == pytest.approx([0.2, 0.2, 0.6])
    assert root_prior(logits, noise, 0.2)[0].tolist() == pytest.approx([0.26, 0.18, 0.56])
    assert root_prior(logits, None, 0.5, legal)[0].tolist() == pytest.approx([0.0, 0.25, 0.75])
    assert root_prior(logits, noise, 0.5, legal)[0].tolist() == pytest.approx([0.0, 0.225, 0.775])
    lost = torch.tensor([[1.0, 0.0, 0.0]], device=device)  # noise on an illegal action alone
    assert root_prior(logits, lost, 0.2, legal)[0].tolist() == pytest.approx([0.0, 0.2, 0.6])


@pytest.mark.parametrize("actions", [1, 2, 6, 18, 32, 33, 200])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_root_prior_over_shapes_and_dtypes(device, actions, dtype):
    generator = torch.Generator().manual_seed(actions)
    logits = (4 * torch.randn(5, actions, generator=generator)).to(dtype)
    noise = torch.rand(5, actions, generator=generator).to(dtype)
    legal = torch.rand(5, actions, generator=generator) < 0.7
    legal[:, actions // 2] = True
    for mixed_in in (None, noise):
        for mask in (None, legal):
            arguments = [x if x is None else x.to(device) for x in (logits, mixed_in)]
            got = root_prior(*arguments, 0.3, mask if mask is None else mask.to(device))
            torch.testing.assert_close(got.cpu(), root_prior_reference(logits, mixed_in, 0.3, mask), rtol=1e-12, atol=1e-15)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_infinite_and_missing_logits_stay_within_their_row(device):
    logits = torch.tensor([[math.nan, 0.0], [math.inf, 0.0], [-math.inf, 0.0], [0.0, 0.0]], device=device)
    prior = root_prior(logits).cpu()
    assert prior[:2].isnan().any(dim=1).all()
    assert prior[2:].tolist() == [[0.0, 1.0], [0.5, 0.5]]


@given(st.lists(st.lists(st.booleans(), min_size=7, max_size=7).filter(any), min_size=1, max_size=5), st.integers(1, 9), st.integers(1, 40))
@settings(max_examples=40)
def test_every_root_follows_the_table_of_its_own_number_of_actions(legal, considered, simulations):
    for simulation in range(0, simulations, 3):
        got = considered_visit_of(torch.tensor(legal), considered, simulations, simulation)
        assert got.tolist() == [considered_visits(min(considered, sum(row)), simulations)[simulation] for row in legal]
