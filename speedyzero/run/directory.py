"""The directory of a run: locked for one process, described by config.json, created again should somebody delete it."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path

from speedyzero.config import SOFTWARE, Config, ConfigError
from speedyzero.run.files import write_json
from speedyzero.run.frames import FrameStore
from speedyzero.run.saver import Saver
from speedyzero.software import software
from speedyzero.torchrun import restarted, torchrun_id

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


def vacant(run_dir: Path) -> bool:
    """Whether a new run may begin there: it is empty, or a run was killed there before it had written its config.json."""
    if not run_dir.exists():
        return True
    return run_dir.is_dir() and all(path.name in (LOCK, "config.json.tmp") for path in run_dir.iterdir())


def is_of_this_torchrun(run_dir: Path) -> bool:
    """Whether the torchrun that started this process has begun the run there, or gone on with it. It starts its ranks again when one fails,
    and without counting that as a restart when one on another machine does, or when a machine comes or goes.
    """
    path = run_dir / "config.json"
    if restarted():
        return path.exists()
    try:
        return torchrun_id() is not None and json.loads(path.read_bytes())[SOFTWARE].get("torchrun") == torchrun_id()
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # there is none, or none that says so
        return False


class RunDirectory:
    """The directory of a run with a resolved config, for this process alone: lock, config.json, checkpoints.

    leads: whether this process keeps it. Another rank of the run only reads there, and what would write does nothing.

    Raises:
        ConfigError: another process trains there, or a run is there and this is to be a new one.
        OSError: it cannot be written.
    """

    def __init__(self, config: Config, leads: bool = True):
        self._config = config
        self._software = software()  # now: a checkout may move on while a run trains
        self._lock = Lock(config.run_dir) if leads else None
        self.checkpoints = config.run_dir / "checkpoints"
        self.store = FrameStore(self.checkpoints / "frames") if config.checkpoint_ring else None
        self.saver = Saver(self.checkpoints, config.keep, self.store, config.checkpoint_interval)
        if leads and not config.resume and not vacant(config.run_dir):
            self.close()
            raise ConfigError(f"--run-dir {config.run_dir}: exists already; go on with it by --resume, or give another folder")

    @property
    def resume_hint(self) -> str:
        """How to go on with the run, for a person or a scheduler."""
        return f"go on with --resume --run-dir {self._config.run_dir}"

    @property
    def description(self) -> dict[str, object]:
        """What config.json holds: the settings, which speedyzero runs them, and which torchrun started it, if one did."""
        started_by = {"torchrun": name} if (name := torchrun_id()) else {}
        return {**self._config.to_json(), "resume": False, SOFTWARE: self._software | started_by}

    def write_config(self) -> None:
        """Write config.json. Raises OSError."""
        if self._lock:
            write_json(self._config.run_dir / "config.json", self.description)

    def restore_if_deleted(self, log: Callable[[str], None]) -> None:
        """Create the directory again if it was deleted, so that what is saved next can be resumed. Raises as the constructor."""
        if self._lock and self._lock.lost():
            self._lock.renew()
            self.write_config()
            if self.store:
                self.store.complete.clear()
            log(f"{self._config.run_dir} was deleted while running: created again, and the next checkpoint goes there")

    def close(self) -> None:
        """Wait for the last checkpoint, and let other processes in."""
        self.saver.close()
        if self._lock:
            self._lock.release()
