"""Frame stacks and augmentation, against a played episode, Python loops, and real padding and cropping."""

from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from speedyzero_kernels import gather


def walk(first: torch.Tensor, flat: int, stack: int) -> list[int]:
    lane, slot = divmod(flat, first.shape[1])
    out = [flat]
    for _ in range(stack - 1):
        if not first[lane, slot]:
            slot = slot - 1 if slot else first.shape[1] - 1
        out.append(lane * first.shape[1] + slot)
    return out[::-1]


@st.composite
def rings(draw):
    lanes, slots, seed = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(0, 2**31))
    chance = draw(st.sampled_from([0.0, 0.2, 0.5, 1.0]))
    generator = torch.Generator().manual_seed(seed)
    first = torch.rand(lanes, slots, generator=generator) < chance
    count = draw(st.sampled_from([1, 1, 2, 7]))
    index = torch.randint(0, lanes * slots, (count,), generator=generator)
    return first, index, draw(st.integers(1, 5)), generator


def shifted(stack: torch.Tensor, dy: int, dx: int, pad: int) -> torch.Tensor:
    """[S * C, H, W] f32, padded for real and cropped."""
    height, width = stack.shape[1:]
    return functional.pad(stack[None], (pad,) * 4, mode="replicate")[0, :, dy : dy + height, dx : dx + width]


def test_a_walk_back_wraps_and_stops_at_the_first_frame():
    first = torch.tensor([[False, False, False, True, False], [False, True, False, False, False]])
    index = torch.tensor([1, 3, 4, 5 + 0, 5 + 1, 5 + 3])
    want = [[3, 4, 0, 1], [3, 3, 3, 3], [3, 3, 3, 4], [7, 8, 9, 5], [6, 6, 6, 6], [6, 6, 7, 8]]
    assert gather.stack_indices(first, index, 4).tolist() == want


@given(rings())
@settings(deadline=None, max_examples=150)
def test_stack_indices_are_those_of_a_walk_in_python(ring):
    first, index, stack, _ = ring
    got = gather.stack_indices(first, index, stack)
    assert got.tolist() == [walk(first, i, stack) for i in index.tolist()]


@pytest.mark.parametrize("seed", range(4))
def test_a_played_ring_gives_back_the_stacks_the_player_saw(seed):
    generator = torch.Generator().manual_seed(seed)
    slots, stack, frames = 11, 4, 29
    ring, first = torch.zeros(1, slots, 1, 1, 1), torch.zeros(1, slots, dtype=torch.bool)
    seen: dict[int, list[float]] = {}
    fresh, view = True, deque(maxlen=stack)
    for time in range(frames):
        if fresh:
            view = deque([float(time)] * stack, maxlen=stack)
        else:
            view.append(float(time))
        ring[0, time % slots], first[0, time % slots] = float(time), fresh
        seen[time] = list(view)
        fresh = torch.rand((), generator=generator).item() < 0.25
    times = range(frames - slots + stack - 1, frames)  # the older ones' stacks are partly overwritten
    got = gather.observations(ring, first, torch.tensor([t % slots for t in times]), stack)
    assert got.flatten(1).tolist() == [seen[t] for t in times]


@given(rings(), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(0, 4), st.booleans(),
       st.booleans(), st.booleans())  # fmt: skip
@settings(deadline=None, max_examples=100)
def test_observations_are_stacked_then_padded_and_cropped(ring, channels, height, width, pad, byte, move, dim):
    first, index, stack, generator = ring
    frames = torch.randint(0, 256, (*first.shape, channels, height, width), generator=generator, dtype=torch.uint8)
    if not byte:
        frames = frames / 7 - 9
    shift = torch.randint(0, 2 * pad + 1, (len(index), 2), generator=generator) if move else None
    intensity = torch.rand(len(index), generator=generator) + 0.5 if dim else None
    got = gather.observations(frames, first, index, stack, shift, pad, intensity)
    flat = frames.flatten(0, 1)
    for j, i in enumerate(index.tolist()):
        want = torch.cat([flat[k] for k in walk(first, i, stack)]).float()
        want = want / 255 if byte else want
        if move:
            want = shifted(want, *shift[j].tolist(), pad)
        torch.testing.assert_close(got[j], want * intensity[j] if dim else want)
    assert got.shape == (len(index), stack * channels, height, width)
    assert got.dtype == torch.float32


