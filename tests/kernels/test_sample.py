"""Prioritised sampling, against exact fractions, counted draws and patched roundings."""

from bisect import bisect_right
from fractions import Fraction
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speedyzero_kernels import sample

NAN, INF = float("nan"), float("inf")
levels = st.sampled_from([0.0, 0.0, -1.0, NAN, INF, -INF, 1e-30, 1e-6, 0.5, 1.0, 3.0, 1e6])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def masses(priorities: list[float], alpha: float) -> list[float]:
    return [p**alpha if 0 < p < INF else 0.0 for p in priorities]


def test_weights_of_three_slots_worked_by_hand():
    # mass 1, 0, 3: P = 1/4, 3/4, two positive slots; (2 * 1/4)^-1 = 2 and (2 * 3/4)^-1 = 2/3: ratio 1/3
    indices, weights = sample.proportional(torch.tensor([1.0, 0.0, 3.0]), 4, 1.0, 1.0, seeded())
    assert indices.tolist() == [0, 2, 2, 2]
    torch.testing.assert_close(weights, torch.tensor([1.0, 1 / 3, 1 / 3, 1 / 3]))
    assert (indices.dtype, weights.dtype) == (torch.int64, torch.float32)


def test_alpha_bends_the_distribution():
    indices, weights = sample.proportional(torch.tensor([1.0, 0.0, 9.0]), 4, 0.5, 0.4, seeded())
    assert indices.tolist() == [0, 2, 2, 2]
    torch.testing.assert_close(weights[1:], torch.full((3,), 3.0**-0.4))


@given(st.lists(levels, min_size=1, max_size=12), st.integers(1, 9), st.sampled_from([0.0, 0.5, 0.6, 1.0]),
       st.sampled_from([0.0, 0.4, 1.0]), st.integers(0, 2**31))  # fmt: skip
@settings(deadline=None, max_examples=150)
def test_each_draw_is_the_slot_that_its_stratum_point_falls_in(priorities, batch, alpha, beta, seed):
    indices, weights = sample.proportional(torch.tensor(priorities), batch, alpha, beta, seeded(seed))
    mass = masses(torch.tensor(priorities).tolist(), alpha)
    if not any(mass):
        assert indices.tolist() == [0] * batch
        assert weights.tolist() == [0.0] * batch
        return
    uniforms = torch.rand(batch, dtype=torch.float64, generator=seeded(seed)).tolist()
    upto = list(accumulate(map(Fraction, mass)))
    raw = []
    for j, (i, u) in enumerate(zip(indices.tolist(), uniforms, strict=True)):
        assert mass[i] > 0
        point = (j + Fraction(u)) / batch * upto[-1]
        slack = upto[-1] / 10**12
        assert upto[i] - Fraction(mass[i]) - slack <= point <= upto[i] + slack
        if upto[i] - slack > point > upto[i] - Fraction(mass[i]) + slack:
            assert i == bisect_right(upto, point)
        raw.append((sum(m > 0 for m in mass) * mass[i] / sum(mass)) ** -beta)
    torch.testing.assert_close(weights, torch.tensor([w / max(raw) for w in raw]), rtol=1e-5, atol=1e-12)


@given(st.lists(st.booleans(), min_size=1, max_size=20).filter(any), st.integers(1, 40), st.integers(0, 2**31))
@settings(deadline=None)
def test_alpha_zero_is_uniform_over_the_positive_slots(positive, batch, seed):
    priorities = torch.tensor([7.0**k if p else 0.0 for k, p in enumerate(positive)], dtype=torch.float64)
    indices, weights = sample.proportional(priorities, batch, 0.0, 1.0, seeded(seed))
    count = torch.bincount(indices, minlength=len(positive))
    for c, p in zip(count.tolist(), positive, strict=True):
        assert abs(c - p * batch / sum(positive)) < 2 * p + 1e-9  # stratified: within two of the expected count
    assert weights.tolist() == [1.0] * batch


def test_draws_follow_the_priorities():
    priorities = torch.tensor([0.0, 1.0, 2.0, 0.0, 4.0, 0.5, 8.0, 0.0])
    chance = priorities.double().pow(0.6)
    chance /= chance.sum()
    generator, rounds = seeded(1), 300
    for batch in (1, 16):
        count = torch.zeros(8, dtype=torch.float64)
        for _ in range(rounds * 8 // min(batch, 8)):
            drawn, _ = sample.proportional(priorities, batch, 0.6, 0.4, generator)
            count += torch.bincount(drawn, minlength=8)
        live = chance > 0
        assert count[~live].sum() == 0
        expected = chance[live] * count.sum()
        assert ((count[live] - expected) ** 2 / expected).sum() < 20.5  # chi-square, 4 degrees: p = 0.0004


def test_one_draw_falls_in_every_stratum():
    generator = seeded(2)
    for _ in range(20):
        indices, _ = sample.proportional(torch.ones(64), 64, 0.6, 0.4, generator)
        assert indices.tolist() == list(range(64))


@pytest.mark.parametrize("batch", [1, 3, 7, 256])
@pytest.mark.parametrize("priorities", [[0, 0, 1, 3, 0, 0], [1e-30, 0, 0.1, 0], [0, 5], [5, 0], [0.1] * 10 + [0] * 3])
@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53])
def test_extreme_uniforms_draw_no_empty_slot(monkeypatch, priorities, batch, uniform):
    priorities = torch.tensor(priorities, dtype=torch.float32)
    monkeypatch.setattr(torch, "rand", lambda n, dtype, device, generator: torch.full((n,), uniform, dtype=dtype))
    indices, weights = sample.proportional(priorities, batch, 0.6, 0.4, None)
    assert (priorities[indices] > 0).all()
    assert weights.isfinite().all()
    positive = (priorities > 0).nonzero()
    assert indices[-1 if uniform else 0] == positive[-1 if uniform else 0]


