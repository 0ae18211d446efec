"""Checkpoints: one safetensors file holds the whole state of a run, and a file that loads is the file that was saved.

The layout is safetensors' (8 bytes of header length, a JSON header, the tensors' bytes): any reader of it opens the
file. Every byte is covered by a CRC32: the header begins with one over the rest of the header, the metadata has one per
tensor. The writer is our own because one pass over the data is then enough: each tensor is brought to the host, summed
and written in turn, so that saving needs no second copy of anything large. Nothing is pickled, and nothing of a file is
believed before it is checked: checksums tell damage, and whatever a file with good checksums may claim is still bounded by its size.

    {"__metadata__": {"header_crc32": "0123abcd", "format": "2", "crc32": "{name: sum}", "meta": "{...}"},
     name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}
"""

import json
import math
import mmap
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from speedyzero.config import short_repr
from speedyzero.run.files import open_regular, replacing

FORMAT = 2
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
_MOST_HEADER = 8 << 20  # room for the frames of 65,536 lanes; JSON unfolds to twenty times its length in memory
_FILE = re.compile(r"checkpoint_(\d{9,})\.safetensors")


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another version; the message is one line that says what to do."""


class DamagedError(CheckpointError):
    """The contents of a checkpoint are not what was saved: the one before it may still be whole."""


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


def newest_whole(directory: str | Path, say: Callable[[str], None]) -> Path | None:
    """The checkpoint of the highest iteration that is whole, every byte of it compared; None if there is none at all.

    A damaged one is put aside, its name ending in .damaged, and `say` gets a line about it.

    Raises:
        CheckpointError: all are damaged (they keep their names), or the newest cannot be read or is of another version.
    """
    damaged: list[Path] = []
    for path in reversed(by_iteration(directory)):
        try:
            load(path)
        except DamagedError as error:
            say(f"{str(error).partition('; ')[0]}; trying the one before")
            damaged.append(path)
            continue
        for bad in damaged:
            bad.replace(bad.with_name(bad.name + ".damaged"))
        return path
    if damaged:
        raise DamagedError(f"{directory}: every checkpoint there is damaged; start anew with another --run-dir")
    return None


def prune(directory: str | Path, keep: int) -> None:
    """Delete all but the `keep` latest checkpoints, and what a killed save left behind. Call it after a save."""
    if keep < 1:
        raise ValueError(f"keep must be at least 1, not {keep}")
    for path in by_iteration(directory)[:-keep]:
        path.unlink(missing_ok=True)
    for path in Path(directory).glob("checkpoint_*.safetensors.tmp"):
        path.unlink(missing_ok=True)


def save(path: str | Path, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
    """Write `tensors` (any device, any strides) and `meta` to `path`, whole or not at all.

    `meta` is what JSON holds: a tuple comes back as a list, and keys as strings. Raises TypeError for a `meta` that is
    not JSON or a dtype that is not in the table above, ValueError for more of them than a header holds, before anything is written; OSError
    if the disk refuses.
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
    if len(header) > _MOST_HEADER:
        raise ValueError(f"{len(tensors)} tensors and their meta make a header of {len(header)} bytes, which nobody would read")
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


