"""Frame stacks and augmentation, against a played episode, Python loops, and real padding and cropping."""

import mmap

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


def by_walks(frames, first, index, stack, shift=None, pad=4, intensity=None, mean=None, scale=None):
    """Every observation by a walk in Python, padded for real and cropped, one rounding to f32 a step: [M, stack * C, H, W]."""
    flat, (height, width), spare = frames.flatten(0, 1), frames.shape[3:], 2  # a shift may leave the padding by so much
    unit = torch.tensor(1 / 255 if frames.dtype == torch.uint8 else 1.0)
    observations = []
    for j, i in enumerate(index.tolist()):
        dy, dx = (pad, pad) if shift is None else shift[j].tolist()

        def seen(planes, dy=dy + spare, dx=dx + spare):
            padded = functional.pad(planes.float()[None], (pad + spare,) * 4, mode="replicate")
            return padded[0, :, dy : dy + height, dx : dx + width]

        value = seen(torch.cat([flat[k] for k in walk(first, i, stack)])) * (unit if intensity is None else intensity[j] * unit)
        if mean is not None:
            value = ((value - seen(mean.repeat(stack, 1, 1))) * seen(scale.repeat(stack, 1, 1))).clamp(-5, 5)
        observations.append(value)
    return torch.stack(observations)


def assert_same_bits(got, want, memory_format):
    """Triton's interpreter cuts bf16 off instead of rounding: there only to the next number."""
    assert got.is_contiguous(memory_format=memory_format)
    if got.dtype == torch.bfloat16 and knobs.runtime.interpret and dispatch.runs_kernel(got):
        torch.testing.assert_close(got.cpu(), want.bfloat16(), rtol=2**-7, atol=0, check_stride=False)
    else:
        assert torch.equal(got.cpu(), want.to(got.dtype))


@pytest.mark.parametrize("stack", [1, 3, 4, 17, 64])
@pytest.mark.parametrize("slots", [1, 5, 63, 64, 65])
def test_observations_hold_the_frames_of_the_walk(device, slots, stack):
    generator = torch.Generator().manual_seed(slots + stack)
    first = torch.rand(2, slots, generator=generator) < 1 / 16
    index = torch.randint(2 * slots, (6,), generator=generator)
    frames = torch.arange(2.0 * slots).view(2, slots, 1, 1, 1)
    got = gather.observations(frames.to(device), first.to(device), index.to(device), stack)
    assert got.flatten(1).tolist() == [walk(first, i, stack) for i in index.tolist()]


