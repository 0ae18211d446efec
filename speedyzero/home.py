"""The directory of a run: locked for one process, described by config.json, made anew should somebody delete it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from speedyzero.config import Config, ConfigError
from speedyzero.frames import FrameStore
from speedyzero.lock import LOCK, Lock
from speedyzero.log import write_json
from speedyzero.saver import Saver


def vacant(run_dir: Path) -> bool:
    """Whether a new run may begin there: there is nothing, or what one left that was killed before its config.json was whole."""
    if not run_dir.exists():
        return True
    return run_dir.is_dir() and all(path.name in (LOCK, "config.json.tmp") for path in run_dir.iterdir())


class Home:
    """Where a run with a resolved config lives, and its process alone.

    Raises:
        ConfigError: another process trains there, or a run is there and this is to be a new one.
        OSError: it cannot be written.
    """

    def __init__(self, config: Config):
        self._config = config
        self._lock = Lock(config.run_dir)
        self.checkpoints = config.run_dir / "checkpoints"
        self.store = FrameStore(self.checkpoints / "frames") if config.checkpoint_ring else None
        self.saver = Saver(self.checkpoints, config.keep, self.store, config.checkpoint_interval)
        if not config.resume and not vacant(config.run_dir):
            self.close()
            raise ConfigError(f"--run-dir {config.run_dir}: exists already; go on with it by --resume, or give another folder")

    @property
    def way_on(self) -> str:
        """How to go on with the run, for a person or a scheduler."""
        return f"go on with --resume --run-dir {self._config.run_dir}"

    def write_config(self) -> None:
        """Write config.json. Raises OSError."""
        write_json(self._config.run_dir / "config.json", {**self._config.to_json(), "resume": False})

    def keep(self, say: Callable[[str], None]) -> None:
        """Make the directory anew if it was deleted, so that what is saved next can be resumed. Raises as the constructor."""
        if self._lock.lost():
            self._lock.renew()
            self.write_config()
            if self.store:
                self.store.complete.clear()
            say(f"{self._config.run_dir} was deleted while running: made anew, and the next checkpoint goes there")

    def close(self) -> None:
        """Wait for the last checkpoint, and let other processes in."""
        self.saver.close()
        self._lock.release()
