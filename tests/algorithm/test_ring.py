
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speedyzero.config import Config
from speedyzero.refresh import refresh_priorities, sweep
from speedyzero.ring import Inbox, Ring, allocate, eligible, ingest

CPU = torch.device("cpu")


def new_ring(lanes: int, slots: int, **settings) -> tuple[Ring, Config]:
    config = Config(lanes=lanes, ring_positions=lanes * slots, **{"frame_stack": 1, **settings})
    return allocate(config.lanes, config.slots, (1, 1, 2), torch.uint8, 3, CPU), config


def inbox(lanes: int, reward=0.0, done=False, first=False, frame=0) -> Inbox:
    def row(value, dtype):
        return torch.as_tensor(value, dtype=dtype).expand(lanes).clone()

    frames = torch.full((lanes, 1, 1, 2), frame, dtype=torch.uint8)
    return Inbox(frames, row(reward, torch.float32), row(done, torch.bool), row(first, torch.bool))


def test_every_lane_writes_the_slot_of_the_head_and_wraps_around():
    ring, _ = new_ring(lanes=2, slots=3)
    for step in range(5):
        box = inbox(2, first=[step == 0, False], done=[False, step == 4])
        box.frames[0], box.frames[1] = step, 100 + step
        ingest(ring, box, clip_reward=False)
    # Steps 0..4 in three slots: 3 and 4 have overwritten 0 and 1.
    assert ring.frames[:, :, 0, 0, 0].tolist() == [[3, 4, 2], [103, 104, 102]]
    assert ring.first.sum() == 0, "step 0 has been overwritten, and its flag with it"
    assert ring.done.tolist() == [[False] * 3, [False, True, False]]
    assert ring.head == 5
    assert ring.newest().tolist() == [1, 4]
    assert ring.age().tolist() == [1, 0, 2]


def test_the_first_slots_of_an_empty_buffer_get_priority_one_and_dead_slots_none():
    ring, _ = new_ring(lanes=2, slots=4)
    ingest(ring, inbox(2, done=[False, True]), clip_reward=False)
    assert ring.priority[:, 0].tolist() == [1.0, 0.0]
    assert ring.priority[:, 1:].eq(0).all()


def test_a_new_slot_gets_the_greatest_priority_in_the_buffer_as_it_stands():
    ring, _ = new_ring(lanes=2, slots=4)
    for _ in range(2):
        ingest(ring, inbox(2), clip_reward=False)
    ring.priority[:] = torch.tensor([[0.5, 7.0, 0.0, 0.0], [0.25, 0.125, 0.0, 0.0]])
    ring.measured[:, :2] = True
    ingest(ring, inbox(2, done=[False, True]), clip_reward=False)
    assert ring.priority[:, 2].tolist() == [7.0, 0.0]
    assert ring.measured.sum() == 4, "a new one only inherits"
    ring.priority[0, 1:3] = 0.25
    ingest(ring, inbox(2), clip_reward=False)
    assert ring.priority[:, 3].tolist() == [0.5, 0.5], "the 7 is no longer in the buffer"


def test_once_every_error_has_been_measured_anew_new_slots_no_longer_inherit_an_old_maximum():
    # DESIGN 4: "new data at the current maximum of the buffer (not an all-time maximum)". All rewards and values are 0,
    # so every measured priority is the floor; the 1 of the empty buffer must not pass from slot to slot for ever.
    ring, config = new_ring(lanes=2, slots=40, env_steps=1000)
    for step in range(200):
        ingest(ring, inbox(2, first=step == 0), clip_reward=False)
        if step >= 20:
            index = torch.cat((sweep(ring, 16, config.frame_stack), ring.newest()))
            ring.refreshed_at.view(-1)[index] = step
            refresh_priorities(ring, index, config)
    assert ring.priority.max() < 0.01


def test_what_the_last_lap_cached_in_a_slot_is_cleared():
    ring, _ = new_ring(lanes=2, slots=2)
    for _ in range(2):
        ingest(ring, inbox(2), clip_reward=False)
    for name in ("policy", "value", "root_value", "refreshed_at", "action", "measured"):
        getattr(ring, name).fill_(2)
    ingest(ring, inbox(2), clip_reward=False)
    assert ring.policy[:, 0].eq(0).all()
    assert ring.policy[:, 1].eq(2).all()
    for name, cleared in (("value", 0), ("root_value", 0), ("refreshed_at", -1), ("action", 0)):
        assert getattr(ring, name).tolist() == [[cleared, 2]] * 2, name
    assert ring.measured.tolist() == [[False, True]] * 2


@st.composite
def histories(draw):
    lanes = draw(st.integers(1, 3))
    unroll, n_step, stack = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    window = unroll + n_step + 1
    slots = window + stack + draw(st.integers(0, 6))
    head = draw(st.integers(1, 3 * slots))
    flags = st.lists(st.lists(st.sampled_from([False] * 9 + [True]), min_size=head, max_size=head), min_size=lanes, max_size=lanes)
    return unroll, n_step, stack, slots, draw(flags), draw(flags)


@settings(max_examples=120, deadline=None)
@given(histories(), st.sampled_from(["sweep", "sampled"]))
def test_eligible_is_what_a_walk_over_the_history_finds(history, mode):
    unroll, n_step, stack, slots, dones, unsearched = history
    lanes, head = len(dones), len(dones[0])
    ring, config = new_ring(lanes, slots, unroll=unroll, n_step=n_step, frame_stack=stack, refresh=mode)
    for step in range(head):
        now = [lane[step] for lane in dones]
        ingest(ring, inbox(lanes, done=now, first=[step == 0 or lane[step - 1] for lane in dones]), clip_reward=False)
        ring.refreshed_at[:, step % slots] = torch.tensor([-1 if lane[step] else step for lane in unsearched], dtype=torch.int32)

    expected = torch.zeros(lanes, slots, dtype=torch.bool)
    lost = max(0, head - slots)  # steps that were overwritten
    for lane in range(lanes):
        for step in range(lost, head):
            stacked = lost == 0 or step - (stack - 1) >= lost
            window = range(step, step + unroll + n_step + 1)
            complete = window[-1] < head
            targets = complete and all(dones[lane][s] or not unsearched[lane][s] for s in window)
            learnable = complete if mode == "sampled" else targets
            expected[lane, step % slots] = stacked and learnable and not dones[lane][step]
    assert torch.equal(eligible(ring, config), expected)
