"""Prioritised sampling, against exact fractions, counted draws and patched roundings."""

from bisect import bisect_right
from fractions import Fraction
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speedyzero_kernels import dispatch, sample

NAN, INF = float("nan"), float("inf")
levels = st.sampled_from([0.0, 0.0, -1.0, NAN, INF, -INF, 1e-30, 1e-6, 0.5, 1.0, 3.0, 1e6])


def seeded(seed: int = 0, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def masses(priorities: list[float], alpha: float) -> list[float]:
    return [p**alpha if 0 < p < INF else 0.0 for p in priorities]


def interpreted(device: str) -> bool:
    return dispatch.runs_kernel(torch.ones(1)) and device == "cpu"


@given(st.lists(levels, min_size=1, max_size=12), st.integers(1, 9), st.sampled_from([0.0, 0.5, 0.6, 1.0]),
       st.sampled_from([0.0, 0.4, 1.0]), st.integers(0, 2**31))  # fmt: skip
@settings(max_examples=80)
def test_each_draw_is_the_slot_that_its_stratum_point_falls_in(device, priorities, batch, alpha, beta, seed):
    indices, weights = sample.proportional(torch.tensor(priorities, device=device), batch, alpha, beta, seeded(seed, device))
    mass = masses(torch.tensor(priorities).tolist(), alpha)
    if not any(mass):
        assert indices.tolist() == [0] * batch
        assert weights.tolist() == [0.0] * batch
        return
    uniforms = torch.rand(batch, dtype=torch.float64, generator=seeded(seed, device), device=device).tolist()
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
    torch.testing.assert_close(weights.cpu(), torch.tensor([w / max(raw) for w in raw]), rtol=1e-5, atol=1e-12)


FAR = [0, 127, 128, 255, 256, 300, 511, 639]


@pytest.mark.parametrize("batch", [1, 33])
@pytest.mark.parametrize(
    "priorities",
    [[0, 0, 1, 3, 0, 0], [1e-30, 0, 0.1, 0], [0, 5], [5, 0], [0.1] * 10 + [0] * 3, *([0] * i + [0.1] + [0] * (639 - i) for i in FAR)],
    ids=len,
)
@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53])
def test_extreme_uniforms_draw_no_empty_slot(device, monkeypatch, priorities, batch, uniform):
    priorities = torch.tensor(priorities, dtype=torch.float32, device=device)
    monkeypatch.setattr(torch, "rand", lambda n, dtype, device, generator: torch.full((n,), uniform, dtype=dtype, device=device))
    indices, weights = sample.proportional(priorities, batch, 0.6, 0.4, None)
    assert (priorities[indices] > 0).all()
    assert weights.isfinite().all()
    positive = (priorities > 0).nonzero()
    assert indices[-1 if uniform else 0] == positive[-1 if uniform else 0]


@pytest.mark.parametrize(
    ("priorities", "upper"), [([1.0, 1.0, 0.0, 1.0, 1.0], [0, 1, 3, 4]), ([1.0] * 512, [0, 128, 256, 384])], ids=["slots", "blocks"]
)
def test_a_point_on_the_border_of_two_belongs_to_the_upper_one(device, monkeypatch, priorities, upper):
    monkeypatch.setattr(torch, "rand", lambda n, dtype, device, generator: torch.zeros(n, dtype=dtype, device=device))
    assert sample.proportional(torch.tensor(priorities, device=device), 4, 1.0, 0.4, None)[0].tolist() == upper


@pytest.mark.parametrize("empty", [1, 100, 128, 300])
def test_a_point_that_rounds_below_all_mass_draws_no_empty_slot(device, monkeypatch, empty):
    # no rounding goes so far; a point within a block is a difference of sums, and may fall below its first slot with mass
    monkeypatch.setattr(torch, "rand", lambda n, dtype, device, generator: torch.full((n,), -0.1, dtype=dtype, device=device))
    priorities = torch.ones(640, device=device)
    priorities[:empty] = 0
    indices, weights = sample.proportional(priorities, 1, 0.6, 0.4, None)
    assert (indices.tolist(), weights.tolist()) == ([empty], [1.0])


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


