"""Headers written by hand, their checksum good: places that overlap, sizes beyond any memory, JSON that nests for ever, other versions."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

from speedyzero.run.checkpoint import _DTYPES, _PREFIX

from . import odd
from .run import Case, Expect, Kind, Run, Target, assembled

Header = dict[str, Any]
BEGIN = _PREFIX % 0
BIG = 7 << 20
"""Bytes of a header that is all brackets: nearly as long as one may be, so that reading it takes as much memory as any can."""


def _entry(random: Random, header: Header) -> tuple[str, Header]:
    name = random.choice([name for name in header if name != "__metadata__"])
    return name, header[name]


def an_impossible_shape(random: Random, header: Header) -> tuple[str, Expect]:
    name, entry = _entry(random, header)
    size = random.choice((2**31, 2**47, 2**48, 2**63, 10**400, -1, -(2**63), 1.0, 0.5, "4", True, None, [1], float("nan"), 1e308))
    entry["shape"] = random.choice(([size], [1, size], [size, size], [0, size, size, size], [0, size], size, {"0": size}))
    return f"{name}: {odd.told(entry['shape'])}", "refused"


def a_shape_of_nothing(random: Random, header: Header) -> tuple[str, Expect]:
    """No elements, and yet sides that no stride can hold; at the place of a tensor that is empty too."""
    count = random.choice((2, 3, 63, 64, 65, 1000))
    name = random.choice((random.choice(list(header)[1:]), "emulators.finished"))
    header[name] = {"dtype": header[name]["dtype"], "shape": [2**47] * count + [0], "data_offsets": [header[name]["data_offsets"][0]] * 2}
    return f"{name}: {count} sides", "refused"


def as_many_elements_in_another_shape(random: Random, header: Header) -> tuple[str, Expect]:
    name, entry = _entry(random, header)
    entry["shape"] = random.choice(([1, *entry["shape"]], [*entry["shape"], 1], [1] * 64 + entry["shape"], [1] * 65 + entry["shape"]))
    return f"{name}: {len(entry['shape'])} sides", "refused"


def another_dtype(random: Random, header: Header) -> tuple[str, Expect]:
    name, entry = _entry(random, header)
    entry["dtype"] = dtype = random.choice(
        [*(d for d in _DTYPES if d != entry["dtype"]), "F8", "", None, 1, [], {}, "f32", "two\nlines", "\ud800", "x" * 10**6]
    )
    return f"{name}: {odd.told(dtype)}", "refused"


def another_place(random: Random, header: Header) -> tuple[str, Expect]:
    """Overlapping, out of order, beyond the end, or no place at all."""
    name, entry = _entry(random, header)
    start, end = entry["data_offsets"]
    shift = random.choice((8, -8, 1, -1, 2**31, 2**63, -(2**63)))
    entry["data_offsets"] = places = random.choice((
        [start + shift, end + shift], [start, end + shift], [start + shift, end], [end, start], [0, end - start], [start],
        [start, end, end], [], None, end, {"0": start, "1": end}, [str(start), str(end)], [None, end], [start, float("inf")],
        [start, float("nan")], [-1, -1],
    ))  # fmt: skip
    return f"{name}: {str(places)[:60]}", "either" if places == [start, end] else "refused"


def places_as_fractions(random: Random, header: Header) -> tuple[str, Expect]:
    """Of equal value, but no indices."""
    names = [name for name in header if name != "__metadata__"]
    for name in random.choice((names, names[:1], names[-1:], [random.choice(names)])):
        start, end = header[name]["data_offsets"]
        header[name]["data_offsets"] = random.choice(([float(start), float(end)], [start, float(end)], [float(start), end]))
    return "", "refused"


def an_entry_that_is_none(random: Random, header: Header) -> tuple[str, Expect]:
    name, entry = _entry(random, header)
    if random.random() < 0.4:
        del entry[random.choice(list(entry))]
    else:
        header[name] = odd.value(random)
    return f"{name}: {odd.told(header[name])}", "refused"


def an_odd_name(random: Random, header: Header) -> tuple[str, Expect]:
    """A tensor under another name, with a sum for it."""
    name, entry = _entry(random, header)
    odd_name = random.choice(("", "two\nlines", "\ud800", "x" * 10**6, "\x1b[2J", "ring.\x00", "../../x"))
    sums = json.loads(header["__metadata__"]["crc32"])
    sums[odd_name] = random.choice((sums.pop(name), "00000000", None))
    renamed = {odd_name if key == name else key: value for key, value in header.items()}
    header.clear()
    header.update(renamed)
    if random.random() < 0.3:
        entry["shape"] = [-1]
    header["__metadata__"]["crc32"] = json.dumps(sums)
    return f"{name}: {odd.told(odd_name)}", "refused"


def entries_in_another_order(random: Random, header: Header) -> tuple[str, Expect]:
    names = list(header)[1:]
    random.shuffle(names)
    shuffled = {name: header.pop(name) for name in names}
    header.update(shuffled)
    return "", "refused"


def sums_that_are_none(random: Random, header: Header) -> tuple[str, Expect]:
    sums = json.loads(header["__metadata__"]["crc32"])
    name = random.choice(list(sums))
    way = random.choice(("missing", "more", "other", "not a string", "no object", "not JSON", "not text"))
    if way == "missing":
        del sums[name]
    elif way == "more":
        sums["x"] = "00000000"
    else:
        sums[name] = "12345678" if way == "other" else odd.value(random)
    texts = {
        "no object": json.dumps(odd.value(random)), "not JSON": random.choice(("", "{", "x", "{'a': 1}")), "not text": odd.value(random),
    }  # fmt: skip
    header["__metadata__"]["crc32"] = texts.get(way, json.dumps(sums))
    return f"{way} {name}", "refused"


def a_version_of_another_time(random: Random, header: Header) -> tuple[str, Expect]:
    versions = ("1", "3", "10", "two\nlines", "x" * 10**6, "\ud800", 2, None, [2], {}, 2.0, "02")
    header["__metadata__"]["format"] = version = random.choice(versions)
    return odd.told(version), "refused"


def metadata_that_are_none(random: Random, header: Header) -> tuple[str, Expect]:
    metadata = header["__metadata__"]
    name = random.choice(("format", "crc32", "meta"))
    if random.random() < 0.5:
        del metadata[name]
    else:
        metadata[name] = odd.value(random)
    return f"{name}: {odd.told(metadata.get(name))}", "refused"


def metadata_more(random: Random, header: Header) -> tuple[str, Expect]:
    header["__metadata__"][random.choice(("x", "", "note", "two\nlines"))] = odd.value(random)
    return "", "accepted"


def a_meta_that_is_none(random: Random, header: Header) -> tuple[str, Expect]:
    nested = "[" * odd.NESTED + "]" * odd.NESTED
    texts = (
        "", "x", "[]", "[1]", "null", "1", '"a"', "{", "{}", "NaN", '{"a":' * odd.NESTED, nested, '{"updates":' + nested + "}", "[]," * 99,
        "1" * 5000,
    )  # fmt: skip
    header["__metadata__"]["meta"] = text = random.choice(texts)
    return odd.told(text), "refused"


def a_meta_that_nests(random: Random, header: Header) -> tuple[str, Expect]:
    """As deep as can just be read, where it will be shown."""
    levels = random.randint(700, 1000)
    meta = header["__metadata__"]["meta"]
    name = random.choice(("iterations", "updates", "slots", "best", "env", "turn_owed", "emulators", "env_steps"))
    header["__metadata__"]["meta"] = meta[:-1] + f', "{name}": ' + "[" * levels + "]" * levels + "}"
    return f"{name}: {levels} levels", "either" if name == "env_steps" else "refused"


def a_meta_with_everything_twice(random: Random, header: Header) -> tuple[str, Expect]:
    meta = header["__metadata__"]["meta"]
    header["__metadata__"]["meta"] = meta[:-1] + ", " + meta[1:]
    return "", "accepted"


SPOIL: dict[Callable[[Random, Header], tuple[str, Expect]], int] = {
    an_impossible_shape: 4, a_shape_of_nothing: 2, as_many_elements_in_another_shape: 2, another_dtype: 3, another_place: 4,
    places_as_fractions: 2, an_entry_that_is_none: 3, an_odd_name: 3, entries_in_another_order: 1, sums_that_are_none: 3,
    a_version_of_another_time: 2,
    metadata_that_are_none: 3, metadata_more: 1, a_meta_that_is_none: 3, a_meta_that_nests: 2, a_meta_with_everything_twice: 1,
}  # fmt: skip
"""Each changes the header in place and says what it did and what is to come of it; with how many cases there are of it."""


def a_header_that_is_no_json(random: Random, run: Run, target: Target) -> Case:
    data = run.taken_apart(target)[1]
    texts = {
        "brackets": BEGIN + b'},"x":' + b"[" * odd.NESTED, "braces": BEGIN + b',"x":' + b'{"a":' * odd.NESTED,
        "balanced": BEGIN + b'},"x":' + b"[" * odd.NESTED + b"]" * odd.NESTED + b"}", "nothing": BEGIN,
        "no utf-8": BEGIN + b'},"\xff\xfe":1}',
        "a zero": BEGIN + b"},\0\0}", "an end and more": BEGIN + b"}}x", "metadata again": BEGIN + b'},"__metadata__":[]}',
        "metadata again, null": BEGIN + b'},"__metadata__":null}', "no tensors": BEGIN + b',"format":"2","crc32":"{}","meta":"{}"}}',
        "digits": BEGIN + b'},"x":' + b"1" * 100_000 + b"}", "noise": BEGIN + random.randbytes(4096),
    }  # fmt: skip
    way = random.choice(list(texts))
    return Case(assembled(texts[way], random.choice((data, b""))), "refused", way)


def a_header_that_unfolds(random: Random, run: Run, target: Target) -> Case:
    """Small in the file, many times as large once it is read."""
    part = random.choice((b"[],", b"{},", b"[[]],", b'"ab",', b"1.5,"))
    inner = part * (BIG // len(part)) + b"0"
    return Case(assembled(BEGIN + b'},"x":[' + inner + b"]}", b""), "refused", part.decode())


def a_length_that_is_none(random: Random, run: Run, target: Target) -> Case:
    """What the file says of its header's length."""
    header, data = run.taken_apart(target)
    true = int.from_bytes(run.good[target][:8], "little")
    length = random.choice((0, 1, 8, 16, true - 8, true + 8, true + 1, len(run.good[target]), 2**31, 2**62, 2**63, 2**64 - 1))
    return Case(assembled(header, data, length), "refused", str(length))


