"""Checkpoints with good checksums that no run has saved: tensors and counts that are missing, of other shapes, or impossible.

What is in the file is all that an attacker, or a fault of our own, could have written there with our own `checkpoint.save`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor

from speedyzero.run.checkpoint import _DTYPES
from speedyzero.run.resume import COUNTS

from . import odd
from .run import Expect, resaving

Tensors = dict[str, Tensor]
FREE = {"config", "torch"}
"""Of the meta, what nobody reads."""
GROWING = ("recent", "emulators.finished")
"""Tensors with as many rows as there were games."""
INTEGERS = (torch.int64, torch.int32)
MT_WORDS = 624
"""Of the Mersenne Twister's state, behind its seed (8 bytes), `left` and `seeded` (int32), and `next` (uint64)."""


def a_tensor_missing(random: Random, tensors: Tensors, meta: dict) -> tuple[str, Expect]:
    name = random.choice(list(tensors))
    del tensors[name]
    return name, "refused"


def a_tensor_more(random: Random, tensors: Tensors, meta: dict) -> tuple[str, Expect]:
    name = random.choice(("x", "ring.extra", "network.extra", "lane_00000", "two\nlines", "\ud800", "x" * 100_000))
    tensors[name] = torch.zeros(random.randint(0, 3), dtype=random.choice(list(_DTYPES.values())))
    return ascii(name)[:60], "either"


def a_tensor_of_the_emulators_more(random: Random, tensors: Tensors, meta: dict) -> tuple[str, Expect]:
    """Such as would take the place of what the meta says, or of nothing."""
    name = random.choice((*meta["emulators"], "x", ""))
    tensors[f"emulators.{name}"] = torch.zeros(random.randint(0, 3), dtype=random.choice((torch.int64, torch.bfloat16)))
    return name, "refused" if name in meta["emulators"] else "either"


def names_of_two_tensors_swapped(random: Random, tensors: Tensors, meta: dict) -> tuple[str, Expect]:
    """Such as differ in shape or dtype."""
    one = random.choice(list(tensors))
    others = [n for n, t in tensors.items() if (t.shape[1:], t.dtype) != (tensors[one].shape[1:], tensors[one].dtype)]
    other = random.choice(others)
    tensors[one], tensors[other] = tensors[other], tensors[one]
    return f"{one}, {other}", "refused"


def two_alike_tensors_swapped(random: Random, tensors: Tensors, meta: dict) -> tuple[str, Expect]:
    """No reader can tell; nobody may fall over it."""
    while True:
        one = random.choice(list(tensors))
        others = [n for n, t in tensors.items() if n != one and (t.shape, t.dtype) == (tensors[one].shape, tensors[one].dtype)]
        if others:
            other = random.choice(others)
            tensors[one], tensors[other] = tensors[other], tensors[one]
            return f"{one}, {other}", "either"


def another_dtype(random: Random, tensors: Tensors, meta: dict) -> tuple[str, Expect]:
    name = random.choice(list(tensors))
    dtype = random.choice([dtype for dtype in _DTYPES.values() if dtype != tensors[name].dtype])
    tensors[name] = tensors[name].to(dtype)
    compared = name in ("emulators.returns", "emulators.lengths", "emulators.crc")  # with numbers that may be equal all the same
    return f"{name} {dtype}", "either" if compared else "refused"


def another_shape(random: Random, tensors: Tensors, meta: dict) -> tuple[str, Expect]:
    name = random.choice([name for name in tensors if name not in GROWING])
    tensor = tensors[name]
    ways = [tensor[None], tensor[..., None], tensor.expand(2, *tensor.shape)]
    if tensor.dim():
        ways += [tensor[:0], torch.cat((tensor, tensor)), tensor.flatten()[0]]
    if tensor.dim() > 1:
        ways += [tensor.flatten(), tensor[:, :0], tensor[:, :-1]]
    tensors[name] = random.choice(ways)
    return f"{name} {tuple(tensors[name].shape)}", "refused"


def numbers_not_finite(random: Random, tensors: Tensors, meta: dict) -> tuple[str, Expect]:
    """NaN and infinities, in a few places or everywhere."""
    return _floats(random, tensors, (float("nan"), float("inf"), float("-inf")))


def numbers_huge_or_tiny(random: Random, tensors: Tensors, meta: dict) -> tuple[str, Expect]:
    return _floats(random, tensors, (3e38, -3e38, 60_000.0, 1e-45, 0.0, -1.0))


def _floats(random: Random, tensors: Tensors, values: tuple[float, ...]) -> tuple[str, Expect]:
    floats = [n for n, t in tensors.items() if t.is_floating_point() and t.numel() and n not in GROWING and not n.startswith("emulators.")]
    group = random.choice(("ring.", "network.", "momentum.", "snapshot.", "averages.", ""))
    names = [name for name in floats if name.startswith(group)]
    names = random.sample(names, random.choice((1, min(4, len(names)), len(names))))
    share, filling = random.choice((0.0, 0.1, 1.0)), random.choice(values)
    for name in names:
        flat = tensors[name].view(-1)
        places = random.sample(range(len(flat)), max(1, int(share * len(flat))))
        flat[places] = torch.tensor(filling).to(flat.dtype)
    return f"{filling} in {share:.0%} of {len(names)} of {group}*", "either"


