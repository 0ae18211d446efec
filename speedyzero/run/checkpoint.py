"""Checkpoints: one safetensors file holds the state of a run, and a file that loads is the file that was saved.

The safetensors library writes and reads it, so loading runs no code and any reader of the format opens it. safetensors checks sizes but not
contents, so the metadata of the file, which holds texts only, adds checksums:

    format  version of this list; another version is refused
    meta    JSON of what the caller keeps beside the tensors
    sums    JSON {name: CRC32}, each over the name, dtype, shape and bytes of a tensor
    crc32   over the three above
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from speedyzero.config import short_repr
from speedyzero.run.files import remove_leftovers, replacing_path

FORMAT = 3
_FILE = re.compile(r"checkpoint_(\d{9,})\.safetensors")


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another version; the message is one line that says what to do."""


class DamagedError(CheckpointError):
    """The contents of a checkpoint are not what was saved: the one before it may still be valid."""


def path_of(directory: str | Path, iteration: int) -> Path:
    """The name of a checkpoint taken after `iteration` iterations."""
    return Path(directory) / f"checkpoint_{iteration:09d}.safetensors"


def latest(directory: str | Path) -> Path | None:
    """The checkpoint of the highest iteration in `directory`; None if there is none (or no directory)."""
    checkpoints = by_iteration(directory)
    return checkpoints[-1] if checkpoints else None


def by_iteration(directory: str | Path) -> list[Path]:
    """The checkpoints in `directory`, oldest first."""
    found = []
    for path in Path(directory).glob("checkpoint_*.safetensors"):
        if match := _FILE.fullmatch(path.name):
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def newest_valid(directory: str | Path, log: Callable[[str], None]) -> Path | None:
    """The checkpoint of the highest iteration whose checksums are right; None if there is no checkpoint.

    Damaged ones that are newer get `.damaged` added to their names, and `log` gets a line about each.

    Raises:
        CheckpointError: all are damaged (they keep their names), or the newest cannot be read or is of another version.
    """
    damaged: list[Path] = []
    for path in reversed(by_iteration(directory)):
        try:
            load(path)
        except DamagedError as error:
            log(f"{str(error).partition('; ')[0]}; trying the one before")
            damaged.append(path)
            continue
        for bad in damaged:
            bad.replace(bad.with_name(bad.name + ".damaged"))
        return path
    if damaged:
        raise DamagedError(f"{directory}: every checkpoint there is damaged; start a new run with another --run-dir")
    return None


def prune(directory: str | Path, keep: int) -> None:
    """Delete all but the `keep` latest checkpoints, and partial files of killed saves. Call it after a save."""
    if keep < 1:
        raise ValueError(f"keep must be at least 1, not {keep}")
    for path in by_iteration(directory)[:-keep]:
        path.unlink(missing_ok=True)
    remove_leftovers(Path(directory))


def save(path: str | Path, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
    """Replace `path` by a checkpoint of `tensors` (any device, any strides) and `meta`.

    meta: JSON; a tuple comes back as a list, and keys as strings.

    Raises:
        TypeError: `meta` is not JSON.
        OSError: the disk refuses; the old file stays.
    """
    host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    texts = {"format": str(FORMAT), "meta": json.dumps(meta), "sums": json.dumps({name: _sum(name, host[name]) for name in host})}
    with replacing_path(path) as aside:
        mode = aside.stat().st_mode
        try:
            save_file(host, aside, {**texts, "crc32": _sum_of_texts(texts)})
        except SafetensorError as error:
            if number := re.search(r"(?:os error|code:) (\d+)", str(error)):
                raise OSError(int(number[1]), os.strerror(int(number[1]))) from None
            raise
        aside.chmod(mode)  # safetensors may have put a file in its place that others cannot read


def load(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a checkpoint into (tensors, meta), on the CPU, after comparing every checksum.

    The tensors are private, writable views of the mapped file at any address: copy them to where they live. They stay valid if the file is
    replaced or deleted.

    Raises:
        CheckpointError: DamagedError if the contents are at fault.
    """
    with _opened(Path(path)) as (file, sums, meta):
        tensors = {}
        for name, expected in sums.items():
            tensors[name] = file.get_tensor(name)
            if _sum(name, tensors[name]) != expected:
                raise _Damage(f"tensor {name}: checksum differs")
    return tensors, meta


def read_meta(path: str | Path) -> dict[str, Any]:
    """The `meta` of a checkpoint, without reading its tensors. Raises as `load`."""
    with _opened(Path(path)) as (_, _, meta):
        return meta


def differing(wanted: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> str | None:
    """The name of the first of `wanted` that `tensors` lacks or holds in another shape or dtype; None if there is none."""
    for name, mine in wanted.items():
        theirs = tensors.get(name)
        if theirs is None or (theirs.shape, theirs.dtype) != (mine.shape, mine.dtype):
            return name
    return None


class _Damage(Exception):
    """What is wrong with the contents of a file."""


@contextmanager
def _opened(path: Path) -> Iterator[tuple[safe_open, dict[str, int], dict[str, Any]]]:
    """The file, the checksums of its tensors by name, and its meta; all errors of the block as one line."""
    remedy = "resume from another checkpoint"
    try:
        open(path, "rb").close()  # says what is wrong in the words of the system
        with safe_open(path, "pt") as file:
            texts = file.metadata() or {}
            version = texts.get("format")
            if version is None:
                raise _Damage("it is not a checkpoint of speedyzero")
            if version == str(FORMAT):
                if texts.get("crc32") != _sum_of_texts(texts):
                    raise _Damage("checksum of its metadata differs")
                sums = json.loads(texts["sums"])
                if sums.keys() != set(file.keys()):
                    raise _Damage("its tensors are not those of its checksums")
                yield file, sums, json.loads(texts["meta"])
                return
        problem = f"has checkpoint format {short_repr(version)}, and this speedyzero reads {FORMAT}"
        remedy = "resume with the speedyzero that wrote it"
    except FileNotFoundError:
        problem = "does not exist"
    except OSError as error:
        problem = f"cannot be read ({error.strerror or error})"
    except (_Damage, SafetensorError) as error:
        why = ascii(str(error))[1:-1][:120]
        raise DamagedError(
            f"{path} is damaged ({why}); delete it to resume from the one before, or start a new run with another --run-dir"
        ) from None
    raise CheckpointError(f"{path} {problem}; {remedy}, or start a new run with another --run-dir")


def _sum(name: str, tensor: torch.Tensor) -> int:
    """CRC32 of a contiguous tensor on the CPU."""
    described = f"{name} {tensor.dtype} {list(tensor.shape)}"
    return zlib.crc32(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()), zlib.crc32(described.encode()))


def _sum_of_texts(texts: Mapping[str, str]) -> str:
    """CRC32 of the metadata, as it stands there."""
    return f"{zlib.crc32(json.dumps([texts.get(name) for name in ('format', 'meta', 'sums')]).encode()):08x}"
