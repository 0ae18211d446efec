"""Checkpoints in the background: what is written is the state of the moment of `save`, and what fails is told and loses nothing."""

import os
import threading

import pytest
import torch

from speedyzero.run import checkpoint, saver
from speedyzero.run.frames import FrameStore
from speedyzero.run.saver import BEST, Saver


def state(value: float = 0.0, slots: int = 3) -> tuple[dict[str, torch.Tensor], dict]:
    tensors = {
        "ring.frames": torch.full((2, 8, 1, 2, 2), value).byte(), "ring.value": torch.full((2, 8), value), "ring.head": torch.tensor(slots),
        "network.weight": torch.full((5,), value),
    }  # fmt: skip
    return tensors, {"slots": slots, "value": value}


@pytest.fixture
def make(tmp_path):
    """A function that makes a saver in tmp_path."""
    made = []

    def make(keep: int = 2, store: FrameStore | None = None) -> Saver:
        made.append(Saver(tmp_path, keep, store, 1))
        return made[-1]

    yield make
    for one in made:
        one.close()


class Gate:
    """Holds checkpoint.save back until opened."""

    def __init__(self, monkeypatch):
        self.entered, self.open = threading.Event(), threading.Event()
        save = checkpoint.save

        def held(*arguments):
            self.entered.set()
            assert self.open.wait(30)
            return save(*arguments)

        monkeypatch.setattr(checkpoint, "save", held)


def names(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_the_loop_goes_on_while_the_state_of_then_is_written(make, monkeypatch, tmp_path):
    gate, one = Gate(monkeypatch), make()
    tensors, meta = state(1.0)
    one.save(7, tensors, meta)
    assert gate.entered.wait(30)
    assert one.failure() is None
    for tensor in tensors.values():
        tensor.fill_(9)
    meta["value"] = 9.0
    gate.open.set()
    assert one.wait() is None
    saved, meta = checkpoint.load(checkpoint.path_of(tmp_path, 7))
    assert meta["value"] == 1.0
    assert saved["network.weight"].tolist() == [1.0] * 5
    assert saved["ring.value"].tolist() == [[1.0] * 3] * 2
    assert saved["ring.head"] == 3
    assert "ring.frames" not in saved


def test_the_next_save_waits_for_the_one_before_and_both_are_whole(make, tmp_path):
    one = make()
    for iteration in range(1, 6):
        one.save(iteration, *state(float(iteration)))
    assert one.wait() is None
    assert names(tmp_path) == [checkpoint.path_of(tmp_path, i).name for i in (4, 5)]  # as many as are kept
    for iteration in (4, 5):
        assert checkpoint.load(checkpoint.path_of(tmp_path, iteration))[0]["network.weight"].tolist() == [iteration] * 5


def test_the_best_outlives_the_checkpoint_that_it_was(make, tmp_path):
    one = make(keep=1)
    for iteration in range(1, 5):
        one.save(iteration, *state(float(iteration)), best=iteration in (1, 2))
        one.wait()
    assert names(tmp_path) == [BEST, checkpoint.path_of(tmp_path, 4).name]
    assert checkpoint.load(tmp_path / BEST)[1]["value"] == 2.0


def test_where_there_are_no_links_the_best_is_a_copy(make, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    one = make(keep=1)
    one.save(1, *state(1.0), best=True)
    one.save(2, *state(2.0))
    assert one.wait() is None
    assert checkpoint.load(tmp_path / BEST)[1]["value"] == 1.0


def test_what_fails_is_told_once_and_the_checkpoint_before_stands(make, monkeypatch, tmp_path):
    one = make()
    one.save(1, *state(1.0))
    assert one.wait() is None
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        one.save(2, *state(2.0))
        assert one.wait().strerror == "No space left on device"
        assert one.wait() is None
        assert names(tmp_path) == [checkpoint.path_of(tmp_path, 1).name]
        # Nobody asked before the next one: its error is still told, and so is that of the next.
        one.save(3, *state(3.0))
        one.save(4, *state(4.0))
        assert one.wait().errno == 28
    one.save(5, *state(5.0))
    assert one.wait() is None
    assert names(tmp_path) == [checkpoint.path_of(tmp_path, i).name for i in (1, 5)]


def test_an_error_that_is_no_matter_of_the_disk_is_raised(make, monkeypatch):
    monkeypatch.setattr(checkpoint, "save", lambda *_: 1 / 0)
    one = make()
    one.save(1, *state())
    with pytest.raises(ZeroDivisionError):
        one.wait()


def test_frames_go_to_the_store_before_the_checkpoint_and_leave_it_with_the_last_that_needs_them(make, tmp_path, monkeypatch):
    monkeypatch.setattr("speedyzero.run.frames.PIECE", 4)
    store = FrameStore(tmp_path / "frames")
    one = make(keep=2, store=store)
    for iteration, slots in ((1, 3), (2, 9), (3, 13), (4, 25)):
        one.save(iteration, *state(float(iteration), slots))
        assert one.wait() is None
    # Of the two that are kept the older one had 13 slots in a ring of 8: it needs the steps from 5 on.
    assert sorted(piece for piece, _ in store.pieces()) == [1, 2, 3, 4, 5, 6]
    one.save(5, *state(5.0, 26))
    assert one.wait() is None
    assert sorted(piece for piece, _ in store.pieces()) == [4, 5, 6]

    with monkeypatch.context() as patch:
        patch.setattr(store, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        one.save(6, *state(6.0, 30))
        assert one.wait().errno == 28
    assert not checkpoint.path_of(tmp_path, 6).exists()
    one.save(7, *state(7.0, 30))
    assert one.wait() is None
    into = torch.zeros(2, 8, 1, 2, 2, dtype=torch.uint8)
    FrameStore(tmp_path / "frames").read(into, 30)


def test_copies_on_the_host_are_made_in_the_same_memory(make):
    one = make()
    one.save(1, *state())
    one.wait()
    before = {name: host.data_ptr() for name, host in one._host.items()}
    one.save(2, *state(2.0, 7))
    one.wait()
    assert {name: host.data_ptr() for name, host in one._host.items()} == before


def test_the_pause_is_that_of_the_copy_and_of_waiting_for_the_save_before(make, monkeypatch):
    gate, one, now = Gate(monkeypatch), make(), [100.0]
    monkeypatch.setattr(saver, "monotonic", lambda: now[0])
    one.save(1, *state())
    assert gate.entered.wait(30)
    assert one.pause == 0.0, "written beside the loop"
    settle = Saver.settle

    def settling(self):
        gate.open.set()
        settle(self)
        now[0] += 5

    monkeypatch.setattr(Saver, "settle", settling)
    one.save(2, *state())
    assert one.pause == 5.0
