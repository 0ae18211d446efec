"""Events of the files below a folder from inotify, so that a write is seen when it begins and not by looking often enough."""

from __future__ import annotations

import ctypes
import os
import select
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CREATED, MOVED = 0x100, 0x80
_FOLDER = 0x40000000
_HEAD = struct.Struct("iIII")  # of an inotify_event: watch, mask, cookie, bytes of the name


@dataclass(frozen=True)
class Event:
    """A file appeared under its name: created, or moved there complete."""

    path: Path
    moved: bool


class Watch:
    """Watches a folder and the folders in it, also later ones. Linux only. Raises OSError."""

    def __init__(self, folder: Path):
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._file = self._libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        self._folders: dict[int, Path] = {}
        for path in [folder, *filter(Path.is_dir, folder.rglob("*"))]:
            self._add(path)

    def _add(self, folder: Path) -> None:
        number = self._libc.inotify_add_watch(self._file, os.fsencode(folder), CREATED | MOVED)
        if number < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
        self._folders[number] = folder

    def events(self, seconds: float) -> Iterator[Event]:
        """Events since the last call; waits up to `seconds` for the first."""
        if not select.select([self._file], [], [], max(0.0, seconds))[0]:
            return
        data = os.read(self._file, 1 << 16)
        while data:
            number, mask, _, length = _HEAD.unpack_from(data)
            name = data[_HEAD.size : _HEAD.size + length].rstrip(b"\0")
            data = data[_HEAD.size + length :]
            if number not in self._folders:  # the queue overflowed
                continue
            path = self._folders[number] / os.fsdecode(name)
            if mask & _FOLDER:
                self._add(path)
            else:
                yield Event(path, bool(mask & MOVED))

    def close(self) -> None:
        os.close(self._file)
