"""The event files: which of them a resumed run deletes, what the others still show, and what damaged ones cost."""

import contextlib
import random
import tracemalloc
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch.utils.tensorboard import SummaryWriter

from speedyzero.run import events as events_module
from tests.run.log_support import event_files, file_size_limit, mutated
from tests.run.test_log import a_row, curve, run_log


def steps_in(path: Path) -> list[int]:
    """Of every event with metrics in a file, as TensorBoard's own reader has them."""
    return [event.step for event in EventFileLoader(str(path)).Load() if event.HasField("summary")]


def records_of(data: bytes) -> list[bytes]:
    """The framed events of a file."""
    records = []
    while data:
        size = 16 + int.from_bytes(data[:8], "little")
        records.append(data[:size])
        data = data[size:]
    return records


def test_whatever_accidents_befall_the_events_a_run_resumes_and_deletes_none_that_counts(tmp_path):
    with run_log(tmp_path / "whole") as log:
        for iteration in (3, 6, 9):
            log.row(a_row(iteration))
    (whole,) = event_files(tmp_path / "whole")
    records = records_of(whole.read_bytes())
    assert len(records) == 4
    chance = random.Random(1)
    fates = {(kept, exists): 0 for kept in (False, True) for exists in (False, True)}
    for case in range(200):
        board = tmp_path / str(case) / "tensorboard"
        board.mkdir(parents=True)
        path = board / whole.name
        data = b"".join(chance.choices(records, k=chance.randint(0, 4)))
        path.write_bytes(mutated(data, chance) if case % 2 else data)
        resume_at = chance.choice([2, 3, 7])
        kept = any(step <= resume_at for step in steps_in(path))
        with run_log(tmp_path / str(case), resume_at=resume_at):
            pass
        fates[kept, path.exists()] += 1
    assert fates[True, False] == 0
    assert min(fates[False, False], fates[False, True], fates[True, True]) > 20


@pytest.mark.parametrize("later", [1.7e9 - 7200, 1.7e9, 1.7e9 + 0.4, -5.0])
def test_a_run_resumed_after_the_clock_was_set_back_still_supersedes_what_came_after_its_checkpoint(tmp_path, monkeypatch, later):
    for resume_at, now, value in ((None, 1.7e9, 1.0), (2, later, 2.0), (3, later, 3.0)):
        monkeypatch.setattr(events_module, "time", lambda: now)  # noqa: B023
        with run_log(tmp_path, resume_at=resume_at) as log:
            for iteration in range((resume_at or 0) + 1, 6):
                log.row(a_row(iteration, x=value))
    assert curve(tmp_path, "x") == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 3.0), (5, 3.0)]
    assert len(event_files(tmp_path)) == 3


@pytest.mark.parametrize("rows_in_vain", [0, 3])
def test_thirty_resumes_without_progress_leave_two_event_files(tmp_path, rows_in_vain):
    with run_log(tmp_path) as log:
        for iteration in range(1, 8):
            log.row(a_row(iteration, x=0.0))
    for life in range(1, 31):
        with run_log(tmp_path, resume_at=5) as log:
            for iteration in range(6, 6 + rows_in_vain):
                log.row(a_row(iteration, x=float(life)))
        assert len(event_files(tmp_path)) == 2
    assert curve(tmp_path, "x") == [(n, 0.0) for n in range(1, 6)] + [(n, 30.0) for n in range(6, 6 + rows_in_vain)]


def test_a_run_that_is_killed_again_and_again_before_its_first_checkpoint_leaves_one_event_file(tmp_path):
    with run_log(tmp_path) as log:
        log.row(a_row(1))
    for _ in range(30):
        with run_log(tmp_path, resume_at=0) as log:
            log.row(a_row(1))
            log.row(a_row(2))
        assert len(event_files(tmp_path)) == 1
    assert curve(tmp_path, "updates") == [(1, 4.0), (2, 8.0)]