def integers_at_their_ends(random: Random, tensors: Tensors, meta: dict) -> tuple[str, Expect]:
    names = [name for name, tensor in tensors.items() if tensor.dtype in INTEGERS and tensor.numel()]
    name = random.choice(random.choice((names, [name for name in names if not name.startswith("network.")])))
    flat, ends = tensors[name].view(-1), torch.iinfo(tensors[name].dtype)
    flat[random.randrange(len(flat))] = number = random.choice((ends.min, ends.max, -1, 0, 10**6))
    return f"{name}: {number}", "either"


def flags_of_the_ring(random: Random, tensors: Tensors, meta: dict) -> tuple[str, Expect]:
    for name in random.sample(("ring.done", "ring.first", "ring.measured"), random.randint(1, 3)):
        value = random.choice((None, True, False))
        for at in range(tensors[name].numel()):
            tensors[name].view(-1)[at] = random.random() < 0.5 if value is None else value
    return "", "either"


def an_action_that_there_is_not_in_the_ring(random: Random, tensors: Tensors, meta: dict) -> tuple[str, Expect]:
    action = tensors["ring.action"]
    action.view(-1)[random.randrange(action.numel())] = number = random.choice((3, -1, 255, 2**31, -(2**63), 2**63 - 1))
    return str(number), "refused"


def _log(tensors: Tensors, meta: dict, log: Tensor) -> None:
    """Another action log, with its sum."""
    tensors["emulators.log"] = log.contiguous()
    meta["emulators"]["log_crc"] = zlib.crc32(log.contiguous().view(-1).view(torch.uint8).numpy().data)


def an_action_that_there_is_not_in_the_log(random: Random, tensors: Tensors, meta: dict) -> tuple[str, Expect]:
    log = tensors["emulators.log"]
    log.view(-1)[random.randrange(log.numel())] = number = random.choice((3, 4, 127, 128, 255))
    _log(tensors, meta, log)
    return str(number), "refused"


def a_log_of_other_steps(random: Random, tensors: Tensors, meta: dict) -> tuple[str, Expect]:
    """Longer, shorter, of other lanes, or of other actions."""
    log = tensors["emulators.log"]
    steps, lanes = log.shape
    ways = {
        "longer": torch.cat((log, log[-1:])), "shorter": log[:-1], "empty": log[:0], "a lane less": log[:, :-1],
        "a lane more": log[:, [0, *range(lanes)]], "other actions": (log + 1) % 3, "backwards": log.flip(0), "wider": log.to(torch.int64),
        "flat": log.flatten(), "no lanes": log[:, :0], "too long": torch.zeros(10**6, lanes, dtype=log.dtype),
    }  # fmt: skip
    way = random.choice(list(ways))
    _log(tensors, meta, ways[way])
    if random.random() < 0.5 and ways[way].dim() == 2:
        meta["turn_owed"] = len(ways[way]) == steps - 1
    return way, "refused"


def a_count_that_disagrees(random: Random, tensors: Tensors, meta: dict) -> tuple[str, Expect]:
    name = random.choice(("ring.head", "updates", "ring.cursor"))
    number = random.choice((-1, 2**40, 2**63 - 1, -(2**63)))
    tensors[name].fill_(number)
    return f"{name}: {number}", "refused"


def odd_last_games(random: Random, tensors: Tensors, meta: dict) -> tuple[str, Expect]:
    name = random.choice(GROWING)
    rows = {
        "a nan": [[float("nan"), 1.0]], "an inf": [[float("inf"), 1.0]], "a long game": [[1.0, 1e308]],
        "a nan of steps": [[1.0, float("nan")]], "less than none": [[1.0, -1.0]], "half a step": [[1.0, 0.5]],
        "more than there are": [[0.0, 9.0]] * 10**5, "three columns": [[1.0, 1.0, 1.0]], "no columns": [[]],
        "a great score": [[1e308, 1.0]] * 32,
    }  # fmt: skip
    way = random.choice(list(rows))
    tensors[name] = torch.tensor(rows[way], dtype=torch.float64)
    return f"{name}: {way}", "either" if way == "a great score" else "refused"


def a_generator_of_another_size(random: Random, tensors: Tensors, meta: dict) -> tuple[str, Expect]:
    state = tensors["generator"]
    size = random.choice((0, 1, 16, 5048, len(state) - 1, len(state) + 1, 10**6))
    tensors["generator"] = state.repeat(200)[:size]
    return str(size), "refused"


