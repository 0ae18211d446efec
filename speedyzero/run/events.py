"""TensorBoard's event files: what a row becomes in them, and which of them a resumed run no longer needs."""

import os
import re
import socket
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from time import time

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.summary.writer.record_writer import RecordWriter

from speedyzero.run.records import LONGEST


def event_path(directory: Path) -> Path:
    """Where a new event file goes. Readers take files by name, so it comes after those that are there, whatever the clock says."""
    names = (re.match(r"events\.out\.tfevents\.(\d{10})\.", path.name) for path in directory.glob("events.out.tfevents.*"))
    stamp = max([int(time()), *(int(name[1]) + 1 for name in names if name)])
    return directory / f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}"


def event_head(purge_from: int | None) -> bytes:
    """The beginning of an event file, from which on the events of older files with steps from `purge_from` on do not count."""
    head = _framed(Event(wall_time=time(), file_version="brain.Event:2"))
    if purge_from is not None:
        head += _framed(Event(wall_time=time(), step=purge_from, session_log=SessionLog(status=SessionLog.START)))
    return head


def row_event(row: Mapping[str, float | int | None]) -> bytes:
    """All that is finite of a row, as one event."""
    keys = [key for key, value in row.items() if value is not None and key not in ("iteration", "wall_s")]
    values = [Summary.Value(tag=key, simple_value=row[key]) for key in keys]
    return _framed(Event(wall_time=time(), step=row["iteration"], summary=Summary(value=values)))


def _framed(event: Event) -> bytes:
    """A TFRecord: length, its checksum, the event, its checksum."""
    record = BytesIO()
    RecordWriter(record).write(event.SerializeToString())
    return record.getvalue()


def _checksum(data: bytes) -> bytes:
    return masked_crc32c(data).to_bytes(4, "little")


def _events(path: Path) -> Iterator[Event]:
    """The events of a file, one at a time. Raises OSError, ValueError or DecodeError where it cannot be read on."""
    with open(path, "rb") as file:
        while head := file.read(12):
            size = int.from_bytes(head[:8], "little")
            if head[8:] != _checksum(head[:8]) or size > LONGEST:
                raise ValueError(f"{path}: damaged")
            data = file.read(size)
            if file.read(4) != _checksum(data):
                raise ValueError(f"{path}: damaged")
            yield Event.FromString(data)


def superseded(directory: Path, resume_at: int) -> tuple[list[Path], int]:
    """The newest event files that hold nothing up to iteration `resume_at`, and the step to purge from in their place.

    A run that is killed before it saves leaves one each time. A file that cannot be read to its end is not among them. They may
    hide what an older file holds: then the step to purge from is theirs.
    """
    files: list[Path] = []
    purge_from = resume_at + 1
    for path in sorted(directory.glob("events.out.tfevents.*"), reverse=True):
        starts = []
        try:
            for event in _events(path):
                if event.HasField("session_log"):
                    starts.append(event.step)
                elif not event.HasField("file_version") and event.step <= resume_at:
                    return files, purge_from
        except (OSError, ValueError, DecodeError):
            return files, purge_from
        files.append(path)
        purge_from = min([purge_from, *starts])
    return files, purge_from