def differing(wanted: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> str | None:
    """The name of the first of `wanted` that `tensors` lacks or holds in another shape or dtype; None if there is none."""
    for name, mine in wanted.items():
        theirs = tensors.get(name)
        if theirs is None or (theirs.shape, theirs.dtype) != (mine.shape, mine.dtype):
            return name
    return None


def load(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a checkpoint into (tensors, meta), on the CPU, after comparing every checksum.

    The tensors are private, writable views of the mapped file, so that loading copies nothing: copy them to where they
    live. They stay valid if the file is replaced or deleted. Raises CheckpointError, DamagedError if the contents are at fault.
    """
    with _explained(Path(path)):
        return _load(Path(path))


def read_meta(path: str | Path) -> dict[str, Any]:
    """The `meta` of a checkpoint, of which nothing but the header is read. Raises as `load`."""
    with _explained(Path(path)), open_regular(path) as file:
        return _read_header(file)[2]


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """What goes wrong with a file, as one line."""
    way_out = "resume from another checkpoint"
    try:
        yield
        return
    except FileNotFoundError:
        problem = "does not exist"
    except OSError as error:
        problem = f"cannot be read ({error.strerror or error})"
    except _Damage as error:
        raise DamagedError(
            f"{path} is damaged ({error}); delete it to resume from the one before or start anew with another --run-dir"
        ) from None
    except _OtherVersion as error:
        problem = f"has checkpoint format {error}, and this speedyzero reads {FORMAT}"
        way_out = "resume with the speedyzero that wrote it"
    raise CheckpointError(f"{path} {problem}; {way_out} or start anew with another --run-dir")


class _Damage(Exception):
    """What is wrong with the contents of a file."""


class _OtherVersion(Exception):
    """The version of an undamaged file that we cannot read."""


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


def _read_header(file: BinaryIO) -> tuple[dict[str, Any], dict[str, str], dict[str, Any], int]:
    """The tensors' entries by name, their checksums, the meta, and where the data begins; checked, the file's length included."""
    size = os.fstat(file.fileno()).st_size
    header_bytes = int.from_bytes(file.read(8), "little")
    if size < 8 or header_bytes > size - 8:
        raise _Damage("cut short, or not a safetensors file")
    if header_bytes > _MOST_HEADER or header_bytes % 8:
        raise _Damage(f"a header of {header_bytes} bytes")
    text = file.read(header_bytes)
    prefix, rest = text[:_PREFIX_BYTES], text[_PREFIX_BYTES:]
    if not prefix.startswith(_PREFIX[: _PREFIX.index(b"%")]):
        raise _Damage("its header is not that of a speedyzero checkpoint")
    if prefix != _PREFIX % zlib.crc32(rest):
        raise _Damage("header: checksum differs")
    data_start = 8 + header_bytes
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__")
        if metadata["format"] != str(FORMAT):
            raise _OtherVersion(short_repr(metadata["format"]))
        sums, meta = json.loads(metadata["crc32"]), json.loads(metadata["meta"])
        expected = data_start + _check_layout(header)
        if not isinstance(meta, dict) or sums.keys() != header.keys():
            raise ValueError("meta is not an object" if sums.keys() == header.keys() else "not one checksum for every tensor")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _Damage(f"header: {type(error).__name__}: {ascii(str(error))[1:-1][:120]}") from None
    if size != expected:
        raise _Damage(f"{size} bytes long, not {expected}")
    return header, sums, meta, data_start


def _load(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    with open_regular(path) as file:
        header, sums, meta, data_start = _read_header(file)
        data = torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)
    tensors = {}
    for name in sums:  # in the order in which they were given to `save`
        entry = header[name]
        start, end = entry["data_offsets"]
        raw = data[data_start + start : data_start + end]
        if f"{zlib.crc32(memoryview(raw.numpy())):08x}" != sums[name]:
            raise _Damage(f"tensor {short_repr(name)}: checksum differs")
        if entry["dtype"] == "BOOL" and raw.numel() and raw.max() > 1:
            raise _Damage(f"tensor {short_repr(name)}: neither true nor false")
        tensors[name] = raw.view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors, meta


def _check_layout(entries: dict[str, Any]) -> int:
    """The bytes of the data, if the tensors lie in it one after the other, aligned, each as long as its shape says; else ValueError."""
    at = 0
    for name, entry in entries.items():
        shape, dtype = entry["shape"], _DTYPES[entry["dtype"]]
        whole = isinstance(shape, list) and len(shape) <= 64 and all(type(n) is int and n >= 0 for n in shape)
        # Empty sides count as 1: the strides of a tensor without elements must fit in int64 too.
        whole = whole and at % dtype.itemsize == 0 and math.prod(n or 1 for n in shape) < 2**48
        place = [at, at + math.prod(shape) * dtype.itemsize] if whole else []
        # 24.0 equals 24, and is no place.
        if not whole or entry["data_offsets"] != place or any(type(n) is not int for n in entry["data_offsets"]):
            raise ValueError(f"tensor {short_repr(name)}: impossible shape or place")
        at = place[1]
    return at