def test_the_same_generator_state_gives_the_same_batch_and_it_advances(device):
    priorities, generator = torch.rand(100, generator=seeded(5)).to(device), seeded(3, device)
    one = sample.proportional(priorities, 32, 0.6, 0.4, seeded(3, device))[0]
    two, three = (sample.proportional(priorities, 32, 0.6, 0.4, generator)[0] for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(two, three)


def test_four_million_light_slots_behind_a_heavy_one_are_all_in_reach(device):
    heavy, batch = (2.0**24, 64) if interpreted(device) else (2.0**28, 65536)
    priorities = torch.ones(4_000_000, device=device)
    priorities[0] = heavy  # past 2^28 a f32 prefix sum moves in steps of 32 slots
    indices, weights = sample.proportional(priorities, batch, 1.0, 1.0, seeded(0, device))
    assert (indices > 0).sum() == pytest.approx(batch * 4e6 / (heavy + 4e6), abs=2)
    wanted, expected = sample.proportional_reference(priorities, batch, 1.0, 1.0, seeded(0, device))
    assert torch.equal(indices, wanted)
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("batch", [1, 17])
@pytest.mark.parametrize("slots", [1, 2, 127, 128, 129, 1000, 4097])
def test_draws_are_those_of_the_reference(device, slots, batch):
    priorities = torch.rand(slots, generator=seeded(slots)).to(device)
    priorities[slots // 3 : slots // 2] = 0
    indices, weights = sample.proportional(priorities, batch, 0.6, 0.4, seeded(batch, device))
    wanted, expected = sample.proportional_reference(priorities, batch, 0.6, 0.4, seeded(batch, device))
    assert torch.equal(indices, wanted)
    torch.testing.assert_close(weights, expected)
    assert (indices.dtype, weights.dtype) == (torch.int64, torch.float32)


@pytest.mark.parametrize("dtype", sample.FLOATS)
def test_every_floating_dtype_draws_as_the_reference(device, dtype):
    priorities = torch.randn(300, generator=seeded(8), dtype=torch.float64).mul(3).to(dtype).to(device)
    priorities[::7], priorities[1::7], priorities[2::7] = NAN, INF, -INF
    before = priorities.clone()
    alpha, beta = (torch.tensor(x, dtype=dtype, device=device) for x in (0.5, 0.25))  # exponents may be tensors of any, too
    indices, weights = sample.proportional(priorities, 20, alpha, beta, seeded(9, device))
    torch.testing.assert_close(priorities, before, rtol=0, atol=0, equal_nan=True)
    wanted, expected = sample.proportional_reference(priorities, 20, 0.5, 0.25, seeded(9, device))
    assert torch.equal(indices, wanted)
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("slots", [5, 700])
def test_without_any_mass_the_weights_are_zero(device, slots):
    for nothing in (0.0, -1.0, NAN, INF):
        indices, weights = sample.proportional(torch.full((slots,), nothing, device=device), 3, 0.0, 0.4, seeded(0, device))
        assert (indices.tolist(), weights.tolist()) == ([0] * 3, [0.0] * 3)


def test_weights_span_all_tiles_of_a_batch():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    drawn = torch.rand(1300, generator=seeded(3), dtype=torch.float64).add(1e-3).to(device)
    drawn[1290] = 1e-4  # the least of all, in the last tile
    beta, weights = torch.tensor(0.7, device=device), torch.full((1301,), NAN, device=device)
    sample._weight_kernel[(2,)](drawn, beta, weights, 1300, BLOCK=1024)
    torch.testing.assert_close(weights[:1300], (drawn / 1e-4).pow(-0.7).float())
    assert weights[1300].isnan()


@pytest.mark.parametrize(("slots", "batch"), [(1, 1), (129, 3), (300, 33)])
def test_nothing_is_written_past_an_output(device, fenced, slots, batch):
    sample.proportional(torch.ones(slots, device=device), batch, 0.6, 0.4, seeded(0, device))
    fenced()
