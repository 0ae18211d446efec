"""A video file, a frame at a time: MP4 (H.264) by ffmpeg, or a GIF by Pillow."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from speedyzero.config import ConfigError
from speedyzero.envs import EnvSpec
from speedyzero.run.files import replacing, replacing_path

KINDS = (".mp4", ".gif")
PALETTE_FRAMES, PALETTE_PIXELS = 24, 2_000_000
"""Frames that a GIF's 256 colours are chosen from, spread over it: so many, and more while they have fewer pixels in all."""


@contextmanager
def writing(path: Path, fps: float) -> Iterator[Callable[[np.ndarray], None]]:
    """Yield a function that adds a frame [h, w, 3] u8, all of one even size; `path` is replaced when the block ends without an error.

    Raises:
        ConfigError: another kind of file, or what writes it is not installed.
        OSError: it cannot be written.
    """
    if path.suffix not in KINDS:
        raise ConfigError(f"--out {path}: give a file that ends in {' or '.join(KINDS)}")
    if path.suffix == ".gif":
        with replacing(path) as file:
            gif = _Gif()
            yield gif.add
            gif.save(file, fps)
        return
    ffmpeg = _ffmpeg()
    with replacing_path(path) as aside:
        encoder: Generator | None = None

        def add(frame: np.ndarray) -> None:
            nonlocal encoder
            if encoder is None:
                height, width = frame.shape[:2]
                settings = ["-crf", "18", "-movflags", "+faststart", "-f", "mp4"]
                encoder = ffmpeg.write_frames(
                    str(aside), (width, height), fps=fps, quality=None, macro_block_size=2, ffmpeg_log_level="error", output_params=settings
                )
                encoder.send(None)
            encoder.send(np.ascontiguousarray(frame))

        try:
            yield add
        finally:
            if encoder is not None:
                encoder.close()


def frames_a_second(spec: EnvSpec) -> float:
    """An environment's own pace: Atari's 60 frames, four a step; CartPole's 50; a step of others takes a quarter of a second."""
    if spec.family == "atari":
        return 15.0
    return 50.0 if spec.env_id.startswith("CartPole-") else 4.0


def gif(frames: Iterable[np.ndarray], fps: float) -> bytes:
    """A GIF of frames [h, w, 1 or 3] u8, all of one size."""
    made, out = _Gif(), BytesIO()
    for frame in frames:
        made.add(np.broadcast_to(frame, (*frame.shape[:2], 3)))
    made.save(out, fps)
    return out.getvalue()


def _ffmpeg() -> Any:
    try:
        import imageio_ffmpeg
    except ImportError:
        raise ConfigError("an MP4 needs imageio-ffmpeg: pip install 'speedyzero[watch]', or give --out FILE.gif") from None
    return imageio_ffmpeg


class _Gif:
    """The frames of a GIF, kept compressed until the colours of all are known."""

    def __init__(self) -> None:
        self._packed: list[bytes] = []
        self._shape: tuple[int, ...] = ()

    def add(self, frame: np.ndarray) -> None:
        self._shape = frame.shape
        self._packed.append(zlib.compress(frame.tobytes(), 1))

    def _image(self, index: int) -> Image.Image:
        return Image.fromarray(np.frombuffer(zlib.decompress(self._packed[index]), np.uint8).reshape(self._shape))

    def save(self, file: BinaryIO, fps: float) -> None:
        """Write them with one palette of 255 colours and, by `optimize`, one for "as before": what does not change takes no room."""
        count = len(self._packed)
        asked = min(count, max(PALETTE_FRAMES, PALETTE_PIXELS // math.prod(self._shape[:2])))
        some = [np.asarray(self._image(index)) for index in np.linspace(0, count - 1, asked).round().astype(int)]
        palette = Image.fromarray(np.concatenate(some)).quantize(255, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        frames = (self._image(index).quantize(palette=palette, dither=Image.Dither.NONE) for index in range(count))
        next(frames).save(file, "GIF", save_all=True, append_images=frames, duration=1000 / fps, loop=0, optimize=True)
