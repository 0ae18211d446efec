"""Pieces of frames with good checksums that no store has written: refused in one line, and the frames come from the replay."""

import zlib

import pytest
import torch

from speedyzero.envs import describe
from speedyzero.loop import Trainer
from speedyzero.run.checkpoint import CheckpointError
from speedyzero.run.frames import FrameStore
from tests.run.bad_files_support import CPU, refused, resume, taking_less_than
from tests.run.bad_files_support import in_time as in_time
from tests.run.bad_files_support import run as run
from tests.run.bad_files_support import runs as runs


def packed(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(zlib.compress(data)), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda streams, meta, data: streams.update(lane_00001=packed(data)[:-4]), "lane_00001 does not unpack to 4800 bytes"),
        (lambda streams, meta, data: streams.update(lane_00001=torch.cat((packed(data), packed(data)))), "lane_00001 does not unpack"),
        (lambda streams, meta, data: streams.update(lane_00001=packed(data)[None]), "lane_00001 does not unpack"),
        (lambda streams, meta, data: streams.update(lane_00001=packed(data).view(torch.int8)), "lane_00001 does not unpack"),
        (lambda streams, meta, data: streams.update(lane_00009=streams.pop("lane_00001")), "holds frames of another run"),
        (lambda streams, meta, data: streams.update({"a\nb": streams.pop("lane_00001")}), "holds frames of another run"),
        (lambda streams, meta, data: meta.update(first=True), "holds frames of another run"),
    ],
)  # fmt: skip
def test_a_stream_that_the_store_would_not_write_is_refused(run, change, says):
    streams, meta = run.held("frames")
    into = torch.zeros(4, 24, 1, 10, 5)
    store = FrameStore(run.checkpoints / "frames")
    store.read(into, 25)
    change(streams, meta, zlib.decompress(streams["lane_00001"].numpy().tobytes()))
    run.paths["frames"].write_bytes(run.saved(streams, meta))
    assert says in refused(CheckpointError, store.read, into, 25)


def test_sizes_of_frames_that_are_equal_as_fractions_are_sizes(run):
    """A JSON writer may make 10 of 10.0 and the other way round; nothing may fall over it."""
    streams, meta = run.held("frames")
    meta["shape"] = [4.0, meta["shape"][1], 1.0, 10.0, 5.0]
    run.paths["frames"].write_bytes(run.saved(streams, meta))
    into, good = torch.zeros(4, 24, 1, 10, 5), torch.zeros(4, 24, 1, 10, 5)
    FrameStore(run.checkpoints / "frames").read(into, 25)
    run.put("frames", None)
    FrameStore(run.checkpoints / "frames").read(good, 25)
    assert torch.equal(into, good)
    assert good.any()


def test_frames_with_a_bomb_in_them_come_from_the_replay(run):
    good = resume(run).state.ring.frames.clone()
    streams, meta = run.held("frames")
    run.paths["frames"].write_bytes(run.saved(dict.fromkeys(streams, packed(bytes(64 << 20))), meta))
    said = []
    trainer = Trainer(run.config, describe(run.config.env), CPU)
    with taking_less_than(32):
        trainer.load(run.paths["checkpoint"], FrameStore(run.checkpoints / "frames"), said.append)
    assert len(said) == 1
    assert said[0].endswith("the frames come from replaying the emulators")
    assert torch.equal(trainer.state.ring.frames, good)
    trainer.state.emulators.close()
