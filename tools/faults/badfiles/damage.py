"""Damage as disks, copies and kills do it: any file, no matter what it holds. Checksums must tell, whatever the place."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from .run import Case, Kind, Run, Target


def _place(random: Random, data: bytes, longest: int = 4096) -> tuple[int, int]:
    """Begin and end of a block of at least one byte."""
    begin = random.randrange(len(data))
    return begin, min(len(data), begin + random.choice((1, 4, 16, random.randint(1, longest))))


def flip_a_bit(random: Random, data: bytearray) -> bytes:
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return data


def flip_a_bit_of_the_first_line(random: Random, data: bytearray) -> bytes:
    """Where lengths, versions and sums are."""
    data[random.randrange(min(len(data), 128))] ^= 1 << random.randrange(8)
    return data


def change_bytes(random: Random, data: bytearray) -> bytes:
    for _ in range(random.randint(1, 20)):
        data[random.randrange(len(data))] = random.randrange(256)
    return data


def cut_short(random: Random, data: bytearray) -> bytes:
    return data[: random.choice((random.randrange(len(data)), random.randrange(min(len(data), 64)), len(data) - 1))]


def add_at_the_end(random: Random, data: bytearray) -> bytes:
    return data + random.choice((b"\0", b"\n", random.randbytes(random.randint(1, 4096)), data))


def insert_bytes(random: Random, data: bytearray) -> bytes:
    at = random.randrange(len(data))
    return data[:at] + random.randbytes(random.randint(1, 64)) + data[at:]


def leave_out_a_block(random: Random, data: bytearray) -> bytes:
    begin, end = _place(random, data)
    return data[:begin] + data[end:]


def write_a_block_twice(random: Random, data: bytearray) -> bytes:
    begin, end = _place(random, data)
    return data[:end] + data[begin:end] + data[end:]


def zero_a_block(random: Random, data: bytearray) -> bytes:
    """As a file system does with a block that was never written."""
    begin, end = _place(random, data)
    data[begin:end] = bytes(end - begin)
    return data


def swap_two_blocks(random: Random, data: bytearray) -> bytes:
    size = random.randint(1, max(1, min(4096, len(data) // 4)))
    one, other = random.randrange(0, len(data) // 2 - size + 1), random.randrange(len(data) // 2, len(data) - size + 1)
    data[one : one + size], data[other : other + size] = data[other : other + size], data[one : one + size]
    return data


def noise_in_a_block(random: Random, data: bytearray) -> bytes:
    begin, end = _place(random, data)
    data[begin:end] = random.randbytes(end - begin)
    return data


def nothing(random: Random, data: bytearray) -> bytes:
    """The same bytes, so that one sees that the good file is accepted."""
    return data


WAYS = (
    flip_a_bit, flip_a_bit_of_the_first_line, change_bytes, cut_short, add_at_the_end, insert_bytes, leave_out_a_block,
    write_a_block_twice, zero_a_block, swap_two_blocks, noise_in_a_block, nothing,
)  # fmt: skip


def _kind(target: Target, way: Callable[[Random, bytearray], bytes]) -> Kind:
    def make(random: Random, run: Run) -> Case:
        good = run.good[target]
        spoilt = bytes(way(random, bytearray(good)))
        first = next((at for at, (a, b) in enumerate(zip(good, spoilt, strict=False)) if a != b), min(len(good), len(spoilt)))
        expect = "accepted" if way is nothing else "either" if target == "config" else "same"
        return Case(spoilt, expect, f"{len(spoilt)} bytes, the first to differ is number {first}")

    weight = 1 if way is nothing else {"checkpoint": 2, "frames": 1, "config": 3}[target]
    return Kind(target, f"damage: {way.__name__.replace('_', ' ')}", make, weight)


KINDS = [_kind(target, way) for target in ("checkpoint", "frames", "config") for way in WAYS]
