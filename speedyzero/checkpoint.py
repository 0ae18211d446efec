"""Checkpoints: one safetensors file holds the whole state of a run, and a file that loads is the file that was saved.

The layout is safetensors' (8 bytes of header length, a JSON header, the tensors' bytes): any reader of it opens the
file. Every byte is covered by a CRC32: the header begins with one over the rest of the header, the metadata has one per
tensor. The writer is our own because one pass over the data is then enough: each tensor is brought to the host, summed
and written in turn, so that saving needs no second copy of a 3 GB ring. Nothing is pickled.

    {"__metadata__": {"header_crc32": "0123abcd", "format": "1", "crc32": "{name: sum}", "meta": "{...}"},
     name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}
"""

import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

FORMAT = 1
"""Version of the metadata; a file of another version is refused."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_PREFIX = b'{"__metadata__":{"header_crc32":"%08x"'
_PREFIX_BYTES = len(_PREFIX % 0)
_CHUNK = 16 << 20  # bytes summed and written at a time
_FILE = re.compile(r"checkpoint_(\d{9,})\.safetensors")


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another version; the message is one line that says what to do."""


def path_of(directory: str | Path, iteration: int) -> Path:
    """The name of a checkpoint taken after `iteration` iterations."""
    return Path(directory) / f"checkpoint_{iteration:09d}.safetensors"


def latest(directory: str | Path) -> Path | None:
    """The checkpoint of the highest iteration in `directory`; None if there is none (or no directory)."""
    checkpoints = _by_iteration(directory)
    return checkpoints[-1] if checkpoints else None


def prune(directory: str | Path, keep: int) -> None:
    """Delete all but the `keep` latest checkpoints, and what a killed save left behind. Call it after a save."""
    if keep < 1:
        raise ValueError(f"keep must be at least 1, not {keep}")
    for path in _by_iteration(directory)[:-keep]:
        path.unlink(missing_ok=True)
    for path in Path(directory).glob("checkpoint_*.safetensors.tmp"):
        path.unlink(missing_ok=True)


def save(path: str | Path, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
    """Write `tensors` (any device, any strides) and `meta` to `path`, whole or not at all.

    `meta` is what JSON holds: a tuple comes back as a list, and keys as strings. Raises TypeError for a `meta` that is
    not JSON or a dtype that is not in the table above, before anything is written; OSError if the disk refuses.
    """
    # Widest dtype first: every tensor then begins at a multiple of its item size, and can be mapped in place.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    for name, tensor in ordered:
        if name == "__metadata__":
            raise ValueError("no tensor may be named __metadata__: safetensors keeps that name for itself")
        if tensor.dtype not in _NAMES:
            raise TypeError(f"tensor {name}: a checkpoint cannot hold {tensor.dtype}")
    sums = dict.fromkeys(tensors, 0)
    header = _header(ordered, meta, sums)
    with replacing(path) as file:
        file.write(header)
        for name, tensor in ordered:
            data = _bytes_of(tensor)
            for start in range(0, len(data), _CHUNK):
                chunk = data[start : start + _CHUNK]
                sums[name] = zlib.crc32(chunk, sums[name])
                file.write(chunk)
        file.seek(0)
        file.write(_header(ordered, meta, sums))  # the same length: a sum is always eight digits


def load(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a checkpoint into (tensors, meta), on the CPU, after comparing every checksum.

    The tensors are private, writable views of the mapped file, so that loading copies nothing: copy them to where they
    live. They stay valid if the file is replaced or deleted. Raises CheckpointError.
    """
    path = Path(path)
    way_out = "resume from another checkpoint"
    try:
        return _load(path)
    except FileNotFoundError:
        problem = "does not exist"
    except OSError as error:
        problem = f"cannot be read ({error.strerror or error})"
    except _Damage as error:
        problem = f"is damaged ({error})"
        way_out = "delete it to resume from the one before"
    except _OtherVersion as error:
        problem = f"has checkpoint format {error}, and this speedyzero reads {FORMAT}"
        way_out = "resume with the speedyzero that wrote it"
    raise CheckpointError(f"{path} {problem}; {way_out} or start anew with another --run-dir")


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends well, and vanishes when it does not.

    After it, the new contents are on the disk under that name; before it, the old ones are: never a mixture.
    """
    path = Path(path)
    aside = path.with_name(path.name + ".tmp")
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


class _Damage(Exception):
    """What is wrong with the contents of a file."""


class _OtherVersion(Exception):
    """The version of an undamaged file that we cannot read."""


def _by_iteration(directory: str | Path) -> list[Path]:
    """The checkpoints in `directory`, oldest first."""
    found = []
    for path in Path(directory).glob("checkpoint_*.safetensors"):
        if match := _FILE.fullmatch(path.name):
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes in row-major order; a view of its memory where it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def _header(ordered: list[tuple[str, torch.Tensor]], meta: Mapping[str, Any], sums: Mapping[str, int]) -> bytes:
    """Length and JSON header of a file with these tensors, padded so that the data begins at a multiple of 8."""
    metadata = {
        "header_crc32": "00000000",
        "format": str(FORMAT),
        "crc32": json.dumps({name: f"{value:08x}" for name, value in sums.items()}),
        "meta": json.dumps(meta),
    }
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    rest = text[_PREFIX_BYTES:]
    return len(text).to_bytes(8, "little") + _PREFIX % zlib.crc32(rest) + rest


def _load(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        header_bytes = int.from_bytes(file.read(8), "little")
        if size < 8 or header_bytes > size - 8:
            raise _Damage("cut short, or not a safetensors file")
        text = file.read(header_bytes)
    prefix, rest = text[:_PREFIX_BYTES], text[_PREFIX_BYTES:]
    if not prefix.startswith(_PREFIX[: _PREFIX.index(b"%")]):
        raise _Damage("its header is not that of a speedyzero checkpoint")
    if prefix != _PREFIX % zlib.crc32(rest):
        raise _Damage("header: checksum differs")

    # The checksum holds: from here on the header is what `save` wrote.
    header = json.loads(text)
    metadata = header.pop("__metadata__")
    if metadata["format"] != str(FORMAT):
        raise _OtherVersion(metadata["format"])
    data_start = 8 + header_bytes
    expected = data_start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != expected:
        raise _Damage(f"{size} bytes long, not {expected}")
    sums = json.loads(metadata["crc32"])
    data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    tensors = {}
    for name in sums:  # in the order in which they were given to `save`
        entry = header[name]
        start, end = entry["data_offsets"]
        raw = data[data_start + start : data_start + end]
        if f"{zlib.crc32(memoryview(raw.numpy())):08x}" != sums[name]:
            raise _Damage(f"tensor {name}: checksum differs")
        tensors[name] = raw.view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors, json.loads(metadata["meta"])
