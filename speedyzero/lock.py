"""One process on a run directory: a lock that the kernel takes back when the process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from speedyzero.config import ConfigError

LOCK = "lock"
"""The file that is locked. It stays; what it says is for people: the lock itself is the kernel's."""


class Lock:
    """Holds `run_dir` for this process until `release`. Not inherited by children; on network file systems as good as their flock.

    Raises:
        ConfigError: another process holds it.
        OSError: the directory cannot be made or written.
    """

    def __init__(self, run_dir: Path):
        self._path = run_dir / LOCK
        self._file: int | None = None
        self._take()

    def _take(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            said = os.read(file, 200).decode(errors="replace").strip()
            holder = said if said and said.isprintable() else "another process"
            os.close(file)
            raise ConfigError(
                f"--run-dir {self._path.parent}: {holder} is training there; wait for it, stop it, or give another folder"
            ) from None
        except BaseException:
            os.close(file)
            raise
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {os.uname().nodename}\n".encode())
        self._file = file

    def lost(self) -> bool:
        """Whether the file is gone from the directory, or another's: then the lock keeps nobody out."""
        try:
            here = os.stat(self._path)
        except OSError:
            return True
        mine = os.fstat(self._file)
        return (here.st_dev, here.st_ino) != (mine.st_dev, mine.st_ino)

    def renew(self) -> None:
        """Lock the directory that is there now, after it was deleted. Raises as the constructor."""
        self.release()
        self._take()

    def release(self) -> None:
        """Let others in; releasing twice does nothing."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
