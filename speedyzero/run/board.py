"""TensorBoard's event file of a run, made from its rows."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams, image

from speedyzero.run.rows import read_rows

SPS = "charts/SPS"
"""Environment steps a second, under CleanRL's name."""


class Board:
    """TensorBoard's event file in `directory`. It shows the rows of `metrics.jsonl`, and is made from them whenever it is not whole:
    when a run is resumed, after the folder was deleted, after a write failed. So no row is shown twice and none that was taken back.

    rows: `metrics.jsonl`. settings: shown as text and as hyperparameters. total_env_steps: where the x-axis goes over to updates.
    began: the time of day when the run began, in seconds since 1970.
    """

    def __init__(self, directory: Path, rows: Path, settings: Mapping[str, Any], total_env_steps: int, began: float) -> None:
        self._directory, self._rows, self._settings = directory, rows, settings
        self._total_env_steps, self._began = total_env_steps, began
        self._writer: SummaryWriter | None = None
        self._pictures: dict[str, tuple[Summary, int, float]] = {}
        """The newest of each name, its x and time of day. An event file that begins again shows them again."""

    def update(self, row: Mapping[str, Any] | None) -> None:
        """Show the newest row of `metrics.jsonl`. Raises what the writer raises, OSError most of all; the next call begins again."""
        try:
            if self._writer is None or not any(self._files()):
                self._begin()
            elif row is not None:
                self._add(row)
            self._writer.flush()  # here a fault in the writer's own thread comes to light
        except Exception:
            self.close()
            raise

    def add_scores(self, scores: Mapping[str, float], wall_s: float) -> None:
        """Show numbers at the newest row, `wall_s` seconds after the run began. Raises as `update`."""
        self.update(None)
        for tag, value in scores.items():
            self._writer.add_scalar(tag, value, self._step, walltime=self._began + wall_s)
        self.update(None)

    def add_picture(self, name: str, picture: np.ndarray, wall_s: float) -> None:
        """Show a picture [H, W, 1 or 3] u8 at the newest row. Raises as `update`."""
        self._show(name, image(name, picture, dataformats="HWC"), wall_s)

    def add_gif(self, name: str, gif: bytes, size: tuple[int, int], wall_s: float) -> None:
        """Show a GIF, of which TensorBoard plays all frames, at the newest row. size: height and width. Raises as `update`."""
        encoded = Summary.Image(height=size[0], width=size[1], colorspace=3, encoded_image_string=gif)
        self._show(name, Summary(value=[Summary.Value(tag=name, image=encoded)]), wall_s)

    def _show(self, name: str, summary: Summary, wall_s: float) -> None:
        self.update(None)
        self._pictures[name] = summary, max(self._step, 0), self._began + wall_s
        self._draw(name)
        self.update(None)

    def _draw(self, name: str) -> None:
        summary, step, walltime = self._pictures[name]
        self._writer.file_writer.add_summary(summary, step, walltime)

    def close(self) -> None:
        """End the writer and its thread. Closing twice does nothing."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with suppress(Exception):
                writer.close()

    def _files(self) -> Iterator[Path]:
        return self._directory.glob("events.out.tfevents.*")

    def _begin(self) -> None:
        """Begin an event file with the settings and all rows, in the place of those that are there."""
        self.close()
        for old in list(self._files()):
            # Emptied before it is deleted: a TensorBoard that is reading a file goes on to the next at its end, and never if it is gone.
            if old.stat().st_size:
                os.truncate(old, 0)
            else:
                old.unlink()
        self._writer = SummaryWriter(str(self._directory), purge_step=0)  # a TensorBoard that is open forgets what it read
        self._step, self._updates = -1, 0
        lines = [f"|{name}|{value}|" for name, value in self._settings.items()]
        self._writer.add_text("config", "\n".join(["|setting|value|", "|-|-|", *lines]), 0, walltime=self._began)
        plain = {name: value if isinstance(value, int | float | str) else str(value) for name, value in self._settings.items()}
        # Not add_hparams: it makes a run of its own beside this one.
        experiment, session, _ = hparams(plain, {"charts/episodic_return": 0.0, "eval/episodic_return": 0.0})
        for summary in (experiment, session):
            self._writer.file_writer.add_summary(summary, 0, self._began)
        with open(self._rows, "rb") as file:
            for _, row in read_rows(file):
                if row is not None:
                    self._add(row)
        for name in self._pictures:
            self._draw(name)

    def _add(self, row: Mapping[str, Any]) -> None:
        step = self._next_step(row["env_steps"], row["updates"])
        for tag, value in {**row, SPS: row.get("time/env_steps_per_s")}.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(tag, value, step, walltime=self._began + row["wall_s"])

    def _next_step(self, env_steps: int, updates: int) -> int:
        """x of a row: its environment steps. After the last of them it goes on by updates; TensorBoard hides all but one row of a step."""
        if env_steps < self._total_env_steps:
            self._updates = updates
        else:
            env_steps += updates - self._updates
        self._step = max(env_steps, self._step + 1)
        return self._step
