"""config.json with settings of other types, sizes and meanings, and text that is not JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

from . import odd
from .run import Case, Expect, Kind, Run

EXTREMES = (0, 1, 2, 3, -1, 7, 64, 10**4, 10**6, 10**9, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 10**30, 10**400)
FRACTIONS = (0.0, 1.0, 0.5, 1e-3, 1e-30, 1e-300, 5e-324, 1e10, 1e30, 1e38, 1e39, 1e300, 1.7e308, -1e-9, -1.0, 10**30, 10**400)
"""For settings that are fractions, and settings of JSON's numbers in general."""


def another_type(random: Random, fields: dict[str, Any]) -> tuple[str, Expect]:
    name = random.choice(list(fields))
    fields[name] = odd.value(random)
    return f"{name}: {odd.told(fields[name])}", "either"


def another_whole_number(random: Random, fields: dict[str, Any]) -> tuple[str, Expect]:
    name = random.choice([name for name, value in fields.items() if type(value) is int or value is None])
    fields[name] = random.choice(EXTREMES)
    return f"{name}: {odd.told(fields[name])}", "either"


def another_fraction(random: Random, fields: dict[str, Any]) -> tuple[str, Expect]:
    name = random.choice([name for name, value in fields.items() if type(value) is float])
    fields[name] = random.choice(FRACTIONS)
    return f"{name}: {odd.told(fields[name])}", "either"


def several_fractions(random: Random, fields: dict[str, Any]) -> tuple[str, Expect]:
    names = random.sample([name for name, value in fields.items() if type(value) is float], 4)
    for name in names:
        fields[name] = random.choice(FRACTIONS[:11])
    return " ".join(f"{name}={fields[name]}" for name in names), "either"


def other_temperatures(random: Random, fields: dict[str, Any]) -> tuple[str, Expect]:
    fields["temperatures"] = [random.choice(FRACTIONS) for _ in range(random.choice((3, 3, 3, 2, 4)))]
    return odd.told(fields["temperatures"]), "either"


def sizes_beyond_any_memory(random: Random, fields: dict[str, Any]) -> tuple[str, Expect]:
    """Within their types, and each of them more than there is memory for."""
    fields["ring_positions"] = random.choice((10**9, 10**12, 10**18, 10**30, 10**400))
    fields["env_steps"] = fields["ring_positions"] * random.choice((1, 10))
    fields["channels"] = random.choice((fields["channels"], 4096))
    return f"{len(str(fields['ring_positions']))} digits", "refused"


def another_environment(random: Random, fields: dict[str, Any]) -> tuple[str, Expect]:
    fields["env"] = random.choice((
        "", "Catch", "catch-v0", "Catch-v0 ", "Catch-v0\n", "CartPole-v1", "Pendulum-v1", "x" * 10**6, "\ud800", "\x1b[2J", "a\nb", "../x",
        "Pong-v5", "\x00",
    ))  # fmt: skip
    return odd.told(fields["env"]), "refused"


def a_setting_missing(random: Random, fields: dict[str, Any]) -> tuple[str, Expect]:
    names = random.sample(list(fields), random.choice((1, 1, 5, len(fields))))
    for name in names:
        del fields[name]
    return names[0], "refused"


def a_setting_more(random: Random, fields: dict[str, Any]) -> tuple[str, Expect]:
    names = random.choice((["x"], [""], ["two\nlines"], ["\ud800"], ["x" * 10**5], [f"name{i}" for i in range(10_000)], ["\x1b[2J"]))
    fields |= {name: odd.value(random) for name in names}
    return odd.told(names[0]), "refused"


SPOIL: dict[Callable[[Random, dict], tuple[str, Expect]], int] = {
    another_type: 8, another_whole_number: 10, another_fraction: 8, several_fractions: 2, other_temperatures: 2, sizes_beyond_any_memory: 1,
    another_environment: 3, a_setting_missing: 2, a_setting_more: 2,
}  # fmt: skip
"""Each changes the fields in place and says what it did and what is to come of it; with how many cases there are of it."""


def text_that_is_no_config(random: Random, run: Run) -> Case:
    good = run.good["config"].decode()
    texts = {
        "nothing": b"", "a space": b" ", "a list": b"[]", "null": b"null", "a number": b"1", "a word": b"x", "a string": b'"x"',
        "brackets": b"[" * odd.NESTED, "braces": b'{"env":' * odd.NESTED, "balanced": b"[" * odd.NESTED + b"]" * odd.NESTED,
        "utf-16": good.encode("utf-16"), "utf-8-sig": good.encode("utf-8-sig"), "digits": b'{"env":' + b"1" * 10**5 + b"}",
        "latin-1": good.replace("Catch", "Cätch").encode("latin-1"), "zeros": bytes(4096), "no end": good.encode() + b"}",
        "a comma": good.replace("}", ",}").encode(), "comments": b"// ours\n" + good.encode(), "long": b"[" + b"[]," * (2 << 20) + b"0]",
        "spaces": good.encode() + b" " * (5 << 20), "nested": good.replace('"Catch-v0"', "[" * 900 + "]" * 900).encode(),
        "nested more": good.replace("}", ', "x": ' + "[" * 960 + "]" * 960 + "}").encode(),
    }  # fmt: skip
    way = random.choice(list(texts))
    return Case(texts[way], "refused", way)


def everything_twice(random: Random, run: Run) -> Case:
    good = run.good["config"].decode().strip()
    return Case((good[:-1] + ", " + good[1:]).encode(), "accepted")


def another_file_as_a_config(random: Random, run: Run) -> Case:
    return Case(run.good[random.choice(("checkpoint", "frames"))], "refused")


def _kind(spoil: Callable, weight: int) -> Kind:
    def make(random: Random, run: Run) -> Case:
        fields = run.fields()
        note, expect = spoil(random, fields)
        return Case(json.dumps(fields).encode(), expect, note)

    return Kind("config", f"settings: {spoil.__name__.replace('_', ' ')}", make, weight)


KINDS = [
    *[_kind(spoil, weight) for spoil, weight in SPOIL.items()],
    Kind("config", "settings: text that is no config", text_that_is_no_config, 4),
    Kind("config", "settings: everything twice", everything_twice),
    Kind("config", "settings: another file as a config", another_file_as_a_config),
]