def test_a_point_on_the_border_of_two_slots_belongs_to_the_upper_one(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda n, dtype, device, generator: torch.zeros(n, dtype=dtype))
    indices, _ = sample.proportional(torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]), 4, 1.0, 0.4, None)
    assert indices.tolist() == [0, 1, 3, 4]


def test_a_prefix_sum_that_rounds_up_at_an_empty_slot_still_draws_none(monkeypatch):
    # what a parallel scan may do by an ulp, exaggerated: slots 2 and 3 get a share of the sum without having any mass
    real = torch.Tensor.cumsum

    def rough(x, dim, **options):
        out = real(x, dim, **options)
        if out.dtype == torch.float64:
            out[2:4] += 0.4
        return out

    monkeypatch.setattr(torch.Tensor, "cumsum", rough)
    indices, _ = sample.proportional(torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0]), 100, 1.0, 0.4, seeded())
    assert sorted(set(indices.tolist())) == [1, 4]


def test_one_slot_and_one_draw_is_that_slot_with_weight_one():
    indices, weights = sample.proportional(torch.tensor([0.3]), 1, 0.6, 0.4, seeded())
    assert (indices.tolist(), weights.tolist()) == ([0], [1.0])


def test_the_same_generator_state_gives_the_same_batch_and_it_advances():
    priorities, generator = torch.rand(100, generator=seeded(5)), seeded(3)
    one = sample.proportional(priorities, 32, 0.6, 0.4, seeded(3))[0]
    two, three = (sample.proportional(priorities, 32, 0.6, 0.4, generator)[0] for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(two, three)


def test_tensor_exponents_are_the_same_as_floats():
    priorities = torch.rand(50, generator=seeded(4))
    floats = sample.proportional(priorities, 16, 0.5, 0.25, seeded())
    tensors = sample.proportional(priorities, 16, torch.tensor(0.5), torch.tensor(0.25), seeded())
    assert torch.equal(floats[0], tensors[0])
    torch.testing.assert_close(floats[1], tensors[1])


def test_four_million_light_slots_behind_a_heavy_one_are_all_in_reach():
    priorities = torch.ones(4_000_000)
    priorities[0] = 2.0**28  # past it a f32 prefix sum moves in steps of 32 slots
    indices, _ = sample.proportional(priorities, 65536, 1.0, 1.0, seeded())
    light = indices[indices > 0]
    assert len(light) == pytest.approx(65536 * 4e6 / (2**28 + 4e6), abs=2)
    assert len((light % 32).unique()) == 32
    gap = (2**28 + 4e6) / 65536
    assert light.diff().max() < 2 * gap + 1


def test_priorities_are_left_alone():
    priorities = torch.tensor([NAN, -1.0, 0.0, 2.0])
    before = priorities.clone()
    sample.proportional(priorities, 3, 0.6, 0.4, seeded())
    assert torch.equal(priorities.nan_to_num(9.0), before.nan_to_num(9.0))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("priorities", {"priorities": torch.ones(3, dtype=torch.int64)}),
        ("priorities", {"priorities": torch.ones(3, 1)}),
        ("priorities", {"priorities": torch.ones(0)}),
        ("batch", {"batch": 0}),
        ("alpha", {"alpha": torch.ones(1)}),
        ("beta", {"beta": torch.ones((), device="meta")}),
        ("generator", {"priorities": torch.ones(3, device="meta"), "generator": torch.Generator()}),
    ],
)
def test_a_bad_argument_is_named(name, change):
    good = {"priorities": torch.ones(3), "batch": 2, "alpha": 0.6, "beta": 0.4, "generator": None}
    with pytest.raises(ValueError, match=f"^{name}:"):
        sample.proportional(**good | change)


def test_nothing_waits_for_a_value_or_makes_a_tensor_on_another_device():
    priorities, beta = torch.ones(9, device="meta"), torch.ones((), device="meta")  # meta tensors have no values
    indices, weights = sample.proportional(priorities, 4, 0.6, beta, None)
    assert (indices.device.type, weights.device.type) == ("meta", "meta")
    assert (indices.shape, weights.shape) == ((4,), (4,))
