"""`--track`: the rows, the scores, pictures and videos of a run sent to Weights & Biases, where it is installed.

A step of theirs is an iteration, so that what a resumed run does again is not sent twice; they draw it over environment steps.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from io import BytesIO
from types import ModuleType
from typing import Any
from uuid import uuid4

import numpy as np

from speedyzero.config import Config, ConfigError
from speedyzero.run.files import write_json

NAME = "wandb.json"
"""File of a run with the id of what they keep of it, so that `--resume` goes on with that."""


def find_wandb() -> ModuleType:
    """The library of Weights & Biases.

    Raises:
        ConfigError: it is not installed, in one line.
    """
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        wandb = None
    if not hasattr(wandb, "init"):  # a folder `wandb` here, which they leave, is imported as an empty package
        raise ConfigError("--track: Weights & Biases is not installed; pip install wandb, or leave --track out")
    return wandb


class Tracker:
    """What they keep of one run. No fault of theirs ends a run once it has begun: `say` gets one line.

    Raises:
        ConfigError: it is not installed, or did not begin.
        OSError: the run's directory cannot be written.
    """

    def __init__(self, config: Config, settings: Mapping[str, Any], say: Callable[[str], None]):
        self._wandb, self._say, self._failed = find_wandb(), say, False
        path = config.run_dir / NAME
        try:
            known = str(json.loads(path.read_text())["id"]) if config.resume else None
        except (OSError, ValueError, LookupError, TypeError):
            known = None  # it was not tracked before
        try:
            self._run = self._wandb.init(
                project=config.wandb_project_name, entity=config.wandb_entity, name=config.run_dir.name, config=dict(settings),
                id=known or uuid4().hex[:12], resume="allow" if known else None,
            )  # fmt: skip
            self._run.define_metric("*", step_metric="env_steps")
        except Exception as error:
            why = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(
                f"--track: Weights & Biases did not begin ({why}); wandb login, or set WANDB_MODE=offline, or leave --track out"
            ) from error
        write_json(path, {"id": self._run.id, "url": self.url})

    @property
    def url(self) -> str | None:
        """Where it can be seen; None while it is kept here (WANDB_MODE=offline)."""
        return None if self._run.offline else self._run.url

    def log(self, values: Mapping[str, Any], iteration: int) -> None:
        """Send numbers of an iteration, unless they have it already. None is left out."""
        self._try(lambda: self._log({name: value for name, value in values.items() if value is not None}, iteration))

    def scores(self, scores: Mapping[str, float], iteration: int) -> None:
        """Send the scores of an evaluation, which also stand in the table of runs."""
        self.log(scores, iteration)
        self._try(lambda: self._run.summary.update(dict(scores)))

    def picture(self, name: str, picture: np.ndarray, iteration: int) -> None:
        """Send a picture [H, W, 1 or 3] u8."""
        self._try(lambda: self._log({name: self._wandb.Image(picture.squeeze(2) if picture.shape[2] == 1 else picture)}, iteration))

    def gif(self, name: str, gif: bytes, iteration: int) -> None:
        """Send a short video."""
        self._try(lambda: self._log({name: self._wandb.Video(BytesIO(gif), format="gif")}, iteration))

    def finish(self, exit_code: int) -> None:
        """Send what is still to be sent, and end."""
        self._try(lambda: self._run.finish(exit_code=exit_code))

    def _log(self, values: dict[str, Any], iteration: int) -> None:
        if iteration >= self._run.step:  # what lies before it they refuse, with a warning each time
            self._run.log(values, step=iteration)

    def _try(self, send: Callable[[], None]) -> None:
        try:
            send()
        except Exception as error:
            if not self._failed:
                self._say(f"--track: Weights & Biases takes nothing ({' '.join(str(error).split())}); metrics.jsonl has the rows")
            self._failed = True
