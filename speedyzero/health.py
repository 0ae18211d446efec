"""What the host makes of numbers that go bad: it says so, saves the batch that did it, and stops the run before it is wasted.

What must happen at once happens on the device, in `learn.update`: it skips the update. The host looks at each row of metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from speedyzero import checkpoint
from speedyzero.learn import Augmentation, Batch, compared_steps, losses, mixed_precision, observe
from speedyzero.state import State
from speedyzero_kernels.nstep import Targets
from speedyzero_kernels.support import inverse_transform

BATCH = "nonfinite_batch.safetensors"
"""In the run directory: the last batch that was skipped when the run stopped."""

WHY = "loss, gradient or statistics were not finite"

# Shares of the greatest scalar that --support can express: above the first it is said, under the second it may be said again.
NEAR, FAR = 0.9, 0.5


class NonFiniteError(ValueError):
    """Too many updates in a row were skipped; the message is one line that says how many, where the batch is, and the mend."""


class Health:
    """Reads the rows of metrics of one run.

    say: gets a line about what is worth knowing.
    """

    def __init__(self, state: State, say: Callable[[str], None]):
        self._state, self._say = state, say
        self._skipped = int(state.learner.skipped)  # a run that goes on has said these before
        self._greatest = float(inverse_transform(torch.tensor(state.config.support, dtype=torch.float64)))
        self._near = False

    def check(self, row: Mapping[str, float | int]) -> None:
        """Look at a row of `Trainer.metrics`. Waits for the device, and only if updates were skipped since the last row.

        Raises:
            NonFiniteError: --max-skipped updates in a row were skipped; the batch of the last is in the run directory. The state is as
                it was.
        """
        self._look_at_values(row.get("train/value_abs_max", 0.0))
        skipped = row["train/skipped_updates"]
        new, self._skipped = skipped - self._skipped, skipped
        if new == 0:
            return
        self._say(f"{'1 update was' if new == 1 else f'{new} updates were'} skipped since {WHY} ({skipped} in all)")
        config, in_a_row = self._state.config, int(self._state.learner.skipped_in_a_row)
        if in_a_row >= config.max_skipped:
            raise NonFiniteError(
                f"the last {in_a_row} updates were skipped since {WHY} (--max-skipped {config.max_skipped}); "
                f"{_save(self._state, config.run_dir / BATCH)}; start anew with a lower --lr or --max-grad-norm, or go on from the last "
                f"checkpoint with --resume --run-dir {config.run_dir}"
            )

    def _look_at_values(self, greatest: float) -> None:
        if not self._near and greatest > NEAR * self._greatest:
            self._near = True
            self._say(
                f"--support {self._state.config.support}: a value of {greatest:.4g} was predicted, and the most it can express is "
                f"{self._greatest:.4g}; if returns are that large start anew with more, if not with a lower --lr"
            )
        elif self._near and greatest < FAR * self._greatest:
            self._near = False


def _save(state: State, path: Path) -> str:
    """Save the batch that was skipped last; where it is and what is wrong with it, or why it is not there."""
    try:
        tensors, bad, note = _inspect(state)
        checkpoint.save(path, tensors, {
            "not_finite": bad, "note": note, "slots": state.ring.slots, "env": state.spec.env_id, "config": state.config.to_json()
        })  # fmt: skip
    except OSError as error:
        return f"the last batch could not be saved to {path} ({error.strerror or error})"
    except torch.cuda.OutOfMemoryError:
        return f"the last batch could not be saved to {path} (the GPU has too little memory to gather it)"
    return f"the last batch is in {path} ({note})"


def _inspect(state: State) -> tuple[dict[str, Tensor], dict[str, list[str]], str]:
    """The batch that was skipped last, by name; which of its parts are not finite; the same in words.

    It is evaluated again just as it was, on the same weights: none were learned since.
    """
    kept = state.learner.evidence.read()

    def of(kind: str) -> dict[str, Tensor]:
        return {name.removeprefix(kind): tensor for name, tensor in kept.items() if name.startswith(kind)}

    draws = Augmentation(**of("augmentation.")) if state.config.augment else None
    compared = compared_steps(state.config, kept["update"] - 1)
    observed = observe(state.ring, kept["index"], state.config, draws, compared, state.learner.network.normalisation)
    batch = Batch(*observed, Targets(**of("targets.")), kept["weights"], draws, compared)
    frames = {"observation": batch.observation, "future": batch.future}
    tensors = kept | frames | {"overwritten": _overwritten(state, kept["index"], kept["head"])}
    bad = {"batch": _not_finite(frames | {name: tensor for name, tensor in kept.items() if name not in ("loss", "grad_norm")})}
    try:
        parts, worse, counts = _evaluate(state, batch)
    except torch.cuda.OutOfMemoryError:
        return tensors, bad, "not evaluated again: the GPU has too little memory"
    bad |= worse
    words = [*bad["batch"], *bad["losses"]]
    words += [f"{len(bad[name])} of {count} {name}" for name, count in counts.items() if bad[name]]
    note = f"not finite: {', '.join(words)}" if words else "all is finite when it is evaluated again"
    return tensors | {f"again.{name}": part for name, part in parts.items()}, bad, note


def _evaluate(state: State, batch: Batch) -> tuple[dict[str, Tensor], dict[str, list[str]], dict[str, int]]:
    """The loss of a batch, its parts, the gradient norm and the predicted values [B]; which of them, of the gradients and of the running
    statistics are not finite; how many of the latter two there are. Changes only the gradients, which the next update clears."""
    learner, network = state.learner, state.learner.network
    learner.statistics.keep()
    learner.optimizer.zero_grad()
    try:
        with mixed_precision(state.config, batch.weights):
            loss, parts, value = losses(network, batch, state.config)
        loss.backward()
        parts |= {"grad_norm": learner.optimizer.flat.grads.norm(), "value": value}
        gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
        statistics = {name: buffer for name, buffer in network.named_buffers() if name.rpartition(".")[2].startswith("running_")}
        bad = {"losses": _not_finite(parts), "gradients": _not_finite(gradients), "statistics": _not_finite(statistics)}
        return parts, bad, {"gradients": len(gradients), "statistics": len(statistics)}
    finally:
        learner.statistics.restore(torch.ones((), dtype=torch.bool, device=state.device))


def _overwritten(state: State, index: Tensor, head: Tensor) -> Tensor:
    """Which samples [B] bool the ring has lost frames of since its head was at `head`: their observations are no longer those seen."""
    ring = state.ring
    age = (head - 1 - index % ring.slots) % ring.slots
    return age + state.config.frame_stack - 1 + (ring.head - head) >= ring.slots


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