@given(rings(), st.integers(1, 4), st.integers(1, 5), st.integers(1, 40), st.integers(0, 4), *[st.booleans()] * 6, st.integers(1, 3))
@settings(max_examples=150)
def test_observations_have_the_bits_of_padding_and_cropping(
    device, ring, channels, height, width, pad, byte, move, dim, normalise, last, half, threads
):
    first, index, stack, generator = ring
    frames = torch.randint(0, 256, (*first.shape, channels, height, width), generator=generator, dtype=torch.uint8)
    if not byte:
        frames = frames / 70 - 2
    given = {"shift": torch.randint(-1, 2 * pad + 2, (len(index), 2), generator=generator)} if move else {}
    if dim:
        given["intensity"] = torch.rand(len(index), generator=generator) + 0.5
    if normalise:  # some pixels beyond the limit, some within
        given["mean"], given["scale"] = torch.rand(2, channels, height, width, generator=generator) * torch.tensor([1, 30]).view(2, 1, 1, 1)
    form = {"dtype": torch.bfloat16 if half else torch.float32, "memory_format": torch.channels_last if last else torch.contiguous_format}
    there = {name: x.to(device) for name, x in ({"frames": frames, "first": first, "index": index} | given).items()}
    before = {name: x.clone() for name, x in there.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        patch.setattr(gather_cpu, "PIXELS_A_THREAD", 1)
        got = gather.observations(**there, stack=stack, pad=pad, **form)
    assert got.dtype == form["dtype"]
    assert_same_bits(got, by_walks(frames, first, index, stack, pad=pad, **given), form["memory_format"])
    got.zero_()
    assert all(torch.equal(there[name], before[name]) for name in before), "the arguments are only read"


def test_the_limit_of_normalised_pixels_is_five_and_nan_stays(device):
    frames = torch.tensor([0.0, 1.0, 2.0, torch.nan, torch.inf, -torch.inf], device=device).view(1, 1, 1, 2, 3)
    first, index = torch.ones(1, 1, dtype=torch.bool, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    mean, scale = (torch.full((1, 2, 3), x, device=device) for x in (1.0, 7.0))
    got = gather.observations(frames, first, index, 1, mean=mean, scale=scale)
    torch.testing.assert_close(gather.observations(frames, first, index, 1), frames[0], equal_nan=True)
    assert gather.NORMALISED_LIMIT == 5.0
    torch.testing.assert_close(got.flatten().cpu(), torch.tensor([-5.0, 0.0, 5.0, torch.nan, 5.0, -5.0]), equal_nan=True, rtol=0, atol=0)


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
SIZES = [(3, 32, 32, 4), (3, 24, 43, 4), (3, 6, 22, 22), (13, 3, 5, 5), (1, 96, 1, 1), (1, 1, 90, 2), (8, 1, 1, 64)]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "normalise"), [*((size, False) for size in SIZES), (SIZES[1], True)])
def test_every_dtype_and_layout_of_observations_larger_than_a_block(device, size, normalise, dtype, memory_format):
    *shape, stack = size
    generator = torch.Generator().manual_seed(shape[1])
    frames = torch.randint(0, 256, (2, 7, *shape), generator=generator, dtype=torch.uint8)
    first, index = torch.rand(2, 7, generator=generator) < 0.2, torch.randint(14, (3,), generator=generator)
    arguments = {"frames": frames, "first": first, "index": index,
                 "shift": torch.tensor([[0, 8], [5, 3], [8, 0]]), "intensity": torch.tensor([0.9, 1.0, 1.1])}  # fmt: skip
    if normalise:
        arguments |= {name: most * torch.rand(frames.shape[2:], generator=generator) for name, most in (("mean", 1), ("scale", 20))}
    there = {name: x.to(device) for name, x in arguments.items()}
    got = gather.observations(**there, stack=stack, dtype=dtype, memory_format=memory_format)
    assert_same_bits(got, by_walks(**arguments, stack=stack), memory_format)


def test_a_shift_far_beyond_the_frame_sees_only_the_border(device):
    frames = torch.arange(12.0, device=device).view(1, 1, 1, 3, 4)
    first, index = torch.ones(1, 1, dtype=torch.bool, device=device), torch.zeros(4, dtype=torch.int64, device=device)
    shift = torch.tensor([[2**40, 2**40], [0, 0], [2**31 + 50, 50], [50, 2**33 + 51]], device=device)
    got = gather.observations(frames, first, index, 1, shift, pad=50)
    assert got.flatten(1).tolist() == [[11.0] * 12, [0.0] * 12, [8.0, 9.0, 10.0, 11.0] * 3, [3.0] * 4 + [7.0] * 4 + [11.0] * 4]


@pytest.mark.parametrize("outside", [-1, 6, 2**40, -(2**40)])
def test_an_index_outside_the_ring_is_the_nearest_position_to_the_kernel_and_refused_on_a_cpu(outside):
    frames, first, index = torch.arange(6.0).view(2, 3, 1, 1, 1), torch.ones(2, 3, dtype=torch.bool), torch.tensor([4, outside])
    there = [x.to("cuda" if torch.cuda.is_available() else "cpu") for x in (frames, first, index)]
    assert gather.observations_kernel(*there, 1).flatten().tolist() == [4.0, 5.0 if outside > 0 else 0.0]
    with pytest.raises(IndexError, match=r"^index: "):
        gather.observations(frames, first, index, 1)


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


def test_fake_tensors_have_no_memory_to_read():
    with FakeTensorMode():
        frames, first = torch.zeros(2, 8, 3, 6, 6, dtype=torch.uint8), torch.zeros(2, 8, dtype=torch.bool)
        out = gather.observations(frames, first, torch.zeros(5, dtype=torch.int64), 4, dtype=torch.bfloat16)
    assert (type(out), out.shape, out.device.type) == (FakeTensor, (5, 12, 6, 6), "cpu")
