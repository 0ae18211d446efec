"""Learning targets, against the definition written as loops, and against episodes that never saw a ring."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speedyzero_kernels import nstep

NAN = float("nan")


def ring(lanes, slots, actions, chance, seed, half=False, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    fields = {
        "reward": torch.randn(lanes, slots, generator=g),
        "done": torch.rand(lanes, slots, generator=g) < chance,
        "value": torch.randn(lanes, slots, generator=g),
        "policy": torch.rand(lanes, slots, actions, generator=g).to(torch.float16 if half else torch.float32),
        "action": torch.randint(0, actions, (lanes, slots), generator=g),
    }
    return {name: x.to(device) for name, x in fields.items()}


def looped(fields, flat, n, unroll, discount, horizon):
    """One sample by the definition: value, prefix, policy, action, mask, policy_mask as lists."""
    slots = fields["done"].shape[1]
    lane, slot = divmod(flat, slots)

    def at(name, k):
        return fields[name][lane, (slot + k) % slots].tolist()

    def clear(begin, end):  # no done in [begin, end)
        return not any(at("done", k) for k in range(begin, end))

    mask = [clear(0, k) for k in range(unroll + 1)]
    policy_mask = [clear(0, k + 1) for k in range(unroll + 1)]
    value, prefix = [], []
    for k in range(unroll + 1):
        z = sum(discount ** (i - 1) * at("reward", k + i) for i in range(1, n + 1) if clear(k, k + i))
        z += discount**n * at("value", k + n) if clear(k, k + n + 1) else 0.0
        value.append(z if mask[k] else 0.0)
    for k in range(1, unroll + 1):
        begin = horizon * ((k - 1) // horizon) + 1
        prefix.append(sum(at("reward", i) for i in range(begin, k + 1)) if mask[k] else 0.0)
    width = fields["policy"].shape[2]
    policy = [at("policy", k) if policy_mask[k] else [0.0] * width for k in range(unroll + 1)]
    action = [at("action", k) if policy_mask[k] else 0 for k in range(unroll)]
    return value, prefix, policy, action, mask, policy_mask


def agree(got, rows):
    for name, column in zip(("value", "prefix", "policy", "action", "mask", "policy_mask"), zip(*rows, strict=True), strict=True):
        have = getattr(got, name).cpu()
        want = torch.tensor(column, dtype=have.dtype).view(have.shape)
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@given(
    lanes=st.integers(1, 3), slots=st.integers(1, 14), actions=st.integers(1, 3),
    chance=st.sampled_from([0.0, 0.1, 0.4, 1.0]), count=st.sampled_from([1, 2, 9]), unroll=st.integers(0, 6),
    n_max=st.integers(1, 5), horizon=st.integers(1, 7), discount=st.sampled_from([0.0, 0.5, 0.988, 1.0]),
    half=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=70)
def test_targets_are_those_of_the_definition(device, lanes, slots, actions, chance, count, unroll, n_max, horizon, discount, half, seed):
    fields = ring(lanes, slots, actions, chance, seed, half, device)
    g = torch.Generator().manual_seed(seed + 1)
    index = torch.randint(0, lanes * slots, (count,), generator=g).to(device)
    n = torch.randint(1, n_max + 1, (count,), generator=g).to(device)
    got = nstep.targets(**fields, index=index, n=n, unroll=unroll, n_max=n_max, discount=discount, horizon=horizon)
    assert (got.value.shape, got.prefix.shape) == ((count, unroll + 1), (count, unroll))
    agree(got, [looped(fields, i, steps, unroll, discount, horizon) for i, steps in zip(index.tolist(), n.tolist(), strict=True)])
    before = {name: x.clone() for name, x in fields.items()}
    got.policy.zero_()
    assert all(torch.equal(fields[name], before[name]) for name in fields), "the targets share no memory with the ring"


def test_nothing_past_a_done_or_past_n_is_read(device):
    fields = ring(1, 9, 2, 0.0, 0, device=device)
    fields["done"][0, 2] = True
    for name in ("reward", "value", "policy"):
        fields[name][0, 3:] = NAN
    fields["value"][0, 2], fields["policy"][0, 2] = NAN, NAN
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    got = nstep.targets(**fields, index=zero, n=zero + 2, unroll=3, n_max=4, discount=0.9, horizon=2)
    assert all(x.isfinite().all() for x in (got.value, got.prefix, got.policy))
    open_end = ring(1, 9, 2, 0.0, 0, device=device)
    open_end["reward"][0, 3:] = NAN
    for n, discount in ((2, 0.9), (4, 0.0)):
        got = nstep.targets(**open_end, index=zero, n=zero + n, unroll=0, n_max=4, discount=discount, horizon=2)
        assert got.value.isfinite().all()


@pytest.mark.parametrize(
    ("lanes", "slots", "actions", "samples", "unroll", "n_max", "horizon", "discount"),
    [
        (1, 1, 1, 1, 0, 1, 1, 0.988), (1, 12, 18, 3, 5, 5, 5, 1), (3, 50, 6, 33, 5, 5, 5, 0.988), (2, 40, 18, 35, 0, 5, 5, 0.988),
        (4, 9, 3, 7, 7, 8, 3, 0.5), (4, 9, 3, 7, 7, 8, 3, 0.0), (2, 3, 7, 9, 5, 4, 2, 0.988), (1, 30, 1024, 3, 1, 3, 5, 0.988),
        (2, 17, 5, 8, 8, 7, 2**40, 1.0), (2, 700, 3, 3, 256, 256, 7, 0.988), (1, 40, 300, 5, 3, 1, 2, 0.988),
        (8, 30, 2, 1025, 0, 5, 5, 0.9), (1, 8, 3, 0, 2, 2, 2, 0.5),
    ],
)  # fmt: skip
@pytest.mark.parametrize("half", [False, True])
def test_targets_are_those_of_the_reference(device, lanes, slots, actions, samples, unroll, n_max, horizon, discount, half):
    chance = 0.005 if slots > 100 else 0.1
    fields = ring(lanes, slots, actions, chance, samples, half, device)
    g = torch.Generator().manual_seed(0)
    index = torch.randint(lanes * slots, (samples,), generator=g).to(device)
    n = torch.randint(1, n_max + 1, (samples,), generator=g).to(device)
    given = {"index": index, "n": n, "unroll": unroll, "n_max": n_max, "discount": discount, "horizon": horizon}
    got, want = nstep.targets(**fields, **given), nstep.targets_reference(**fields, **given)
    for name in vars(want):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-5, atol=3e-5 if slots > 100 else 3e-6)


def test_nan_and_infinite_entries_that_count_come_through(device):
    fields = ring(1, 8, 2, 0.0, 0, device=device)
    fields["reward"][0, 2], fields["reward"][0, 5], fields["value"][0, 7] = NAN, float("inf"), -float("inf")
    index = torch.arange(8, device=device)
    given = {"index": index, "n": index % 2 + 1, "unroll": 2, "n_max": 2, "discount": 0.5, "horizon": 2}
    got, want = nstep.targets(**fields, **given), nstep.targets_reference(**fields, **given)
    for name in vars(want):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), equal_nan=True)


@pytest.mark.parametrize(("samples", "unroll", "actions"), [(1, 2, 3), (3, 3, 2), (5, 5, 18), (1, 0, 1)])
def test_nothing_is_written_past_an_output(device, fenced, samples, unroll, actions):
    index = torch.zeros(samples + 64, dtype=torch.int64, device=device)[:samples]  # a read past its end finds no wild index
    fields = ring(1, 20, actions, 0.0, 0, device=device)
    nstep.targets(**fields, index=index, n=index + 1, unroll=unroll, n_max=2, discount=0.5, horizon=2)
    fenced()