def test_every_life_that_got_on_keeps_its_events(tmp_path):
    at = 0
    for life in range(12):
        with run_log(tmp_path, resume_at=at if life else None) as log:
            for iteration in range(at + 1, at + 5):
                log.row(a_row(iteration, x=float(life)))
        at += life % 3
    # Lives 0, 3, 6, 9 were lost whole; the others kept one or two rows, the last all four.
    assert curve(tmp_path, "x") == [
        *[(n + 1, float(life)) for n, life in enumerate([1, 2, 2, 4, 5, 5, 7, 8, 8, 10])], (11, 11.0), (12, 11.0), (13, 11.0), (14, 11.0)
    ]  # fmt: skip
    assert [sorted(set(steps_in(path)))[0] for path in event_files(tmp_path)] == [1, 2, 4, 5, 7, 8, 10, 11]


def test_what_a_deleted_event_file_hid_stays_hidden(tmp_path):
    with run_log(tmp_path) as log:  # its checkpoint: 10
        for iteration in (5, 10, 15, 17):
            log.row(a_row(iteration))
    with run_log(tmp_path, resume_at=10):  # it saved at 20 and was killed before it logged a row
        pass
    with run_log(tmp_path, resume_at=20) as log:
        log.row(a_row(25))
    assert [step for step, _ in curve(tmp_path, "updates")] == [5, 10, 25]
    assert len(event_files(tmp_path)) == 2


def test_no_event_file_is_deleted_before_there_is_one_in_its_place(tmp_path):
    with run_log(tmp_path) as log:
        log.row(a_row(9))
    before = event_files(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    with file_size_limit(1), pytest.raises(OSError, match="File too large"):
        run_log(tmp_path, resume_at=5)
    assert set(before) <= set(event_files(tmp_path))


def test_files_of_older_writers_and_of_others_are_treated_alike(tmp_path):
    board = tmp_path / "tensorboard"
    for steps in ([1, 2, 3], [], [7, 8]):
        with contextlib.closing(SummaryWriter(str(board), purge_step=3, filename_suffix=f".{len(steps)}")) as writer:
            for step in steps:
                writer.add_scalar("updates", 4.0 * step, step)
    (board / "events.out.tfevents.4000000000.empty").touch()
    (board / "events.out.tfevents.4000000001.folder").mkdir()
    (board / "notes.txt").write_text("mine")
    with run_log(tmp_path, resume_at=2):
        names = [path.name for path in event_files(tmp_path)]
    assert "notes.txt" in names
    assert "events.out.tfevents.4000000001.folder" in names  # it cannot be read: nothing before it is judged
    assert "events.out.tfevents.4000000000.empty" in names
    (board / "events.out.tfevents.4000000001.folder").rmdir()
    with run_log(tmp_path, resume_at=2):
        names = [path.name for path in event_files(tmp_path)]
    assert len([name for name in names if "tfevents" in name]) == 2
    assert any(name.endswith(".3") for name in names)


def test_a_damaged_event_file_is_never_deleted(tmp_path):
    with run_log(tmp_path) as log:
        log.row(a_row(9))
    (path,) = event_files(tmp_path)
    whole = path.read_bytes()
    at = whole.index(b"env_steps")
    other_length, other_checksum = b"\1" + whole[1:], whole[:8] + bytes([whole[8] ^ 1]) + whole[9:]
    other_text = whole[:at] + b"E" + whole[at + 1 :]
    for damaged in (whole[:-1], other_length, other_checksum, other_text, whole + b"\0" * 12, whole + b"\0", b"x"):
        path.write_bytes(damaged)
        with run_log(tmp_path, resume_at=5):
            pass
        assert path.read_bytes() == damaged
    path.write_bytes(whole)
    with run_log(tmp_path, resume_at=5):
        pass
    assert not path.exists()


def test_a_length_that_lies_takes_no_memory(tmp_path):
    board = tmp_path / "tensorboard"
    board.mkdir()
    length = (1 << 40).to_bytes(8, "little")
    path = board / "events.out.tfevents.1000000000.x"
    path.write_bytes(length + events_module.masked_crc32c(length).to_bytes(4, "little") + b"x")
    tracemalloc.start()
    with run_log(tmp_path, resume_at=5):
        peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20
    assert path.exists()
