"""Signals that ask a run to stop: heeded between iterations, when everything can be saved."""

from __future__ import annotations

import signal
from types import FrameType


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

    def heed(self) -> None:
        """Raise Interrupted if a stop was asked for."""
        if self.requested:
            raise Interrupted

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number)
        self.__exit__()
