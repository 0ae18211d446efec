"""The ring's frames in a run's directory: written once, in compressed pieces, so that a checkpoint costs what is new since the one before.

A slot's frame never changes until its lap is over: a piece holds the frames of PIECE steps in a row of all lanes, and only the newest piece
is written again as it grows. Everything else of the ring, which every sweep changes, is small and part of each checkpoint. A step is
counted from the start of the run; step s lies in slot `s % T`.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from speedyzero.run import checkpoint
from speedyzero.run.checkpoint import CheckpointError
from speedyzero.run.files import remove_leftovers

PIECE = 256
"""Steps of a piece."""
LEVEL = 1
"""Of zlib: the frame before lies within its window, so that a higher level gains little and costs much."""

_NAME = re.compile(r"frames_(\d{9,})\.safetensors")


@dataclass(frozen=True)
class Piece:
    """Frames of steps in a row."""

    number: int
    """It holds steps from PIECE x number on."""
    first: int
    """The first of its steps."""
    parts: list[Tensor]
    """[L, steps, C, H, W] each, one after the other; on any device."""

    @property
    def steps(self) -> int:
        return sum(part.shape[1] for part in self.parts)


class FrameStore:
    """The pieces in one directory.

    `complete`: the numbers of the pieces that are known to hold all their steps, of this run; all others are written again.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.complete: set[int] = set()

    def path_of(self, piece: int) -> Path:
        """The file of the steps from PIECE x piece on."""
        return self.directory / f"frames_{piece:09d}.safetensors"

    def missing(self, frames: Tensor, slots: int, ahead: int) -> list[Piece]:
        """The pieces to write so that all frames of the ring are stored.

        frames: [L, T, C, H, W], the ring's. slots: steps so far. ahead: how many more steps the ring may take before all is written: the
        pieces are views of it, but where those steps would come in between, copies.
        """
        lap, oldest = frames.shape[1], max(0, slots - frames.shape[1])
        found = []
        for number in range(oldest // PIECE, -(-slots // PIECE)):
            if number not in self.complete:
                first, end = max(oldest, number * PIECE), min(slots, (number + 1) * PIECE)
                # Slots in a row, or two such where the lap ends in between.
                turn = min(end, first - first % lap + lap)
                parts = [frames[:, a % lap : a % lap + b - a] for a, b in ((first, turn), (turn, end)) if a < b]
                if first + lap < slots + ahead:
                    parts = [part.to("cpu", copy=True) for part in parts]
                found.append(Piece(number, first, parts))
        return found

    def write(self, piece: Piece) -> None:
        """Write a piece; compressed lane by lane, so that it takes little memory. Raises OSError."""
        self.directory.mkdir(parents=True, exist_ok=True)
        lanes, shape = piece.parts[0].shape[0], piece.parts[0].shape[2:]
        streams = {}
        for lane in range(lanes):
            packer = zlib.compressobj(LEVEL)
            data = b"".join([*(packer.compress(_bytes(part[lane])) for part in piece.parts), packer.flush()])
            streams[_stream(lane)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        meta = {"first": piece.first, "shape": [lanes, piece.steps, *shape], "dtype": str(piece.parts[0].dtype)}
        checkpoint.save(self.path_of(piece.number), streams, meta)
        if piece.first + piece.steps == (piece.number + 1) * PIECE:
            self.complete.add(piece.number)

    def read(self, into: Tensor, slots: int) -> None:
        """Fill the ring's frames `into` [L, T, C, H, W] with those of the steps before `slots`.

        Raises:
            CheckpointError: a piece is missing, damaged or of other frames; `into` may be half filled.
        """
        self.complete.clear()
        lap, oldest = into.shape[1], max(0, slots - into.shape[1])
        for piece in range(oldest // PIECE, -(-slots // PIECE)):
            first, steps = self._read(piece, into)
            begin, end = max(oldest, piece * PIECE), min(slots, (piece + 1) * PIECE)
            if first > begin or first + steps.shape[1] < end:
                raise CheckpointError(f"{self.path_of(piece)} lacks frames of the steps {begin} to {end - 1}")
            index = torch.arange(begin, end, device=into.device) % lap
            into[:, index] = steps[:, begin - first : end - first].to(into.device)
            if end == (piece + 1) * PIECE:
                self.complete.add(piece)

    def _read(self, piece: int, like: Tensor) -> tuple[int, Tensor]:
        """The first step of a piece, and its frames [L, steps, C, H, W] on the host."""
        path = self.path_of(piece)
        streams, meta = checkpoint.load(path)
        lanes, frame = like.shape[0], list(like.shape[2:])
        shape = meta.get("shape", [0, 0])
        names = [_stream(lane) for lane in range(lanes)]
        if [shape[0], *shape[2:]] != [lanes, *frame] or meta["dtype"] != str(like.dtype) or streams.keys() != set(names):
            raise CheckpointError(f"{path} holds frames of another run")
        rows = [bytearray(zlib.decompress(memoryview(streams[name].numpy()))) for name in names]
        return meta["first"], torch.stack([torch.frombuffer(row, dtype=like.dtype).view(shape[1:]) for row in rows])

    def pieces(self) -> Iterator[tuple[int, Path]]:
        """Number and file of every piece there is."""
        for path in self.directory.glob("frames_*.safetensors"):
            if match := _NAME.fullmatch(path.name):
                yield int(match[1]), path

    def prune(self, oldest: int) -> None:
        """Delete the pieces that end before step `oldest`, and partial files of killed writes."""
        for piece, path in list(self.pieces()):
            if (piece + 1) * PIECE <= oldest:
                path.unlink(missing_ok=True)
                self.complete.discard(piece)
        remove_leftovers(self.directory)


def _stream(lane: int) -> str:
    """The name of a lane's frames in a piece."""
    return f"lane_{lane:05d}"


def _bytes(rows: Tensor) -> memoryview:
    return memoryview(rows.cpu().contiguous().view(-1).view(torch.uint8).numpy())
