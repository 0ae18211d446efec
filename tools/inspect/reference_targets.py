"""Targets and observation of a position, in plain Python from the raw ring, one number at a time.

It uses nothing of `speedyzero_kernels`: the tensors of an update are compared with this. It also has the parts of a value target, of
which the update keeps only the sum.
"""

from dataclasses import dataclass

import numpy as np

from speedyzero.config import Config
from speedyzero.ring import Ring


@dataclass
class Step:
    """What one position of a window is taught."""

    slot: int
    counts: bool
    """Whether its value and the prefix of the step that leads to it are learned: the episode has not ended before it."""
    acts: bool
    """Whether its policy and its action are: it counts and is not the end itself."""
    rewards: float = 0.0
    """Discounted, of the value target."""
    bootstrap: float = 0.0
    """Discounted."""
    prefix: float = 0.0
    """Of the step that leads to it."""

    @property
    def value(self) -> float:
        return self.rewards + self.bootstrap


class Raw:
    """The ring as numpy arrays, and what follows from them."""

    def __init__(self, ring: Ring, config: Config):
        self.config, self.slots, self.head = config, ring.slots, int(ring.head)
        self.reward, self.done, self.first = (getattr(ring, name).cpu().numpy() for name in ("reward", "done", "first"))
        self.cached = (ring.value if config.bootstrap == "network" else ring.root_value).cpu().numpy()
        self.frames = ring.frames

    def n(self, slot: int) -> int:
        """How many steps the value target of a position takes."""
        transitions_ago = (self.head - 1 - slot) % self.slots * self.config.lanes
        return max(1, self.config.n_step - int(transitions_ago // int(self.config.n_step_age * self.config.env_steps)))

    def window(self, lane: int, slot: int) -> list[Step]:
        """The K + 1 steps that the position at `slot` is taught."""
        n, steps, ended, prefix = self.n(slot), [], False, 0.0
        for k in range(self.config.unroll + 1):
            here = (slot + k) % self.slots
            step = Step(here, counts=not ended, acts=not ended and not self.done[lane, here])
            if k > 0:
                prefix = (0.0 if (k - 1) % self.config.lstm_horizon == 0 else prefix) + float(self.reward[lane, here])
                step.prefix = prefix if step.counts else 0.0
            if step.acts:
                self._add_value(step, lane, n)
            ended = ended or bool(self.done[lane, here])
            steps.append(step)
        return steps

    def _add_value(self, step: Step, lane: int, n: int) -> None:
        for i in range(1, n + 1):
            there = (step.slot + i) % self.slots
            step.rewards += self.config.discount ** (i - 1) * float(self.reward[lane, there])
            if self.done[lane, there]:
                return
        step.bootstrap = self.config.discount**n * float(self.cached[lane, there])

    def stack(self, lane: int, slot: int) -> np.ndarray:
        """The observation [stack x C, H, W] at `slot`, oldest frame first, as it is before augmentation."""
        taken = [slot]
        while len(taken) < self.config.frame_stack:
            taken.insert(0, taken[0] if self.first[lane, taken[0]] else (taken[0] - 1) % self.slots)
        frames = np.concatenate([self.frames[lane, at].cpu().numpy() for at in taken])
        return frames.astype(np.float64) / (255 if frames.dtype == np.uint8 else 1)


def normalised(observation: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """An observation [stack x C, H, W] less the mean of each pixel, times its scale, both [C, H, W], and no further than 5 from 0."""
    frames = observation.reshape(-1, *mean.shape)
    return np.clip((frames - mean) * scale, -5, 5).reshape(observation.shape)


def shifted(observation: np.ndarray, shift: tuple[int, int], pad: int) -> np.ndarray:
    """An observation [planes, H, W] out of its border replicated `pad` times, cut at `shift` (y, x)."""
    _, height, width = observation.shape
    wide = np.pad(observation, ((0, 0), (pad, pad), (pad, pad)), mode="edge")
    return wide[:, shift[0] : shift[0] + height, shift[1] : shift[1] + width]