def a_generator_that_reads_past_its_end(random: Random, tensors: Tensors, meta: dict) -> tuple[str, Expect]:
    """`left` and `next` say where in its 624 words it is; PyTorch believes them."""
    state = tensors["generator"]
    left, seeded, following = state[8:12].view(torch.int32), state[12:16].view(torch.int32), state[16:24].view(torch.int64)
    way = random.choice(("left", "next", "seeded", "both"))
    if way == "seeded":
        seeded.fill_(0)
    if way in ("left", "both"):
        left.fill_(random.choice((0, -1, MT_WORDS, MT_WORDS + 1, 2**31 - 1, -(2**31))))
    if way in ("next", "both"):
        following.fill_(random.choice((MT_WORDS, MT_WORDS - 1, MT_WORDS + 1, -1, 2**32, 2**62)))
    return f"{way}: left {int(left)}, next {int(following)}", "refused"


def a_generator_of_noise(random: Random, tensors: Tensors, meta: dict) -> tuple[str, Expect]:
    """The whole of it, or only its words."""
    begin = random.choice((0, 24))
    tensors["generator"][begin:] = torch.frombuffer(bytearray(random.randbytes(len(tensors["generator"]) - begin)), dtype=torch.uint8)
    return f"from byte {begin}", "refused" if begin == 0 else "either"


def another_value_in_the_meta(random: Random, tensors: Tensors, meta: dict) -> tuple[str, Expect]:
    return _meta(random, meta, odd.value(random))


def another_count_in_the_meta(random: Random, tensors: Tensors, meta: dict) -> tuple[str, Expect]:
    name = random.choice(COUNTS)
    meta[name] = number = random.choice((0, 1, meta[name] + 1, 10**6, 2**47, 2**48 - 1))
    return f"{name}: {number}", "refused" if name in ("slots", "updates") else "either"


def _meta(random: Random, meta: dict[str, Any], value: Any) -> tuple[str, Expect]:
    inner = random.random() < 0.4
    fields = meta["emulators"] if inner else meta
    name = random.choice(list(fields))
    was, fields[name] = fields[name], value
    plausible = type(was) is type(value) and (was == value or name in {*COUNTS, "env_steps", "envpool"} - {"slots", "updates"})
    plausible |= inner and (was == value or (name == "envpool" and isinstance(value, int)))  # that is only told
    plausible |= name in FREE or (name == "best" and isinstance(value, float | None))
    return f"{name}: {odd.told(value)}", "either" if plausible else "refused"


def a_field_of_the_meta_missing(random: Random, tensors: Tensors, meta: dict) -> tuple[str, Expect]:
    fields = random.choice((meta, meta["emulators"]))
    name = random.choice(list(fields))
    del fields[name]
    return name, "either" if name in {*FREE, "env_steps"} else "refused"


def a_field_of_the_meta_more(random: Random, tensors: Tensors, meta: dict) -> tuple[str, Expect]:
    name = random.choice(("", "x", "two\nlines", "\ud800", "x" * 100_000))
    meta[name] = odd.value(random)
    return odd.told(name), "either"


def a_field_of_the_emulators_more(random: Random, tensors: Tensors, meta: dict) -> tuple[str, Expect]:
    """Such as takes the place of a tensor."""
    name = random.choice(("log", "crc", "returns", "lengths", "finished", "x", "two\nlines"))
    good = tensors.get(f"emulators.{name}")
    values = [odd.value(random), [["nan", 1]], [["1", "2"]], [[1e308, 1e308]], [10**400] * 5, [[0] * 4] * 25, [[10**6] * 4] * 25]
    meta["emulators"][name] = value = random.choice([*values, good.tolist()] if good is not None else values)
    return f"{name}: {odd.told(value)}", "either" if good is None and isinstance(value, int | str) else "refused"


SPOIL: dict[Callable[[Random, Tensors, dict], tuple[str, Expect]], int] = {
    a_tensor_missing: 3, a_tensor_more: 1, a_tensor_of_the_emulators_more: 1, names_of_two_tensors_swapped: 3,
    two_alike_tensors_swapped: 3, another_dtype: 3, another_shape: 4, numbers_not_finite: 5, numbers_huge_or_tiny: 3,
    integers_at_their_ends: 4, flags_of_the_ring: 2, an_action_that_there_is_not_in_the_ring: 2,
    an_action_that_there_is_not_in_the_log: 2, a_log_of_other_steps: 3, a_count_that_disagrees: 2, odd_last_games: 3,
    a_generator_of_another_size: 1, a_generator_that_reads_past_its_end: 3, a_generator_of_noise: 1,
    another_value_in_the_meta: 10, another_count_in_the_meta: 2, a_field_of_the_meta_missing: 3, a_field_of_the_meta_more: 1,
    a_field_of_the_emulators_more: 3,
}  # fmt: skip
"""Each changes tensors and meta in place and says what it did and what is to come of it; with how many cases there are of it."""

KINDS = [resaving("checkpoint", "contents", spoil, weight) for spoil, weight in SPOIL.items()]
