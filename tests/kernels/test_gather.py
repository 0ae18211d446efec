"""Frame stacks and augmentation, against a played episode, Python loops, and real padding and cropping."""

import mmap
from collections import deque

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from triton import knobs

from speedyzero_kernels import dispatch, gather, gather_cpu


@pytest.fixture(params=["reference", "numba", "kernel"])
def form(request) -> str:
    return request.param


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


def by_walks(frames, first, index, stack, shift=None, pad=4, intensity=None):
    """Every observation by a walk in Python, then padded for real and cropped: [M, stack * C, H, W] f32."""
    flat, observations = frames.flatten(0, 1), []
    for j, i in enumerate(index.tolist()):
        seen = torch.cat([flat[k] for k in walk(first, i, stack)]).float()
        seen = seen / 255 if frames.dtype == torch.uint8 else seen
        seen = seen if shift is None else shifted(seen, *shift[j].tolist(), pad)
        observations.append(seen if intensity is None else seen * intensity[j])
    return torch.stack(observations)


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


@pytest.mark.parametrize("stack", [1, 3, 4, 17, 64])
@pytest.mark.parametrize("slots", [1, 5, 63, 64, 65])
def test_observations_hold_the_frames_of_the_walk(device, slots, stack):
    generator = torch.Generator().manual_seed(slots + stack)
    first = torch.rand(2, slots, generator=generator) < 1 / 16
    index = torch.randint(2 * slots, (6,), generator=generator)
    frames = torch.arange(2.0 * slots).view(2, slots, 1, 1, 1)
    got = gather.observations(frames.to(device), first.to(device), index.to(device), stack)
    assert got.flatten(1).tolist() == [walk(first, i, stack) for i in index.tolist()]


@pytest.mark.parametrize("seed", range(4))
def test_a_played_ring_gives_back_the_stacks_the_player_saw(device, seed):
    generator = torch.Generator().manual_seed(seed)
    slots, stack, frames = 11, 4, 29
    ring, first = torch.zeros(1, slots, 1, 1, 1, device=device), torch.zeros(1, slots, dtype=torch.bool, device=device)
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
    got = gather.observations(ring, first, torch.tensor([t % slots for t in times], device=device), stack)
    assert got.flatten(1).tolist() == [seen[t] for t in times]


@given(rings(), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(0, 4), st.booleans(),
       st.booleans(), st.booleans(), st.booleans())  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_observations_are_stacked_then_padded_and_cropped(device, ring, channels, height, width, pad, byte, move, dim, last):
    first, index, stack, generator = ring
    frames = torch.randint(0, 256, (*first.shape, channels, height, width), generator=generator, dtype=torch.uint8)
    if not byte:
        frames = frames / 7 - 9
    shift = torch.randint(0, 2 * pad + 1, (len(index), 2), generator=generator) if move else None
    intensity = torch.rand(len(index), generator=generator) + 0.5 if dim else None
    memory_format = torch.channels_last if last else torch.contiguous_format
    got = gather.observations(
        *(None if x is None else x.to(device) for x in (frames, first, index)), stack, shift if shift is None else shift.to(device), pad,
        intensity if intensity is None else intensity.to(device), memory_format=memory_format,
    )  # fmt: skip
    torch.testing.assert_close(got.cpu(), by_walks(frames, first, index, stack, shift, pad, intensity), check_stride=False)
    assert got.is_contiguous(memory_format=memory_format)


@given(rings(), st.integers(1, 4), st.integers(1, 5), st.integers(1, 40), st.integers(0, 4), *[st.booleans()] * 5,
       st.sampled_from([1, 2, 3]))  # fmt: skip
