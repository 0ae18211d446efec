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
    for name, column in zip(
        ("value", "prefix", "policy", "action", "mask", "policy_mask"), zip(*rows, strict=True), strict=True
    ):
        have = getattr(got, name).cpu()
        want = torch.tensor(column, dtype=have.dtype).view(have.shape)
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_a_short_episode_worked_by_hand(device):
    # frames 0 1 2 3* | 4 5: frame 3 is terminal, reward 8 on arriving there, frame 4 is the reset
    fields = {
        "reward": torch.tensor([[0.0, 1.0, 2.0, 8.0, 0.0, 16.0]]),
        "done": torch.tensor([[False, False, False, True, False, False]]),
        "value": torch.tensor([[10.0, 20.0, 30.0, 40.0, 50.0, 60.0]]),
        "policy": torch.tensor([[[0.1], [0.2], [0.3], [0.4], [0.5], [0.6]]]),
        "action": torch.tensor([[1, 2, 3, 4, 5, 6]]),
    }
    fields = {name: x.to(device) for name, x in fields.items()}
    index, n = torch.tensor([0, 2, 3], device=device), torch.tensor([2, 2, 1], device=device)
    got = nstep.targets(**fields, index=index, n=n, unroll=2, n_max=2, discount=0.5, horizon=5)
    # z0 = 1 + .5*2 + .25*30 = 9.5; z1 = 2 + .5*8, no bootstrap = 6; z2 = 8
    assert got.value.tolist() == [[9.5, 6.0, 8.0], [8.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert got.prefix.tolist() == [[1.0, 3.0], [8.0, 0.0], [0.0, 0.0]]
    assert got.mask.tolist() == [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    assert got.policy_mask.tolist() == [[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert got.action.tolist() == [[1, 2], [3, 0], [0, 0]]
    torch.testing.assert_close(got.policy[..., 0].cpu(), torch.tensor([[0.1, 0.2, 0.3], [0.3, 0.0, 0.0], [0.0, 0.0, 0.0]]))
    assert got.policy.dtype == torch.float32


def test_the_prefix_restarts_after_every_horizon_steps(device):
    fields = ring(1, 12, 2, 0.0, 0, device=device) | {"reward": 2.0 ** torch.arange(12.0, device=device)[None]}
    one = torch.ones(1, dtype=torch.int64, device=device)
    got = nstep.targets(**fields, index=one * 0, n=one, unroll=7, n_max=1, discount=0.9, horizon=3)
    assert got.prefix.tolist() == [[2, 6, 14, 16, 48, 112, 128]]
    assert nstep.targets(
        **fields, index=one * 0, n=one, unroll=3, n_max=1, discount=0.9, horizon=10**9
    ).prefix.tolist() == [[2, 6, 14]]


@given(
    lanes=st.integers(1, 3), slots=st.integers(1, 14), actions=st.integers(1, 3),
    chance=st.sampled_from([0.0, 0.1, 0.4, 1.0]), count=st.sampled_from([1, 2, 9]), unroll=st.integers(0, 6),
    n_max=st.integers(1, 5), horizon=st.integers(1, 7), discount=st.sampled_from([0.0, 0.5, 0.988, 1.0]),
    half=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=70)
def test_targets_are_those_of_the_definition(
    device, lanes, slots, actions, chance, count, unroll, n_max, horizon, discount, half, seed
):
    fields = ring(lanes, slots, actions, chance, seed, half, device)
    g = torch.Generator().manual_seed(seed + 1)
    index = torch.randint(0, lanes * slots, (count,), generator=g).to(device)
    n = torch.randint(1, n_max + 1, (count,), generator=g).to(device)
    got = nstep.targets(**fields, index=index, n=n, unroll=unroll, n_max=n_max, discount=discount, horizon=horizon)
    assert got.value.shape == got.mask.shape == got.policy_mask.shape == (count, unroll + 1)
    assert got.prefix.shape == got.action.shape == (count, unroll)
    rows = [
        looped(fields, i, steps, unroll, discount, horizon) for i, steps in zip(index.tolist(), n.tolist(), strict=True)
    ]
    agree(got, rows)


@pytest.mark.parametrize("seed", range(3))
def test_a_ring_filled_by_an_environment_gives_the_targets_of_its_episodes(device, seed):
    g = torch.Generator().manual_seed(seed)
    slots, unroll, n, discount, horizon = 23, 4, 3, 0.9, 3
    fields = ring(1, slots, 2, 0.0, seed)
    # Play: each episode is a list of (state value, policy, action, reward of that action), and a terminal frame.
    times: list[tuple[list, int]] = []  # of each frame: its episode and its step in it
    while len(times) < 60:
        length = int(torch.randint(1, 9, (), generator=g))
        episode = [
            (*torch.randn(2, generator=g).tolist(), torch.rand(2, generator=g).tolist(), s % 2) for s in range(length)
        ]
        times += [(episode, step) for step in range(length + 1)]
    last = len(times)
    for time in range(last):
        episode, step = times[time]
        slot, over = time % slots, step == len(episode)
        fields["reward"][0, slot] = episode[step - 1][1] if step else 0.0
        fields["done"][0, slot] = over
        fields["value"][0, slot] = NAN if over else episode[step][0]
        fields["policy"][0, slot] = torch.tensor([NAN, NAN] if over else episode[step][2])
        fields["action"][0, slot] = 99 if over else episode[step][3]
    starts = range(last - slots, last - unroll - n)
    rows = []
    for time in starts:
        episode, step = times[time]
        value, prefix, policy, action, mask, policy_mask = [], [], [], [], [], []
        for k in range(unroll + 1):
            here = step + k
            rewards = [e[1] for e in episode[here : here + n]]
            z = sum(r * discount**i for i, r in enumerate(rewards))
            z += discount**n * episode[here + n][0] if here + n < len(episode) else 0.0
            mask.append(here <= len(episode))
            policy_mask.append(here < len(episode))
            value.append(z)
            policy.append(episode[here][2] if here < len(episode) else [0.0, 0.0])
            if k < unroll:
                action.append(episode[here][3] if here < len(episode) else 0)
                since = step + horizon * (k // horizon)
                prefix.append(sum(e[1] for e in episode[since : here + 1]) if here < len(episode) else 0.0)
        rows.append((value, prefix, policy, action, mask, policy_mask))
    fields = {name: x.to(device) for name, x in fields.items()}
    index = torch.tensor([t % slots for t in starts], device=device)
    got = nstep.targets(
        **fields, index=index, n=torch.full_like(index, n), unroll=unroll, n_max=5, discount=discount, horizon=horizon
    )
    agree(got, rows)


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
    got = nstep.targets(**open_end, index=zero, n=zero + 2, unroll=0, n_max=4, discount=0.9, horizon=2)
    assert got.value.isfinite().all()


@pytest.mark.parametrize(
    ("lanes", "slots", "actions", "samples", "unroll", "n_max", "horizon", "discount"),
    [
        (1, 1, 1, 1, 0, 1, 1, 0.988), (1, 12, 18, 3, 5, 5, 5, 1), (3, 50, 6, 33, 5, 5, 5, 0.988), (2, 40, 18, 35, 0, 5, 5, 0.988),
        (4, 9, 3, 7, 7, 8, 3, 0.5), (4, 9, 3, 7, 7, 8, 3, 0.0), (2, 3, 7, 9, 5, 4, 2, 0.988), (1, 30, 1024, 3, 1, 3, 5, 0.988),
        (2, 17, 5, 8, 8, 7, 2**40, 1.0), (2, 700, 3, 3, 256, 256, 7, 0.988), (1, 40, 300, 5, 3, 1, 2, 0.988),
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


def test_many_samples_of_one_position_each(device):
    fields = ring(8, 30, 2, 0.1, 0, device=device)
    index = torch.arange(240, device=device).repeat(5)[:1025]
    n = index % 5 + 1
    given = {"index": index, "n": n, "unroll": 0, "n_max": 5, "discount": 0.9, "horizon": 5}
    got, want = nstep.targets(**fields, **given), nstep.targets_reference(**fields, **given)
    for name in vars(want):
        torch.testing.assert_close(getattr(got, name), getattr(want, name))


def test_nan_and_infinite_entries_that_count_come_through(device):
    fields = ring(1, 8, 2, 0.0, 0, device=device)
    fields["reward"][0, 2], fields["reward"][0, 5], fields["value"][0, 7] = NAN, float("inf"), -float("inf")
    index = torch.arange(8, device=device)
    given = {"index": index, "n": index % 2 + 1, "unroll": 2, "n_max": 2, "discount": 0.5, "horizon": 2}
    got, want = nstep.targets(**fields, **given), nstep.targets_reference(**fields, **given)
    for name in vars(want):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), equal_nan=True)


def test_with_discount_zero_no_later_reward_is_read(device):
    fields = ring(1, 8, 2, 0.0, 0, device=device)
    fields["reward"][0, 2:] = NAN
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    got = nstep.targets(**fields, index=zero, n=zero + 4, unroll=0, n_max=4, discount=0.0, horizon=2)
    assert got.value.item() == fields["reward"][0, 1].item()


def test_no_samples_give_empty_targets(device):
    index = torch.empty(0, dtype=torch.int64, device=device)
    got = nstep.targets(**ring(1, 8, 2, 0.0, 0, device=device), index=index, n=index, unroll=2, n_max=2, discount=0.5, horizon=2)
    assert (got.value.shape, got.policy.shape) == ((0, 3), (0, 3, 2))


@pytest.mark.parametrize(("samples", "unroll", "actions"), [(1, 2, 3), (3, 3, 2), (5, 5, 18), (1, 0, 1)])
def test_nothing_is_written_past_an_output(device, fenced, samples, unroll, actions):
    index = torch.zeros(samples + 64, dtype=torch.int64, device=device)[:samples]  # a read past its end finds no wild index
    fields = ring(1, 20, actions, 0.0, 0, device=device)
    nstep.targets(**fields, index=index, n=index + 1, unroll=unroll, n_max=2, discount=0.5, horizon=2)
    fenced()


def test_the_ring_is_left_alone(device):
    fields = ring(2, 7, 3, 0.3, 0, device=device)
    before = {name: x.clone() for name, x in fields.items()}
    index = torch.arange(14, device=device)
    got = nstep.targets(**fields, index=index, n=index % 3 + 1, unroll=2, n_max=3, discount=0.9, horizon=2)
    got.policy.zero_()
    got.value.zero_()
    assert all(torch.equal(fields[name], before[name]) for name in fields)


META = torch.zeros(2, 7, device="meta")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("reward", {"reward": torch.zeros(2, 7, dtype=torch.float64)}),
        ("reward", {"reward": torch.zeros(14)}),
        ("reward", {"reward": torch.zeros(7, 2).T}),
        ("done", {"done": torch.zeros(2, 7)}),
        ("done", {"done": torch.zeros(2, 6, dtype=torch.bool)}),
        ("value", {"value": torch.zeros(2, 7, dtype=torch.float16)}),
        ("value", {"value": META}),
        ("policy", {"policy": torch.zeros(2, 7)}),
        ("policy", {"policy": torch.zeros(2, 7, 3, dtype=torch.float64)}),
        ("action", {"action": torch.zeros(2, 7, dtype=torch.int32)}),
        ("index", {"index": torch.zeros(4)}),
        ("index", {"index": torch.zeros(4, dtype=torch.int64, device="meta")}),
        ("n", {"n": torch.ones(5, dtype=torch.int64)}),
        ("n", {"n": torch.ones(4, dtype=torch.int32)}),
        ("reward", {"reward": torch.zeros(1).expand(1, 2**30 + 1)}),
        ("policy", {"policy": torch.zeros(2, 7, 1025)}),
        ("policy", {"policy": torch.zeros(2, 7, 6)[:, :, ::2]}),
        ("index", {"index": torch.zeros(8, dtype=torch.int64)[::2]}),
        ("unroll", {"unroll": -1}),
        ("unroll", {"unroll": 257}),
        ("n_max", {"n_max": 0}),
        ("n_max", {"n_max": 257}),
        ("horizon", {"horizon": 0}),
    ],
)
def test_a_bad_argument_is_named(name, change):
    index = torch.zeros(4, dtype=torch.int64)
    good = ring(2, 7, 3, 0.3, 0) | {
        "index": index,
        "n": index + 1,
        "unroll": 2,
        "n_max": 3,
        "discount": 0.9,
        "horizon": 2,
    }
    with pytest.raises(ValueError, match=f"^{name}:"):
        nstep.targets(**good | change)


def test_nothing_waits_for_a_value_or_makes_a_tensor_on_another_device():
    fields = {name: x.to("meta") for name, x in ring(2, 9, 4, 0.1, 0, half=True).items()}  # no values to wait for
    index = torch.zeros(6, dtype=torch.int64, device="meta")
    got = nstep.targets(**fields, index=index, n=index, unroll=3, n_max=5, discount=0.9, horizon=2)
    assert {x.device.type for x in vars(got).values()} == {"meta"}
    assert got.policy.shape == (6, 4, 4)
