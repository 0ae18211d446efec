"""Ending a run early: signals, which are read between iterations, and the deadline of an iteration."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from speedyzero.torchrun import end_with_torchrun

STUCK = 70
"""Exit code of a run that was ended: EX_SOFTWARE of sysexits.h."""


class Watchdog:
    """A thread that waits `limit` seconds for each iteration.

    describe: called when an iteration has taken longer; its line is printed and the process ends with exit code STUCK, since a thread
        that waits for the device cannot be interrupted.
    """

    def __init__(self, limit: float, describe: Callable[[float], str], end: Callable[[int], None] = os._exit):
        self._limit, self._describe, self._end = limit, describe, end
        self._changed = threading.Condition()
        self._watching = self._closed = False
        self._round = 0
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    @contextmanager
    def watch(self) -> Iterator[None]:
        """End the process unless the block ends in time."""
        with self._changed:
            self._watching = True
            self._round += 1
            self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                self._watching = False
                self._changed.notify()

    def close(self) -> None:
        """Stop watching, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _watch(self) -> None:
        with self._changed:
            while not self._closed:
                if not self._watching:
                    self._changed.wait()
                    continue
                watched = self._round
                over = self._changed.wait_for(
                    lambda watched=watched: self._closed or not self._watching or self._round != watched, self._limit
                )
                if not over:
                    print(f"error: {self._describe(self._limit)}", file=sys.stderr, flush=True)
                    self._end(STUCK)
                    self._watching = False


class Interrupted(Exception):
    """A signal asked to stop, at a place where there is nothing to save."""


class Interrupt:
    """Turns the first Ctrl-C, SIGTERM or SIGUSR1 into a request; a second one does what it always does.

    SIGUSR1 is what batch systems send ahead of the end of a job (Slurm's --signal=USR1@60).
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None

    def __enter__(self) -> Interrupt:
        self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def check_stop(self) -> None:
        """Raise Interrupted if a stop was asked for."""
        if self.requested:
            raise Interrupted

    def _handle(self, number: int, frame: FrameType | None) -> None:
        end_with_torchrun(False)  # whose end may send this very signal twice, and it counts as one
        self.requested = signal.Signals(number)
        self.__exit__()
