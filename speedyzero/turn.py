"""The emulators' turn within an iteration: from `send` (step 3) to `recv` (step 6), while the device learns.

On a CPU the host takes it within the iteration; on CUDA it is a node of the graph, taken by a thread of the driver (`graph.StreamTurn`).
Either way an error in it waits until the iteration is over: all else of the iteration is then done, and can be saved.
"""

from __future__ import annotations

from collections.abc import Callable

from speedyzero.envs import Emulators


class Turn:
    """What the emulators do in an iteration, on the host's own thread: `begin` hands them their actions, `end` waits for what they say."""

    def __init__(self, emulators: Emulators):
        self.emulators = emulators
        self.error: BaseException | None = None

    def begin(self) -> None:
        """The actions are in the emulators' buffer: step."""
        self.attempt(self.emulators.send)

    def end(self) -> None:
        """Wait until the emulators' buffers hold the step."""
        self.attempt(self.emulators.recv)

    def attempt(self, verb: Callable[[], None]) -> None:
        """Do it, unless something failed before; keep what it raises for `check`."""
        if self.error is None:
            try:
                verb()
            except BaseException as error:  # the caller may be a thread of the driver, where nobody else would see it
                self.error = error

    def check(self) -> None:
        """Raise what the emulators raised in this iteration, as itself. Their failed step is taken back, so that it can be tried again."""
        if self.error is not None:
            error, self.error = self.error, None
            self.emulators.withdraw()
            raise error
