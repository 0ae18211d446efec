"""The header of a checkpoint, written by hand with a good checksum: what `save` does not write is damage, told in one line."""

import json
import os
import zlib
from pathlib import Path

import pytest
import torch

from speedyzero.run import checkpoint
from speedyzero.run.checkpoint import CheckpointError, DamagedError
from tests.run.bad_files_support import in_time as in_time
from tests.run.bad_files_support import odd_id, refused


def with_header(path: Path, change, sums: dict | None = None) -> None:
    """A checkpoint of one float32 tensor, its header changed by `change(header)` and summed anew, by the format's description alone."""
    data = bytes(24)
    metadata = {"header_crc32": "00000000", "format": "2", "crc32": json.dumps(sums or {"a": f"{zlib.crc32(data):08x}"}), "meta": "{}"}
    header = {"__metadata__": metadata, "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = len('{"__metadata__":{"header_crc32":"')
    text = text[:begin] + b"%08x" % zlib.crc32(text[begin + 9 :]) + text[begin + 8 :]
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    "entry",
    [
        {"data_offsets": [0.0, 24.0]}, {"data_offsets": [0, 24.0]}, {"data_offsets": [False, 24]}, {"shape": [2.0, 3]},
        {"shape": [True, 6]}, {"shape": [-2, -3]}, {"shape": [6], "data_offsets": [8, 32]}, {"shape": "23"}, {"dtype": ["F32"]},
        {"shape": [1] * 65 + [6]}, {"dtype": "x" * 10**5},
    ],
    ids=odd_id,
)  # fmt: skip
def test_an_entry_that_is_not_what_save_writes_is_damage(tmp_path, entry):
    path = tmp_path / "c.safetensors"
    with_header(path, lambda header: None)
    assert checkpoint.load(path)[0]["a"].shape == (2, 3)
    with_header(path, lambda header: header["a"].update(entry))
    refused(DamagedError, checkpoint.load, path)
    refused(DamagedError, checkpoint.read_meta, path)


@pytest.mark.parametrize("shape", [[0, 2**47, 2**47], [2**47, 2**47, 0], [0] * 2 + [2**40] * 3, [0, 2**48], [0, 2**400]])
def test_an_empty_tensor_with_sides_beyond_all_strides_is_damage(tmp_path, shape):
    path, sums = tmp_path / "c.safetensors", {"a": f"{zlib.crc32(bytes(24)):08x}", "e": "00000000"}
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [24, 24]}
    with_header(path, lambda header: header.update(e=entry), sums)
    assert "tensor e: impossible shape or place" in refused(DamagedError, checkpoint.load, path)
    with_header(path, lambda header: header.update(e=entry | {"shape": [0, 2**47]}), sums)
    assert checkpoint.load(path)[0]["e"].shape == (0, 2**47)


@pytest.mark.parametrize("name", ["two\nlines", "\ud800", "\x1b[2J", "x" * 10**6, ""], ids=odd_id)
def test_whatever_a_tensor_is_called_the_refusal_is_one_line(tmp_path, name):
    path = tmp_path / "c.safetensors"
    with_header(path, lambda header: header.update({name: header.pop("a")}), {name: "12345678"})
    refused(DamagedError, checkpoint.load, path)
    with_header(path, lambda header: header.update({name: header.pop("a") | {"shape": [7]}}), {name: "12345678"})
    refused(DamagedError, checkpoint.load, path)
    with_header(path, lambda header: header["__metadata__"].update(format=name))
    assert "has checkpoint format" in refused(CheckpointError, checkpoint.load, path)


def test_a_checkpoint_larger_than_the_memory_is_refused_in_one_line(tmp_path):
    """A file that takes no room on the disk: its end is all zeros."""
    path, size = tmp_path / "c.safetensors", 2**43
    entry = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    with_header(path, lambda header: header.update(a=entry))
    os.truncate(path, path.stat().st_size - 24 + size)
    assert "cannot be read (Cannot allocate memory)" in refused(CheckpointError, checkpoint.load, path)


def test_a_header_holds_the_frames_of_the_most_lanes_and_nothing_much_longer_is_written_or_read(tmp_path):
    piece = {f"lane_{lane:05d}": torch.empty(1, dtype=torch.uint8).expand(10**7) for lane in range(65_536)}
    assert len(checkpoint._header(list(piece.items()), {}, dict.fromkeys(piece, 0))) < checkpoint._MOST_HEADER
    path = tmp_path / "c.safetensors"
    checkpoint.save(path, {}, {"x": "x" * (checkpoint._MOST_HEADER - 1000)})
    assert len(checkpoint.load(path)[1]["x"]) == checkpoint._MOST_HEADER - 1000
    before = path.read_bytes()
    with pytest.raises(ValueError, match="0 tensors and their meta make a header of 838"):
        checkpoint.save(path, {}, {"x": "x" * checkpoint._MOST_HEADER})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["c.safetensors"]
