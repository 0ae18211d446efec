"""What happens to the files below a folder, as the kernel tells it: a write is seen at its begin, not by looking often enough."""

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
    """A file that came to be under its name: created, to be written, or moved there whole."""

    path: Path
    moved: bool


class Watch:
    """Events of the files in a folder and of the folders in it, also of those that come later. Linux only. Raises OSError."""

    def __init__(self, folder: Path):
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._file = self._libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if self._file < 0:
            raise OSError(ctypes.get_errno(), "inotify")
        self._folders: dict[int, Path] = {}
        self._add(folder)
        for below in folder.rglob("*"):
            if below.is_dir():
                self._add(below)

    def _add(self, folder: Path) -> None:
        number = self._libc.inotify_add_watch(self._file, os.fsencode(folder), CREATED | MOVED)
        if number < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error), str(folder))
        self._folders[number] = folder

    def events(self, seconds: float) -> Iterator[Event]:
        """What happened since the last call; waits so long for something to happen."""
        if not select.select([self._file], [], [], max(0.0, seconds))[0]:
            return
        data = os.read(self._file, 1 << 16)
        while data:
            number, mask, _, length = _HEAD.unpack_from(data)
            name = data[_HEAD.size : _HEAD.size + length].rstrip(b"\0")
            data = data[_HEAD.size + length :]
            if number not in self._folders:  # more events than the queue holds
                continue
            path = self._folders[number] / os.fsdecode(name)
            if mask & _FOLDER:
                self._add(path)
            else:
                yield Event(path, bool(mask & MOVED))

    def close(self) -> None:
        os.close(self._file)
