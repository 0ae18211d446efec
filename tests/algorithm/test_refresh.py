import dataclasses

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speedyzero.config import Config
from speedyzero.refresh import n_steps, refresh_priorities, sweep, windows, write
from speedyzero.ring import Ring, allocate
from speedyzero.search import SearchResult

CPU = torch.device("cpu")


def ring_at(head: int, lanes: int, slots: int, **settings) -> tuple[Ring, Config]:
    config = Config(lanes=lanes, ring_positions=lanes * slots, **{"frame_stack": 1, **settings})
    ring = allocate(config.lanes, config.slots, (1, 1, 1), torch.uint8, 3, CPU)
    ring.head.fill_(head)
    return ring, config


def result_of(count: int, generator: torch.Generator) -> tuple[SearchResult, torch.Tensor]:
    policy = torch.rand(count, 3, generator=generator)
    result = SearchResult(
        visits=torch.randint(9, (count, 3), generator=generator, dtype=torch.int32),
        value=torch.randn(count, generator=generator),
        policy=policy / policy.sum(1, keepdim=True),
        depth=torch.ones(count, dtype=torch.int32),
    )
    return result, torch.randn(count, generator=generator)


def test_a_sweep_takes_all_lanes_of_the_oldest_steps_first():
    # 7 steps in 5 slots: steps 2..6 lie in slots 2, 3, 4, 0, 1, and step 6 is the newest. Lane 1 begins at index 5.
    ring, config = ring_at(7, lanes=2, slots=5)
    assert sweep(ring, 3, config.frame_stack).tolist() == [2, 7, 3]
    assert sweep(ring, 4, config.frame_stack).tolist() == [8, 4, 9, 0]
    assert sweep(ring, 2, config.frame_stack).tolist() == [5, 2], "a new lap begins with the oldest"


