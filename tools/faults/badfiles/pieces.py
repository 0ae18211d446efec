"""Pieces of frames with good checksums that no store has written: bombs, streams of other sizes, frames of another run."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from random import Random

import torch
from torch import Tensor

from speedyzero.run.frames import PIECE

from . import odd
from .run import Case, Expect, Kind, Run, resaving

Streams = dict[str, Tensor]


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _lane(random: Random, streams: Streams) -> str:
    return random.choice(list(streams))


def a_bomb(random: Random, streams: Streams, meta: dict) -> tuple[str, Expect]:
    """Of zeros: a thousandth of its size in the file, and packed once more a millionth."""
    size, level = random.choice((20, 27, 30)), random.choice((1, 9))
    packer = zlib.compressobj(level)
    parts = [packer.compress(bytes(1 << 20)) for _ in range(1 << (size - 20))]
    streams[_lane(random, streams)] = _tensor(b"".join([*parts, packer.flush()]))
    return f"2^{size} bytes", "refused"


def a_bomb_in_every_lane(random: Random, streams: Streams, meta: dict) -> tuple[str, Expect]:
    bomb = _tensor(zlib.compress(bytes(64 << 20), 9))
    for name in streams:
        streams[name] = bomb
    meta["shape"][1] = random.choice((meta["shape"][1], PIECE, PIECE + 1, 2**40))
    return str(meta["shape"]), "refused"


def a_stream_of_another_length(random: Random, streams: Streams, meta: dict) -> tuple[str, Expect]:
    """A byte or a step too short or too long, cut before its sum, or with something behind it."""
    name = _lane(random, streams)
    packed = bytes(streams[name].numpy())
    data = zlib.decompress(packed)
    ways = {
        "a byte less": zlib.compress(data[:-1]), "a byte more": zlib.compress(data + b"\0"),
        "half": zlib.compress(data[: len(data) // 2]),
        "twice": zlib.compress(data + data), "nothing": zlib.compress(b""), "no bytes": b"", "cut": packed[: len(packed) // 2],
        "no sum": packed[:-4], "half a sum": packed[:-2], "another sum": packed[:-1] + bytes([packed[-1] ^ 1]),
        "more behind it": packed + b"x", "another behind it": packed + packed,
        "a frame more": zlib.compress(data + data[: len(data) // meta["shape"][1]]),
    }  # fmt: skip
    way = random.choice(list(ways))
    streams[name] = _tensor(ways[way]) if ways[way] else torch.empty(0, dtype=torch.uint8)
    return way, "refused"


def a_stream_that_is_none(random: Random, streams: Streams, meta: dict) -> tuple[str, Expect]:
    name = _lane(random, streams)
    data = zlib.decompress(bytes(streams[name].numpy()))
    packer = zlib.compressobj(zdict=b"01")
    ways = {
        "noise": random.randbytes(1000), "as it is": data, "raw": zlib.compress(data)[2:-4], "gzip": b"\x1f\x8b" + zlib.compress(data),
        "of a dictionary": packer.compress(data) + packer.flush(), "zeros": bytes(1000), "ones": b"\xff" * 1000,
    }  # fmt: skip
    way = random.choice(list(ways))
    streams[name] = _tensor(ways[way])
    return way, "refused"


def a_stream_of_another_dtype(random: Random, streams: Streams, meta: dict) -> tuple[str, Expect]:
    """The same bytes, as numbers of another kind or in another shape."""
    name = _lane(random, streams)
    stream = streams[name]
    whole = torch.cat((stream, torch.zeros(-len(stream) % 8, dtype=torch.uint8)))
    dtype = random.choice((torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.int16))
    ways = {str(dtype): whole.view(dtype), "a row": stream[None], "a column": stream[:, None], "one byte": stream[0], "bool": stream > 0}
    way = random.choice(list(ways))
    streams[name] = ways[way]
    return way, "refused" if way in ("one byte", "bool") else "either"


def lanes_that_are_others(random: Random, streams: Streams, meta: dict) -> tuple[str, Expect]:
    """One less, one more, or under other names, by which their order would be another."""
    name = _lane(random, streams)
    way = random.choice(("less", "more", "none", "renamed", "shape too"))
    if way == "more":
        streams["lane_00099"] = streams[name]
    elif way == "none":
        streams.clear()
    else:
        stream = streams.pop(name)
        if way == "renamed":
            streams[random.choice(("x", "", "lane_99999", "lane_0", "two\nlines", "\ud800", "x" * 100_000))] = stream
    if way == "shape too":
        meta["shape"][0] -= 1
    return f"{way} {name}", "refused"


def lanes_swapped(random: Random, streams: Streams, meta: dict) -> tuple[str, Expect]:
    """No reader can tell; nobody may fall over it."""
    one, other = random.sample(list(streams), 2)
    streams[one], streams[other] = streams[other], streams[one]
    return f"{one}, {other}", "either"


def frames_of_noise(random: Random, streams: Streams, meta: dict) -> tuple[str, Expect]:
    """Of the right size: NaN and infinities among them, where frames are float32."""
    for name, stream in streams.items():
        size = len(zlib.decompress(bytes(stream.numpy())))
        streams[name] = _tensor(zlib.compress(random.choice((random.randbytes(size), b"\xff" * size, bytes(size)))))
    return "", "either"


def another_first_step(random: Random, streams: Streams, meta: dict) -> tuple[str, Expect]:
    was = meta["first"]
    meta["first"] = first = random.choice((was + 1, was - 1, was + PIECE, -PIECE, 2**63, -(2**63), 10**400, odd.value(random)))
    return odd.told(first), "either" if first == was else "refused"


def another_shape(random: Random, streams: Streams, meta: dict) -> tuple[str, Expect]:
    shape = meta["shape"]
    at = random.randrange(len(shape))
    ways = (shape[at] + 1, shape[at] - 1, -shape[at], 0, 2**40, 2**63, 10**400, odd.value(random))
    was, shape[at] = shape[at], random.choice(ways)
    return f"side {at}: {odd.told(shape[at])}", "either" if shape[at] == was else "refused"


def a_shape_of_fractions(random: Random, streams: Streams, meta: dict) -> tuple[str, Expect]:
    """Of equal value."""
    meta["shape"] = [float(size) if random.random() < 0.5 else size for size in meta["shape"]]
    return str(meta["shape"]), "either"


def a_shape_that_is_none(random: Random, streams: Streams, meta: dict) -> tuple[str, Expect]:
    shape = meta["shape"]
    meta["shape"] = random.choice((shape[:-1], [*shape, 1], shape[:1], [], {"0": shape}, str(shape), odd.value(random)))
    return odd.told(meta["shape"]), "refused"


def another_dtype_of_frames(random: Random, streams: Streams, meta: dict) -> tuple[str, Expect]:
    meta["dtype"] = random.choice(("torch.uint8", "torch.float16", "float32", "torch.load", "os", odd.value(random)))
    return odd.told(meta["dtype"]), "refused"


def a_field_missing(random: Random, streams: Streams, meta: dict) -> tuple[str, Expect]:
    name = random.choice(list(meta))
    del meta[name]
    return name, "refused"


SPOIL: dict[Callable[[Random, Streams, dict], tuple[str, Expect]], int] = {
    a_bomb: 1, a_bomb_in_every_lane: 1, a_stream_of_another_length: 4, a_stream_that_is_none: 2, a_stream_of_another_dtype: 3,
    lanes_that_are_others: 3, lanes_swapped: 1, frames_of_noise: 2, another_first_step: 3, another_shape: 3, a_shape_of_fractions: 1,
    a_shape_that_is_none: 2, another_dtype_of_frames: 2, a_field_missing: 1,
}  # fmt: skip
"""Each changes streams and meta in place and says what it did and what is to come of it; with how many cases there are of it."""


def a_checkpoint_as_a_piece(random: Random, run: Run) -> Case:
    return Case(run.good["checkpoint"], "refused")


KINDS = [
    *[resaving("frames", "pieces", spoil, weight) for spoil, weight in SPOIL.items()],
    Kind("frames", "pieces: a checkpoint as a piece", a_checkpoint_as_a_piece),
]
