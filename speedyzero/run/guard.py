"""Ending a run early: signals, which are read between iterations, and the deadline of an iteration."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from types import FrameType

from speedyzero.torchrun import end_with_torchrun

STUCK = 70
"""Exit code of a run that was ended: EX_SOFTWARE of sysexits.h."""


LOOKS = 20
"""How often a watchdog looks within its limit."""


class Watchdog:
    """A thread that ends the process if an iteration takes longer than `limit` seconds, at most a twentieth of the limit late.

    describe: called then; its line is printed and the exit code is STUCK. A thread that waits for the device cannot be interrupted.
    """

    def __init__(self, limit: float, describe: Callable[[float], str], end: Callable[[int], None] = os._exit):
        self._limit, self._describe, self._end = limit, describe, end
        self._due = math.inf
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    @contextmanager
    def watch(self) -> Iterator[None]:
        """End the process unless the block ends in time."""
        self._due = monotonic() + self._limit
        try:
            yield
        finally:
            self._due = math.inf

    def close(self) -> None:
        """Stop watching, and end the thread."""
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(self._limit / LOOKS):
            if monotonic() > self._due:
                print(f"error: {self._describe(self._limit)}", file=sys.stderr, flush=True)
                self._end(STUCK)
                return


class Interrupted(Exception):
    """A signal asked to stop, at a place where there is nothing to save."""


class Interrupt:
    """Turns the first Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP into a request; a second one does what it always does.

    SIGUSR1 is what batch systems send ahead of the end of a job (Slurm's --signal=USR1@60), SIGHUP comes when the terminal is closed.
    SIGHUP stays ignored where nohup ignores it.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None

    def __enter__(self) -> Interrupt:
        wanted = [number for number in self.SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._handle) for number in wanted}
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
        if number == signal.SIGHUP:  # of a closed terminal come two, by the shell and by the kernel, half a millisecond apart
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