def test_a_sweep_leaves_out_the_steps_whose_stacked_frames_were_overwritten():
    # Steps 4..9 lie in a ring of 6; the stacks of steps 4 and 5 would reach back to steps 2 and 3. Step 9 is the newest.
    ring, config = ring_at(10, lanes=1, slots=6, frame_stack=3)
    assert sweep(ring, 4, config.frame_stack).tolist() == [0, 1, 2, 0]
    ring, config = ring_at(6, lanes=1, slots=6, frame_stack=3)
    assert sweep(ring, 4, config.frame_stack).tolist() == [0, 1, 2, 3], "nothing was overwritten yet"


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3), st.integers(3, 8), st.integers(2, 12), st.lists(st.tuples(st.integers(0, 3), st.integers(1, 12)), max_size=40))
def test_a_sweep_returns_to_a_position_only_after_every_other_has_had_its_turn(lanes, slots, head, moves):
    ring, config = ring_at(head, lanes, slots)
    visits: list[tuple[int, int, int]] = []  # (step, lane, head at the time)
    for advance, roots in moves:
        ring.head += advance
        now = int(ring.head)
        present = range(max(0, now - slots), now - 1)
        flat = sweep(ring, min(roots, lanes * len(present)), config.frame_stack).tolist()
        step_of = {step % slots: step for step in present}
        assert len(set(flat)) == len(flat)
        assert all(index % slots in step_of for index in flat), "never the newest slot, never one not written"
        visits += [(step_of[index % slots], index // slots, now) for index in flat]
    last: dict[tuple[int, int], int] = {}
    for turn, (step, lane, now) in enumerate(visits):
        if (step, lane) in last:
            since = last[step, lane]
            between = [visit[:2] for visit in visits[since + 1 : turn]]
            assert len(set(between)) == len(between)
            always_there = range(max(0, now - slots), visits[since][2] - 1)
            owed = {(s, other) for s in always_there for other in range(lanes)} - {(step, lane)}
            assert owed <= set(between)
        last[step, lane] = turn


def test_windows_are_the_slots_that_a_positions_targets_read():
    # K = 1, n = 2: slots t .. t + 3, modulo the six of the lane.
    ring, config = ring_at(9, lanes=2, slots=6, unroll=1, n_step=2)
    assert windows(ring, torch.tensor([1, 10]), config.window).tolist() == [1, 2, 3, 4, 10, 11, 6, 7]


def test_n_is_one_less_for_each_three_tenths_of_the_run_that_have_passed_since():
    # 100 steps of 2 lanes: n drops at ages of 30, 60, 90 and 120 transitions, that is 15, 30, 45 and 60 slots back.
    ring, config = ring_at(80, lanes=2, slots=80, env_steps=100)
    index = torch.tensor([[0], [80]]) + 79 - torch.tensor([0, 14, 15, 29, 30, 44, 45, 59, 60, 79])
    assert n_steps(ring, index, config).tolist() == [[5, 5, 4, 4, 3, 3, 2, 2, 1, 1]] * 2
    assert n_steps(ring, index, dataclasses.replace(config, n_step=3)).tolist() == [[3, 3, 2, 2, 1, 1, 1, 1, 1, 1]] * 2


def test_a_search_is_cached_where_it_belongs_and_dead_slots_keep_zeros():
    ring, _ = ring_at(8, lanes=2, slots=8)
    ring.done[0, 3] = True
    index = torch.tensor([9, 3, 0])
    result, value = result_of(3, torch.Generator().manual_seed(0))
    result.value[1] = value[1] = torch.nan  # even if their search gave no numbers
    write(ring, index, result, value, torch.tensor(41))
    for row, flat in enumerate(index.tolist()):
        dead, (lane, slot) = flat == 3, divmod(flat, 8)
        assert ring.policy[lane, slot].tolist() == ([0.0] * 3 if dead else result.policy[row].half().tolist())
        assert ring.value[lane, slot] == (0.0 if dead else value[row])
        assert ring.root_value[lane, slot] == (0.0 if dead else result.value[row])
        assert ring.refreshed_at[lane, slot] == 41
    untouched = torch.ones(16, dtype=torch.bool)
    untouched[index] = False
    assert ring.value.view(-1)[untouched].eq(0).all()
    assert ring.refreshed_at.view(-1)[untouched].eq(-1).all()


def test_all_roots_of_one_position_end_with_one_and_the_same_result():
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        ring, _ = ring_at(8, lanes=2, slots=8, refresh="sampled")
        index = torch.randint(16, (40,), generator=generator)
        result, value = result_of(40, generator)
        write(ring, index, result, value, torch.tensor(1), repeated=True)
        for flat in set(index.tolist()):
            row = (index == flat).nonzero()[-1].item()  # the live search comes last and must win
            assert torch.equal(ring.policy.view(-1, 3)[flat], result.policy[row].half())
            assert ring.value.view(-1)[flat] == value[row]
            assert ring.root_value.view(-1)[flat] == result.value[row]


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 2), st.integers(0, 20), st.integers(1, 4), st.sampled_from(["network", "root"]), st.integers(10, 60),
    st.integers(0, 2**31),
)  # fmt: skip
def test_refreshed_priorities_are_the_errors_of_the_cached_values(lanes, extra, n_step, kind, env_steps, seed):
    slots = 12
    ring, config = ring_at(slots + extra, lanes, slots, n_step=n_step, bootstrap=kind, env_steps=env_steps, discount=0.9)
    generator = torch.Generator().manual_seed(seed)
    for field in (ring.reward, ring.value, ring.root_value, ring.priority):
        field.copy_(torch.randn(field.shape, generator=generator))
    ring.priority.abs_()
    ring.done.copy_(torch.rand(ring.done.shape, generator=generator) < 0.1)
    ring.refreshed_at.copy_(-(torch.rand(ring.done.shape, generator=generator) < 0.1).int())
    for field in (ring.value, ring.root_value, ring.priority):
        field.masked_fill_(ring.done, 0.0)
    before = ring.priority.clone()
    index = torch.randperm(lanes * slots, generator=generator)[: lanes * slots - 3]
    refresh_priorities(ring, index, config)

    values = ring.value if kind == "network" else ring.root_value
    for flat in range(lanes * slots):
        lane, slot = divmod(flat, slots)
        age = (slots + extra - 1 - slot) % slots
        n = min(n_step, max(1, n_step - int(age * lanes // (0.3 * env_steps // 1))))
        expected = before[lane, slot].item()
        if flat in index.tolist() and not ring.done[lane, slot] and age >= n:
            target, ended = 0.0, False
            for k in range(1, n + 1):
                here = (slot + k) % slots
                if not ended:
                    target += 0.9 ** (k - 1) * ring.reward[lane, here].item()
                ended = ended or bool(ring.done[lane, here])
            target += 0.0 if ended else 0.9**n * values[lane, (slot + n) % slots].item()
            end = (slot + n) % slots
            unknown = not ended and ring.refreshed_at[lane, end] < 0 and not ring.done[lane, end]
            expected = before[lane, slot].item() if unknown else abs(ring.value[lane, slot].item() - target) + 1e-6
            assert ring.measured[lane, slot] != unknown
        else:
            assert not ring.measured[lane, slot]
        assert abs(ring.priority[lane, slot].item() - expected) < 1e-5
        assert not ring.done[lane, slot] or ring.priority[lane, slot] == 0