def test_bytes_become_zero_to_one_and_floats_are_untouched():
    first, index = torch.ones(1, 2, dtype=torch.bool), torch.tensor([0, 1])
    frames = torch.tensor([0, 255], dtype=torch.uint8).view(1, 2, 1, 1, 1)
    assert gather.observations(frames, first, index, 1).flatten().tolist() == [0.0, 1.0]
    floats = torch.tensor([0.3, -1e9]).view(1, 2, 1, 1, 1)
    assert torch.equal(gather.observations(floats, first, index, 1).flatten(), floats.flatten())


def test_the_middle_shift_is_the_identity_and_the_corners_replicate():
    frames = torch.arange(9.0).view(1, 1, 1, 3, 3)
    first = torch.ones(1, 1, dtype=torch.bool)
    shift = torch.tensor([[1, 1], [0, 0], [2, 2], [0, 2]])
    got = gather.observations(frames, first, torch.zeros(4, dtype=torch.int64), 1, shift, pad=1)
    assert got[0].flatten().tolist() == list(range(9))
    assert got[1].flatten().tolist() == [0, 0, 1, 0, 0, 1, 3, 3, 4]
    assert got[2].flatten().tolist() == [4, 5, 5, 7, 8, 8, 7, 8, 8]
    assert got[3].flatten().tolist() == [1, 2, 2, 1, 2, 2, 4, 5, 5]


def test_all_frames_of_a_stack_move_and_dim_together():
    torch.manual_seed(0)
    frames = torch.randint(0, 256, (1, 1, 2, 5, 5), dtype=torch.uint8).expand(1, 4, 2, 5, 5).contiguous()
    first = torch.zeros(1, 4, dtype=torch.bool)
    got = gather.observations(frames, first, torch.tensor([3]), 4, torch.tensor([[0, 3]]), 2, torch.tensor([0.7]))
    planes = got.view(4, 2, 5, 5)
    assert all(torch.equal(planes[0], plane) for plane in planes)


def test_the_ring_is_left_alone():
    frames = torch.rand(1, 3, 1, 2, 2)
    before, first = frames.clone(), torch.ones(1, 3, dtype=torch.bool)
    index, shift, dim = torch.tensor([2]), torch.tensor([[0, 0]]), torch.tensor([0.5])
    gather.observations(frames, first, index, 1, shift, 4, dim)
    gather.observations(frames, first, index, 1, None, 4, dim).zero_()
    assert torch.equal(frames, before)
    assert shift.tolist() == [[0, 0]]


FIRST, INDEX = torch.zeros(2, 3, dtype=torch.bool), torch.zeros(4, dtype=torch.int64)
FRAMES = torch.zeros(2, 3, 1, 4, 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("frames", {"frames": FRAMES.half()}),
        ("frames", {"frames": FRAMES[:, :2].contiguous()}),
        ("frames", {"frames": FRAMES[0]}),
        ("frames", {"frames": FRAMES.transpose(3, 4)}),
        ("frames", {"frames": FRAMES.to("meta")}),
        ("first", {"first": FIRST.int()}),
        ("first", {"first": FIRST[0]}),
        ("first", {"first": torch.zeros(3, 2, dtype=torch.bool).T}),
        ("index", {"index": INDEX.int()}),
        ("index", {"index": INDEX[None]}),
        ("index", {"index": INDEX.to("meta")}),
        ("stack", {"stack": 0}),
        ("shift", {"shift": torch.zeros(4, 1, dtype=torch.int64)}),
        ("shift", {"shift": torch.zeros(4, 2)}),
        ("shift", {"shift": torch.zeros(4, 2, dtype=torch.int64, device="meta")}),
        ("pad", {"shift": torch.zeros(4, 2, dtype=torch.int64), "pad": -1}),
        ("intensity", {"intensity": torch.ones(3)}),
        ("intensity", {"intensity": torch.ones(4, dtype=torch.float64)}),
        ("intensity", {"intensity": torch.ones(4, device="meta")}),
    ],
)
def test_a_bad_argument_is_named(name, change):
    good = {"frames": FRAMES, "first": FIRST, "index": INDEX, "stack": 2}
    with pytest.raises(ValueError, match=f"^{name}:"):
        gather.observations(**good | change)


def test_nothing_waits_for_a_value_or_makes_a_tensor_on_another_device():
    with torch.device("meta"):  # meta tensors have no values to wait for
        frames, first = torch.zeros(2, 8, 3, 6, 6, dtype=torch.uint8), torch.zeros(2, 8, dtype=torch.bool)
        index, shift = torch.zeros(5, dtype=torch.int64), torch.zeros(5, 2, dtype=torch.int64)
        dim = torch.ones(5)
    out = gather.observations(frames, first, index, 4, shift, 4, dim)
    assert (out.shape, out.device.type) == ((5, 12, 6, 6), "meta")
