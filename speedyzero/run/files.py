"""Files of a run: replaced in one step, so that a killed write leaves the old file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def replacing_path(path: str | Path) -> Iterator[Path]:
    """Yield the path of an empty file that replaces `path` when the block ends, and is deleted if the block raises.

    Afterwards the new contents are on the disk under that name; until then the old ones are, never a mixture.
    """
    path = Path(path)
    aside = path.with_name(path.name + ".tmp")
    try:
        open(aside, "wb").close()
        yield aside
        _sync(aside)
        os.replace(aside, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a failed write does not name its file
        aside.unlink(missing_ok=True)
        raise
    _sync(path.parent)


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """As `replacing_path`, but yields the file, open for writing bytes."""
    with replacing_path(path) as aside, open(aside, "wb") as file:
        yield file


def _sync(path: Path) -> None:
    """Wait until a file or a directory is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def remove_leftovers(directory: Path) -> None:
    """Delete the partial files of killed writes. Nothing may be written in `directory` meanwhile."""
    for path in directory.glob("*.tmp*"):  # NAME.tmp is ours, .tmpABCDEF safetensors'
        path.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Replace `path` by `value` as sorted, indented JSON; NaN and infinities become null, a Path its text."""
    text = json.dumps(jsonable(value), sort_keys=True, indent=2, allow_nan=False)
    with replacing(path) as file:
        file.write(text.encode() + b"\n")


def jsonable(value: Any) -> Any:
    """A value as JSON has it: null for NaN and infinities, a Path as its text."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
