"""What is no regular file where one should be, or another file than it should be."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random

from .run import Case, Kind, Run, Target

_CHUNKS = ((b"IHDR", b"\0\0\0\1\0\0\0\1\x08\0\0\0\0"), (b"IDAT", zlib.compress(b"\0\0")), (b"IEND", b""))
PICTURE = b"\x89PNG\r\n\x1a\n" + b"".join(
    len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big") for name, data in _CHUNKS
)
"""A PNG of one pixel."""


def _link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def _sparse(path: Path) -> None:
    """Nothing, and a lot of it: it takes no room on the disk."""
    with open(path, "wb") as file:
        file.truncate(1 << 40)


def _locked(path: Path) -> None:
    """Nobody may read it; root may, and finds it empty."""
    path.touch(0o000)


PLACES: dict[str, Callable[[Path], None]] = {
    "a folder": Path.mkdir, "a pipe": os.mkfifo, "a link to itself": lambda path: path.symlink_to(path),
    "a link to nothing": _link("/nowhere/x"), "a link to /dev/zero": _link("/dev/zero"), "a link to /dev/null": _link("/dev/null"),
    "a link to /dev/full": _link("/dev/full"), "a link to a folder": _link("/"), "a link to what cannot be read": _link("/proc/self/mem"),
    "a link to a file of no size": _link("/proc/self/maps"), "a terabyte of nothing": _sparse, "a locked file": _locked,
}  # fmt: skip
CONTENTS = {
    "an empty file": b"", "a picture": PICTURE, "an archive": b"PK\x05\x06" + bytes(18), "a text": b"hello\n" * 100,
    "a pickle": b"\x80\x04N.",
}  # fmt: skip


def _place(target: Target, name: str) -> Kind:
    return Kind(target, f"special: {name}", lambda random, run: Case(PLACES[name], "refused"))


def _contents(target: Target, name: str) -> Kind:
    return Kind(target, f"special: {name}", lambda random, run: Case(CONTENTS[name], "refused"))


def _config_as_a_checkpoint(random: Random, run: Run) -> Case:
    return Case(run.good["config"], "refused")


def _piece_as_a_checkpoint(random: Random, run: Run) -> Case:
    return Case(run.good["frames"], "refused")


KINDS = [
    *[_place(target, name) for target in ("checkpoint", "frames", "config") for name in PLACES],
    *[_contents(target, name) for target in ("checkpoint", "frames", "config") for name in CONTENTS],
    Kind("checkpoint", "special: a config as a checkpoint", _config_as_a_checkpoint),
    Kind("checkpoint", "special: a piece as a checkpoint", _piece_as_a_checkpoint),
]