def a_header_of_spaces(random: Random, run: Run, target: Target) -> Case:
    """Longer than any header needs to be, and all of it there."""
    header = json.dumps(run.taken_apart(target)[0]).encode()
    return Case(assembled(header + b" " * (9 << 20), run.taken_apart(target)[1]), "refused")


def data_of_another_length(random: Random, run: Run, target: Target) -> Case:
    header, data = run.taken_apart(target)
    spoilt = random.choice((data[:-1], data[:-8], b"", data + b"\0", data + data, data[1:]))
    return Case(assembled(header, spoilt), "refused", f"{len(spoilt)} instead of {len(data)}")


def truths_beyond_one(random: Random, run: Run, target: Target) -> Case:
    """A bool that is neither 0 nor 1, with a good sum: what reads it may do anything."""
    tensors, meta = run.held(target)
    name = random.choice(("ring.done", "ring.first", "ring.measured"))
    flags = tensors[name].view(dtype=tensors["generator"].dtype).clone()
    flags.view(-1)[random.randrange(flags.numel())] = number = random.randint(2, 255)
    tensors[name] = flags
    good = run.saved(tensors, meta)
    end = 8 + int.from_bytes(good[:8], "little")
    header = json.loads(good[8:end])
    header[name]["dtype"] = "BOOL"
    return Case(assembled(header, good[end:]), "refused", f"{name}: {number}")


def _kind(target: Target, spoil: Callable, weight: int) -> Kind:
    def make(random: Random, run: Run) -> Case:
        header, data = run.taken_apart(target)
        note, expect = spoil(random, header)
        return Case(assembled(header, data), expect, note)

    return Kind(target, f"header: {spoil.__name__.replace('_', ' ')}", make, weight)


def _whole(target: Target, make: Callable[[Random, Run, Target], Case], weight: int) -> Kind:
    return Kind(target, f"header: {make.__name__.replace('_', ' ')}", lambda random, run: make(random, run, target), weight)


KINDS = [
    *[_kind("checkpoint", spoil, weight) for spoil, weight in SPOIL.items()],
    *[_kind("frames", spoil, 1) for spoil in (an_impossible_shape, another_place, an_odd_name, a_version_of_another_time)],
    *[_whole("checkpoint", make, 2) for make in (a_header_that_is_no_json, a_length_that_is_none, data_of_another_length)],
    *[_whole("checkpoint", make, 1) for make in (a_header_that_unfolds, a_header_of_spaces, truths_beyond_one)],
    _whole("frames", a_header_that_is_no_json, 1),
]
