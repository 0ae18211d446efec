"""What the host does about numbers that go bad: it says so, and stops the run before it is wasted.

What must happen at once happens on the device, in `learn.update`: it skips the update. The host looks at each row of metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from speedyzero.diagnosis import NEAR, greatest_value
from speedyzero.state import State

WHY = "loss, gradient or statistics were not finite"

# Share of the greatest scalar that --support can express, under which it may be said again that a value is NEAR it.
FAR = 0.5


class NonFiniteError(ValueError):
    """Too many updates in a row were skipped; the message is one line that says how many, and what to do."""


class Health:
    """Reads the rows of metrics of one run.

    say: gets a line about what is worth knowing.
    """

    def __init__(self, state: State, say: Callable[[str], None]):
        self._state, self._say = state, say
        self._skipped = int(state.learner.skipped)  # a run that goes on has said these before
        self._greatest = greatest_value(state.config.support)
        self._near = False

    def check(self, row: Mapping[str, float | int]) -> None:
        """Look at a row of `Trainer.metrics`. Waits for the device, and only if updates were skipped since the last row.

        Raises:
            NonFiniteError: --max-skipped updates in a row were skipped.
        """
        if (greatest := row.get("train/value_abs_max")) is not None:
            self._look_at_values(greatest)
        skipped = row["train/skipped_updates"]
        new, self._skipped = skipped - self._skipped, skipped
        if new == 0:
            return
        self._say(f"{'1 update was' if new == 1 else f'{new} updates were'} skipped since {WHY} ({skipped} in all)")
        config, in_a_row = self._state.config, int(self._state.learner.skipped_in_a_row)
        if in_a_row >= config.max_skipped:
            raise NonFiniteError(
                f"the last {in_a_row} updates were skipped since {WHY} (--max-skipped {config.max_skipped}); start a new run with a lower "
                f"--lr or --max-grad-norm, or go on with --resume --run-dir {config.run_dir}; without the newest checkpoint, --resume "
                f"repeats the updates since the one before exactly"
            )

    def _look_at_values(self, greatest: float) -> None:
        if not self._near and greatest > NEAR * self._greatest:
            self._near = True
            self._say(
                f"--support {self._state.config.support}: a value of {greatest:.4g} was predicted, and the most it can express is "
                f"{self._greatest:.4g}; if returns are that large start a new run with more, if not with a lower --lr"
            )
        elif self._near and greatest < FAR * self._greatest:
            self._near = False
