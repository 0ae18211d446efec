"""The ring's frames on the disk: what is read is what the ring held, each frame is written once, and nothing odd is believed."""

import pytest
import torch

from speedyzero.run import checkpoint, frames
from speedyzero.run.checkpoint import CheckpointError
from speedyzero.run.frames import FrameStore

LANES, LAP = 2, 10


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(frames, "PIECE", 4)


def frame(step: int, dtype=torch.uint8) -> torch.Tensor:
    """[L, C, H, W], different for every step and lane."""
    return (torch.arange(LANES * 6).view(LANES, 1, 2, 3) * 17 + step * 31).remainder(251).to(dtype)


class Filling:
    """A ring's frames as a run fills them."""

    def __init__(self, dtype=torch.uint8):
        self.frames = torch.zeros(LANES, LAP, 1, 2, 3, dtype=dtype)
        self.slots = 0

    def to(self, slots: int) -> "Filling":
        for step in range(self.slots, slots):
            self.frames[:, step % LAP] = frame(step, self.frames.dtype)
        self.slots = slots
        return self

    def save(self, store: FrameStore, ahead: int = 0) -> list[int]:
        """The numbers of the pieces that were written."""
        pieces = store.missing(self.frames, self.slots, ahead)
        for piece in pieces:
            store.write(piece)
        return [piece.number for piece in pieces]


def read(store: FrameStore, like: Filling, slots: int | None = None) -> torch.Tensor:
    into = torch.full_like(like.frames, 7)
    store.read(into, like.slots if slots is None else slots)
    return into


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("slots", [1, 4, 9, 10, 13, 29])
def test_what_is_read_is_what_the_ring_held(tmp_path, dtype, slots):
    ring = Filling(dtype).to(slots)
    ring.save(FrameStore(tmp_path))
    got = read(FrameStore(tmp_path), ring)
    filled = min(slots, LAP)
    assert torch.equal(got[:, :filled], ring.frames[:, :filled])
    assert (got[:, filled:] == 7).all()


def test_a_frame_is_written_once_but_for_the_newest_piece(tmp_path):
    store, ring = FrameStore(tmp_path), Filling()
    assert ring.to(3).save(store) == [0]
    assert ring.to(6).save(store) == [0, 1]
    assert ring.to(7).save(store) == [1]
    assert ring.to(8).save(store) == [1]
    assert ring.to(8).save(store) == []
    assert ring.to(15).save(store) == [2, 3]
    assert torch.equal(read(FrameStore(tmp_path), ring), ring.frames)


@pytest.mark.parametrize("slots", [3, 10, 13, 28])
@pytest.mark.parametrize("ahead", [0, 1, 4, 9])
def test_a_ring_that_goes_on_while_it_is_written_does_not_change_what_is_written(tmp_path, slots, ahead):
    store, ring = FrameStore(tmp_path), Filling().to(slots)
    then = ring.frames.clone()
    pieces = store.missing(ring.frames, slots, ahead)
    ring.to(slots + ahead)
    for piece in pieces:
        store.write(piece)
    filled = min(slots, LAP)
    assert torch.equal(read(FrameStore(tmp_path), ring, slots)[:, :filled], then[:, :filled])
    # What the ring does not come to meanwhile is not copied.
    for piece in pieces:
        views = all(part.data_ptr() in range(ring.frames.data_ptr(), ring.frames.data_ptr() + ring.frames.nbytes) for part in piece.parts)
        assert views == (piece.first + LAP >= slots + ahead)


def test_a_run_that_went_on_writes_only_what_is_new(tmp_path):
    ring = Filling().to(9)
    ring.save(FrameStore(tmp_path))
    again = FrameStore(tmp_path)
    assert torch.equal(read(again, ring)[:, :9], ring.frames[:, :9])
    assert ring.to(11).save(again) == [2]
    # One that read nothing trusts nothing, and one that reads forgets what was known before.
    assert ring.save(FrameStore(tmp_path)) == [0, 1, 2]
    again.complete.add(7)
    read(again, ring)
    assert again.complete == {0, 1}


def test_pieces_of_another_future_are_written_anew(tmp_path):
    """Went on from step 6, though the pieces know steps 6 to 9 of a run that was lost."""
    Filling().to(10).save(FrameStore(tmp_path))
    store, ring = FrameStore(tmp_path), Filling().to(6)
    store.read(ring.frames, 6)
    ring.frames[:, 6], ring.slots = 200, 7
    assert ring.save(store) == [1]
    assert torch.equal(read(FrameStore(tmp_path), ring)[:, :7], ring.frames[:, :7])


def changed(change):
    """The piece saved again, checksums and all, after `change(streams, meta)`."""

    def again(path):
        streams, meta = checkpoint.load(path)
        change(streams, meta)
        checkpoint.save(path, streams, meta)

    return again


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (changed(lambda streams, meta: streams.pop("lane_00000")), "holds frames of another run"),
        (changed(lambda streams, meta: meta.update(shape=[2, 4, 3, 2, 1])), "holds frames of another run"),
        (changed(lambda streams, meta: meta.update(dtype="torch.float32")), "holds frames of another run"),
        (changed(lambda streams, meta: meta.update(first=1)), "lacks frames of the steps 0 to 3"),
        (changed(lambda streams, meta: meta.clear()), "holds frames of another run"),
    ],
)
def test_a_piece_of_other_frames_is_refused(tmp_path, change, says):
    ring = Filling().to(9)
    ring.save(FrameStore(tmp_path))
    store = FrameStore(tmp_path)
    change(store.path_of(0))
    with pytest.raises(CheckpointError, match=says) as error:
        read(store, ring)
    assert str(store.path_of(0)) in str(error.value)
