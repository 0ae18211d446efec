"""A file that grows by whole records, whatever becomes of its disk and its directory."""

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

LONGEST = 1 << 20
"""Bytes of the longest row or event that is read back."""


class RecordFile:
    """A file of whole records, opened anew for each: its disk may fill and its directory vanish in between.

    name: what lines call it. path: where it is to begin, or to begin anew after it was deleted. head: its first bytes.
    end: the last byte of every record; b"" if that can be any. Raises OSError if it cannot begin.
    """

    def __init__(self, name: str, path: Callable[[], Path], *, head: bytes = b"", end: bytes = b"") -> None:
        self._name, self._new_path, self._head, self._end = name, path, head, end
        self.path = path()
        self._inode: tuple[int, int] | None = None
        self._torn_at: int | None = None
        self._lost = 0
        self._open_and_write(b"")

    def gone(self) -> bool:
        """Whether the file that was written last is not there any more, or another one is."""
        try:
            return _inode(os.stat(self.path)) != self._inode
        except OSError:
            return True

    def append(self, record: bytes) -> str | None:
        """Write a record, whole or not at all; returns a line when the first is lost, and when one is written again."""
        try:
            if self.gone():
                self.path, self._torn_at = self._new_path(), None
            self._open_and_write(record)
        except OSError as error:
            self._lost += 1
            return f"{self._name}: rows are being lost {why(error)}" if self._lost == 1 else None
        lost, self._lost = self._lost, 0
        return f"{self._name}: rows are written again; {lost} {'was' if lost == 1 else 'were'} lost" if lost else None

    def _open_and_write(self, record: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            here = os.fstat(file)
            self._inode, size = _inode(here), here.st_size
            if self._torn_at is not None and size > self._torn_at:
                try:
                    os.ftruncate(file, self._torn_at)
                    size = self._torn_at
                except OSError:
                    if not self._end:  # a line may follow half a line, an event nothing but events
                        raise
            if size == 0:
                record = self._head + record
            elif self._end and os.pread(file, 1, size - 1) != self._end:  # another hand was here
                record = self._end + record
            self._torn_at = size
            try:
                while record:  # a disk that fills takes a part first
                    record = record[os.write(file, record) :]
            except OSError as error:
                error.filename = str(self.path)
                with suppress(OSError):  # tried again before the next record
                    os.ftruncate(file, size)
                raise
            self._torn_at = None
        finally:
            os.close(file)


def _inode(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino


def why(error: OSError) -> str:
    """What went wrong, and the mend if it is known: `(No space left on device); make room`."""
    mend = "; make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return f"({error.strerror or error}){mend}"