@settings(deadline=None, max_examples=150)
def test_the_numba_form_has_the_bits_of_the_reference(
    poisoned, ring, channels, height, width, pad, byte, move, dim, last, half, threads
):
    first, index, stack, generator = ring
    frames = torch.randint(0, 256, (*first.shape, channels, height, width), generator=generator, dtype=torch.uint8)
    if not byte:
        frames = frames / 7 - 9
    shift = torch.randint(-1, 2 * pad + 2, (len(index), 2), generator=generator) if move else None
    intensity = torch.rand(len(index), generator=generator) + 0.5 if dim else None
    form = {"dtype": torch.bfloat16 if half else torch.float32, "memory_format": torch.channels_last if last else torch.contiguous_format}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        patch.setattr(gather_cpu, "PIXELS_A_THREAD", 1)
        got = gather.observations(frames, first, index, stack, shift, pad, intensity, **form)
    want = gather.observations_reference(frames, first, index, stack, shift, pad, intensity, **form)
    assert got.dtype == want.dtype
    assert torch.equal(got, want)
    assert got.is_contiguous(memory_format=form["memory_format"])


def normalised(frames, first, index, stack, shift, pad, intensity, mean, scale):
    """Every pixel by itself, in numpy: where it lies in its frame, then the float32 steps one by one. [M, stack * C, H, W] f32."""
    _, _, channels, height, width = frames.shape
    out = np.empty((len(index), stack * channels, height, width), np.float32)
    flat, mean, scale = frames.flatten(0, 1).numpy(), mean.numpy(), scale.numpy()
    unit = np.float32(1 / 255) if frames.dtype == torch.uint8 else np.float32(1)
    for m, p, y, x in np.ndindex(out.shape):
        factor = unit if intensity is None else intensity[m].numpy() * unit
        dy, dx = (0, 0) if shift is None else (shift[m] - pad).tolist()
        c, at = p % channels, (min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1))
        value = np.float32(flat[walk(first, int(index[m]), stack)[p // channels], c, *at]) * factor
        value = np.float32(np.float32(value - mean[c, *at]) * scale[c, *at])
        out[m, p, y, x] = min(max(value, np.float32(-5)), np.float32(5))
    return torch.from_numpy(out)


def same_bits(got, want):
    """Whether they are equal. Triton's interpreter cuts bf16 off instead of rounding: there only to the next number."""
    if got.dtype == torch.bfloat16 and knobs.runtime.interpret and dispatch.runs_kernel(got):
        torch.testing.assert_close(got.cpu(), want.bfloat16(), rtol=2**-7, atol=0, check_stride=False)
    else:
        assert torch.equal(got.cpu(), want.to(got.dtype))


@given(rings(), st.integers(1, 4), st.integers(1, 5), st.integers(1, 12), st.integers(0, 4), *[st.booleans()] * 5)
@settings(deadline=None, max_examples=60)
def test_normalised_observations_have_the_bits_of_a_pixel_by_pixel_loop(
    device, ring, channels, height, width, pad, byte, move, dim, last, half
):
    first, index, stack, generator = ring
    frames = torch.randint(0, 256, (*first.shape, channels, height, width), generator=generator, dtype=torch.uint8)
    if not byte:
        frames = frames / 70 - 2
    shift = torch.randint(-1, 2 * pad + 2, (len(index), 2), generator=generator) if move else None
    intensity = torch.rand(len(index), generator=generator) + 0.5 if dim else None
    mean = torch.rand(channels, height, width, generator=generator)
    scale = 50 * torch.rand(channels, height, width, generator=generator) ** 2  # some pixels beyond the limit, some within
    want = normalised(frames, first, index, stack, shift, pad, intensity, mean, scale)
    there = {
        name: x if x is None else x.to(device)
        for name, x in {"shift": shift, "intensity": intensity, "mean": mean, "scale": scale}.items()
    }
    form = {"dtype": torch.bfloat16 if half else torch.float32, "memory_format": torch.channels_last if last else torch.contiguous_format}
    got = gather.observations(frames.to(device), first.to(device), index.to(device), stack, pad=pad, **there, **form)
    assert got.is_contiguous(memory_format=form["memory_format"])
    same_bits(got, want)


def test_the_limit_of_normalised_pixels_is_five_and_nan_stays(device):
    frames = torch.tensor([0.0, 1.0, 2.0, torch.nan, torch.inf, -torch.inf], device=device).view(1, 1, 1, 2, 3)
    first, index = torch.ones(1, 1, dtype=torch.bool, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    mean, scale = (torch.full((1, 2, 3), x, device=device) for x in (1.0, 7.0))
    got = gather.observations(frames, first, index, 1, mean=mean, scale=scale)
    assert gather.NORMALISED_LIMIT == 5.0
    torch.testing.assert_close(got.flatten().cpu(), torch.tensor([-5.0, 0.0, 5.0, torch.nan, 5.0, -5.0]), equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normalised_observations_larger_than_a_block(device, dtype, memory_format):
    generator = torch.Generator().manual_seed(3)
    first, index = torch.rand(2, 7, generator=generator) < 0.2, torch.randint(14, (2,), generator=generator)
    frames = torch.randint(0, 256, (2, 7, 3, 24, 43), generator=generator, dtype=torch.uint8)
    shift, intensity = torch.tensor([[0, 8], [5, 3]]), torch.tensor([0.9, 1.1])
    mean, scale = torch.rand(2, 3, 24, 43, generator=generator) * torch.tensor([1.0, 20.0]).view(2, 1, 1, 1)
    got = gather.observations(
        frames.to(device), first.to(device), index.to(device), 4, shift.to(device), 4, intensity.to(device), mean=mean.to(device),
        scale=scale.to(device), dtype=dtype, memory_format=memory_format,
    )  # fmt: skip
    same_bits(got, normalised(frames, first, index, 4, shift, 4, intensity, mean, scale))


def test_the_numba_form_rounds_every_kind_of_number_as_the_reference():
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1, 1, 1, 64, 1024), generator=generator).int()
    bits[..., 0, :] = bits[..., 0, :] & ~0xFFFF | 0x8000  # ties
    frames = bits.view(torch.float32)
    first, index = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, dtype=torch.int64)
    got, want = (
        form(frames, first, index, 4, dtype=torch.bfloat16, memory_format=torch.channels_last)
        for form in (gather_cpu.observations_numba, gather.observations_reference)
    )
    real = ~want.isnan()
    assert torch.equal(got.isnan(), ~real)
    assert torch.equal(got.view(torch.int16)[real], want.view(torch.int16)[real])


# Channels, height, width, frames of a stack: more planes and pixels than a block has, a little less, as many, and a little more.
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "size", [(3, 32, 32, 4), (3, 24, 43, 4), (3, 6, 22, 22), (13, 3, 5, 5), (1, 96, 1, 1), (1, 1, 90, 2), (8, 1, 1, 64)]
)
def test_every_dtype_and_layout_of_observations_larger_than_a_block(device, size, dtype, memory_format):
    channels, height, width, stack = size
    generator = torch.Generator().manual_seed(height)
    first = torch.rand(2, 7, generator=generator) < 0.2
    index, shift = torch.randint(14, (3,), generator=generator), torch.tensor([[0, 8], [5, 3], [8, 0]])
    frames = torch.randint(0, 256, (2, 7, channels, height, width), generator=generator, dtype=torch.uint8)
    intensity = torch.tensor([0.9, 1.0, 1.1])
    got = gather.observations(
        frames.to(device), first.to(device), index.to(device), stack, shift.to(device), 4, intensity.to(device), dtype=dtype,
        memory_format=memory_format,
    )  # fmt: skip
    want = by_walks(frames, first, index, stack, shift, 4, intensity)
    assert got.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(got.cpu(), want.to(dtype), check_stride=False)


def test_a_shift_far_beyond_the_frame_sees_only_the_border(device):
    frames = torch.arange(12.0, device=device).view(1, 1, 1, 3, 4)
    first, index = torch.ones(1, 1, dtype=torch.bool, device=device), torch.zeros(4, dtype=torch.int64, device=device)
    shift = torch.tensor([[2**40, 2**40], [0, 0], [2**31 + 50, 50], [50, 2**33 + 51]], device=device)
    got = gather.observations(frames, first, index, 1, shift, pad=50)
    assert got.flatten(1).tolist() == [[11.0] * 12, [0.0] * 12, [8.0, 9.0, 10.0, 11.0] * 3, [3.0] * 4 + [7.0] * 4 + [11.0] * 4]


def test_what_is_not_finite_is_handed_on(device):
    frames = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0], device=device).view(1, 1, 1, 2, 2)
    first, index = torch.ones(1, 1, dtype=torch.bool, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    got = gather.observations(frames, first, index, 1, dtype=torch.bfloat16)
    torch.testing.assert_close(got.float(), frames[0], equal_nan=True)
    dimmed = gather.observations(torch.full_like(frames, 2.0), first, index, 1, intensity=torch.tensor([torch.nan], device=device))
    assert dimmed.isnan().all()


def test_an_index_outside_the_ring_reads_the_nearest_position():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    frames, first = torch.arange(6.0, device=device).view(2, 3, 1, 1, 1), torch.ones(2, 3, dtype=torch.bool, device=device)
    index = torch.tensor([-1, 6, 2**40, -(2**40), 4], device=device)
    assert gather.observations_kernel(frames, first, index, 1).flatten().tolist() == [0.0, 5.0, 5.0, 0.0, 4.0]


@pytest.mark.parametrize("outside", [-1, 6, 2**40, -(2**40)])
def test_a_cpu_refuses_an_index_outside_the_ring(outside):
    frames, first = torch.arange(6.0).view(2, 3, 1, 1, 1), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(IndexError, match=r"^index: "):
        gather.observations(frames, first, torch.tensor([4, outside]), 1)


def test_a_ring_of_more_bytes_than_32_bits_count_is_read_to_its_end(device):
    """Untouched memory of an anonymous mapping takes no room: the ring has 2.2e9 bytes, of which a page is written."""
    slots = 530_000
    if device == "cuda":
        frames = torch.zeros(1, slots, 1, 64, 64, dtype=torch.uint8, device=device)
    else:
        frames = torch.frombuffer(mmap.mmap(-1, slots << 12), dtype=torch.uint8).view(1, slots, 1, 64, 64)
    frames[0, -1, 0, -1, -2:] = torch.tensor([51, 255], dtype=torch.uint8)
    first = torch.ones(1, slots, dtype=torch.bool, device=device)
    got = gather.observations(frames, first, torch.tensor([slots - 1], device=device), 1)
    assert got.flatten()[-3:].tolist() == pytest.approx([0.0, 0.2, 1.0])


def test_bytes_become_zero_to_one_and_floats_are_untouched(device):
    first, index = torch.ones(1, 2, dtype=torch.bool, device=device), torch.tensor([0, 1], device=device)
    frames = torch.tensor([0, 255], dtype=torch.uint8, device=device).view(1, 2, 1, 1, 1)
    assert gather.observations(frames, first, index, 1).flatten().tolist() == [0.0, 1.0]
    floats = torch.tensor([0.3, -1e9], device=device).view(1, 2, 1, 1, 1)
    assert torch.equal(gather.observations(floats, first, index, 1).flatten(), floats.flatten())


def test_the_middle_shift_is_the_identity_and_the_corners_replicate(device):
    frames = torch.arange(9.0, device=device).view(1, 1, 1, 3, 3)
    first = torch.ones(1, 1, dtype=torch.bool, device=device)
    shift = torch.tensor([[1, 1], [0, 0], [2, 2], [0, 2]], device=device)
    got = gather.observations(frames, first, torch.zeros(4, dtype=torch.int64, device=device), 1, shift, pad=1)
    assert got[0].flatten().tolist() == list(range(9))
    assert got[1].flatten().tolist() == [0, 0, 1, 0, 0, 1, 3, 3, 4]
    assert got[2].flatten().tolist() == [4, 5, 5, 7, 8, 8, 7, 8, 8]
    assert got[3].flatten().tolist() == [1, 2, 2, 1, 2, 2, 4, 5, 5]


def test_all_frames_of_a_stack_move_and_dim_together(device):
    torch.manual_seed(0)
    frames = torch.randint(0, 256, (1, 1, 2, 5, 5), dtype=torch.uint8).expand(1, 4, 2, 5, 5).contiguous().to(device)
    first, index = torch.zeros(1, 4, dtype=torch.bool, device=device), torch.tensor([3], device=device)
    shift, dim = torch.tensor([[0, 3]], device=device), torch.tensor([0.7], device=device)
    planes = gather.observations(frames, first, index, 4, shift, 2, dim).view(4, 2, 5, 5)
    assert all(torch.equal(planes[0], plane) for plane in planes)


def test_the_ring_is_left_alone(device):
    frames = torch.rand(1, 3, 1, 2, 2, device=device)
    before, first = frames.clone(), torch.ones(1, 3, dtype=torch.bool, device=device)
    index, shift, dim = (torch.tensor(x, device=device) for x in ([2], [[0, 0]], [0.5]))
    gather.observations(frames, first, index, 1, shift, 4, dim)
    gather.observations(frames, first, index, 1, None, 4, dim).zero_()
    gather.observations(frames, first, index, 1).zero_()
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
        ("index", {"index": INDEX[:0]}),
        ("first", {"first": torch.empty(2, 0, dtype=torch.bool)}),
        ("frames", {"frames": FRAMES[:, :, :0]}),
        ("frames", {"frames": torch.empty(2, 3, 1, 2049, 1)}),
        ("frames", {"frames": torch.empty(2, 3, 1, 1, 2049)}),
        ("stack", {"stack": 65}),
        ("stack", {"stack": 64, "frames": torch.empty(2, 3, 9, 1, 1)}),
        ("dtype", {"dtype": torch.float64}),
        ("memory_format", {"memory_format": torch.preserve_format}),
        ("index", {"index": INDEX.to("meta")}),
        ("stack", {"stack": 0}),
        ("shift", {"shift": torch.zeros(4, 1, dtype=torch.int64)}),
        ("shift", {"shift": torch.zeros(4, 2)}),
        ("shift", {"shift": torch.zeros(4, 4, dtype=torch.int64)[:, ::2]}),
        ("shift", {"shift": torch.zeros(4, 2, dtype=torch.int64, device="meta")}),
        ("pad", {"shift": torch.zeros(4, 2, dtype=torch.int64), "pad": -1}),
        ("intensity", {"intensity": torch.ones(3)}),
        ("intensity", {"intensity": torch.ones(4, dtype=torch.float64)}),
        ("intensity", {"intensity": torch.ones(4, device="meta")}),
        ("mean", {"mean": torch.ones(1, 4, 4)}),
        ("mean", {"scale": torch.ones(1, 4, 4)}),
        ("mean", {"mean": torch.ones(4, 4), "scale": torch.ones(1, 4, 4)}),
        ("scale", {"mean": torch.ones(1, 4, 4), "scale": torch.ones(1, 4, 4).half()}),
        ("scale", {"mean": torch.ones(1, 4, 4), "scale": torch.ones(1, 4, 4, device="meta")}),
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
    out = gather.observations(frames, first, index, 4, shift, 4, dim, dtype=torch.bfloat16, memory_format=torch.channels_last)
    assert (out.shape, out.device.type) == ((5, 12, 6, 6), "meta")


def test_fake_tensors_have_no_memory_to_read():
    with FakeTensorMode():
        frames, first = torch.zeros(2, 8, 3, 6, 6, dtype=torch.uint8), torch.zeros(2, 8, dtype=torch.bool)
        out = gather.observations(frames, first, torch.zeros(5, dtype=torch.int64), 4, dtype=torch.bfloat16)
    assert (type(out), out.shape, out.device.type) == (FakeTensor, (5, 12, 6, 6), "cpu")
