"""What a file of records lives through, seen in both files of a run: a full disk, a deleted directory, a hand that put another in place."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.run.log_support import clock_of, event_files, file_size_limit, iterations, said
from tests.run.test_log import a_row, curve, run_log


@pytest.fixture
def clock(monkeypatch):
    return clock_of(monkeypatch)


# A full disk


def test_on_a_full_disk_rows_are_lost_with_one_line_and_the_run_goes_on(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with run_log(tmp_path) as log:
        for iteration in (1, 2, 3):
            log.row(a_row(iteration))
    assert said(capsys, "rows are") == ["metrics.jsonl: rows are being lost (No space left on device); make room"]
    assert curve(tmp_path, "updates") == [(1, 4.0), (2, 8.0), (3, 12.0)]


def test_rows_that_do_not_fit_are_lost_whole_in_both_files_and_counted_when_there_is_room_again(tmp_path, capsys):
    with run_log(tmp_path) as log:
        log.row(a_row(1))
        sizes = [path.stat().st_size for path in (tmp_path / "metrics.jsonl", *event_files(tmp_path))]
        with file_size_limit(min(sizes) + 20):
            log.row(a_row(2))
            log.row(a_row(3))
            assert iterations(tmp_path) == [1]
            assert [path.stat().st_size for path in (tmp_path / "metrics.jsonl", *event_files(tmp_path))] == sizes
        log.row(a_row(4))
        log.row(a_row(5))
    assert said(capsys, "rows are") == [
        "metrics.jsonl: rows are being lost (File too large)",
        "tensorboard: rows are being lost (File too large)",
        "metrics.jsonl: rows are written again; 2 were lost",
        "tensorboard: rows are written again; 2 were lost",
    ]
    assert iterations(tmp_path) == [1, 4, 5]
    assert curve(tmp_path, "updates") == [(1, 4.0), (4, 16.0), (5, 20.0)]


def test_a_fault_is_said_after_the_row_that_met_it(tmp_path, clock, capsys):
    with run_log(tmp_path) as log:
        log.row(a_row(1))
        with file_size_limit(1):
            log.row(a_row(2))
    lines = [text.split("  ")[0] for text in capsys.readouterr().out.splitlines()]
    assert lines == [
        "env_steps 8/20000",
        "env_steps 16/20000",
        "metrics.jsonl: rows are being lost (File too large)",
        "tensorboard: rows are being lost (File too large)",
    ]


def test_every_time_the_disk_fills_it_is_said_again(tmp_path, capsys):
    with run_log(tmp_path) as log:
        for iteration in (1, 3):
            with file_size_limit(1):
                log.row(a_row(iteration))
            log.row(a_row(iteration + 1))
    out = capsys.readouterr().out
    assert out.count("metrics.jsonl: rows are being lost") == 2
    assert out.count("metrics.jsonl: rows are written again; 1 was lost") == 2
    assert iterations(tmp_path) == [2, 4]


@pytest.mark.parametrize("forever", [False, True])
def test_half_a_row_that_cannot_be_taken_back_at_once_spoils_no_other(tmp_path, monkeypatch, forever):
    def refuse(*_):
        raise OSError(errno.EIO, "Input/output error")

    with run_log(tmp_path) as log:
        log.row(a_row(1))
        (events,) = event_files(tmp_path)
        before = events.stat().st_size
        with monkeypatch.context() as patch:
            patch.setattr(os, "ftruncate", refuse)
            with file_size_limit(min((tmp_path / "metrics.jsonl").stat().st_size, before) + 20):
                log.row(a_row(2))
            assert not (tmp_path / "metrics.jsonl").read_bytes().endswith(b"\n")  # it was torn indeed
            if forever:
                log.row(a_row(3))
        log.row(a_row(4))
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    whole = [line for line in lines if line.endswith(b"}")]
    assert [json.loads(line)["iteration"] for line in whole] == ([1, 3, 4] if forever else [1, 4])
    assert len(lines) - len(whole) == forever
    assert [step for step, _ in curve(tmp_path, "updates")] == [1, 4]
    with run_log(tmp_path, resume_at=9):
        assert iterations(tmp_path) == ([1, 3, 4] if forever else [1, 4])


TINY_DISK = """
import pathlib, shutil, sys
from tests.run.test_log import a_row, run_log
run_dir = pathlib.Path(sys.argv[1])
ballast = run_dir / "ballast"
with run_log(run_dir) as log:
    for iteration in range(1, 6):
        log.row(a_row(iteration, text=1 / 3))
    with open(ballast, "wb", buffering=0) as file:
        try:
            while file.write(bytes(512)):
                pass
        except OSError as error:
            assert error.errno == 28
    for iteration in range(6, 200):
        log.row(a_row(iteration, text=1 / 3))
    ballast.unlink()
    for iteration in range(200, 206):
        log.row(a_row(iteration, text=1 / 3))
shutil.copytree(run_dir, sys.argv[2])
"""


def test_a_disk_that_really_fills_and_is_emptied_again(tmp_path):
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=64k none {disk}"
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("a disk cannot be mounted here")
    program = ["unshare", "-rm", "sh", "-c", f'{mount} && exec "{sys.executable}" -c "$0" {disk} {copy}', TINY_DISK]
    done = subprocess.run(program, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = [line for line in done.stdout.splitlines() if "rows are" in line]
    got = iterations(copy)
    lost = 205 - len(got)
    assert 100 < lost < 200
    assert lines[0].startswith("metrics.jsonl: rows are being lost (No space left on device); make room")
    assert f"metrics.jsonl: rows are written again; {lost} were lost" in lines
    assert len(lines) == 4
    assert got == list(range(1, 6 + len(got) - 11)) + list(range(200, 206))
    steps = [step for step, _ in curve(copy, "updates")]
    assert steps[:5] == [1, 2, 3, 4, 5]
    assert steps[-6:] == list(range(200, 206))
    assert f"tensorboard: rows are written again; {205 - len(steps)} were lost" in lines


def test_a_run_directory_that_cannot_be_written_is_refused_at_the_start_by_name(tmp_path):
    with file_size_limit(1), pytest.raises(OSError, match="File too large") as raised:
        run_log(tmp_path)
    assert str(tmp_path / "tensorboard") in raised.value.filename
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "tensorboard").write_text("a file where the directory should be")
    with pytest.raises(OSError, match="tensorboard"):
        run_log(tmp_path / "a")


# A deleted directory


@pytest.mark.parametrize("resume_at", [None, 0])
@pytest.mark.parametrize("moved", [False, True])
def test_after_the_run_directory_is_deleted_or_moved_the_logs_start_anew_there(tmp_path, capsys, moved, resume_at):
    run_dir, away = tmp_path / "a" / "run", tmp_path / "away"
    with run_log(run_dir, resume_at=resume_at) as log:
        log.row(a_row(1))
        if moved:
            run_dir.rename(away)
        else:
            shutil.rmtree(tmp_path / "a")
        log.row(a_row(2))
        log.row(a_row(3))
    assert said(capsys, "deleted") == [f"{run_dir} was deleted while running: logs start anew there"]
    assert iterations(run_dir) == [2, 3]
    assert curve(run_dir, "updates") == [(2, 8.0), (3, 12.0)]
    if moved:
        assert iterations(away) == [1]
        assert curve(away, "updates") == [(1, 4.0)]


def test_after_metrics_alone_are_deleted_they_start_anew_and_tensorboard_goes_on(tmp_path, capsys):
    with run_log(tmp_path) as log:
        log.row(a_row(1))
        (tmp_path / "metrics.jsonl").unlink()
        log.row(a_row(2))
    assert said(capsys, "deleted") == [f"{tmp_path}/metrics.jsonl was deleted while running: logs start anew there"]
    assert iterations(tmp_path) == [2]
    assert curve(tmp_path, "updates") == [(1, 4.0), (2, 8.0)]


def test_after_the_events_alone_are_deleted_they_start_anew_under_a_name_that_readers_have_not_seen(tmp_path, capsys):
    with run_log(tmp_path) as log:
        log.row(a_row(1))
        (first,) = event_files(tmp_path)
        (tmp_path / "tensorboard" / "events.out.tfevents.3000000000.elsewhere").touch()
        first.unlink()
        log.row(a_row(2))
    assert said(capsys, "deleted") == [f"{first} was deleted while running: logs start anew there"]
    assert iterations(tmp_path) == [1, 2]
    assert curve(tmp_path, "updates") == [(2, 8.0)]
    assert event_files(tmp_path)[-1].name.startswith("events.out.tfevents.3000000001.")


def test_a_file_that_an_editor_put_in_place_is_added_to_on_a_line_of_its_own(tmp_path):
    with run_log(tmp_path) as log:
        log.row(a_row(1))
        (tmp_path / "edited").write_text(json.dumps(a_row(7)))  # without a newline
        (tmp_path / "edited").rename(tmp_path / "metrics.jsonl")
        log.row(a_row(2))
    assert iterations(tmp_path) == [7, 2]


def test_a_file_that_was_emptied_is_added_to_from_its_beginning(tmp_path, capsys):
    with run_log(tmp_path) as log:
        log.row(a_row(1))
        for path in (tmp_path / "metrics.jsonl", *event_files(tmp_path)):
            os.truncate(path, 0)
        log.row(a_row(2))
    assert iterations(tmp_path) == [2]
    assert curve(tmp_path, "updates") == [(2, 8.0)]
    assert said(capsys, "deleted") == []


def test_while_the_directory_cannot_be_made_anew_rows_are_lost_and_then_it_is_said_that_they_start_anew(tmp_path, capsys):
    run_dir = tmp_path / "run"
    with run_log(run_dir) as log:
        log.row(a_row(1))
        shutil.rmtree(run_dir)
        run_dir.write_text("in the way")
        log.row(a_row(2))
        log.row(a_row(3))
        assert len(said(capsys, "deleted")) == 0
        run_dir.unlink()
        log.row(a_row(4))
    assert said(capsys, "run") == [
        f"{run_dir} was deleted while running: logs start anew there",
    ]
    assert iterations(run_dir) == [4]
    assert curve(run_dir, "updates") == [(4, 16.0)]


def test_half_a_row_in_a_deleted_file_costs_its_successor_nothing(tmp_path, monkeypatch):
    with run_log(tmp_path) as log:
        with monkeypatch.context() as patch, file_size_limit(20):
            patch.setattr(os, "ftruncate", lambda *_: os.close(-1))  # fails
            log.row(a_row(1))
        (tmp_path / "new").write_text("".join(json.dumps(a_row(n)) + "\n" for n in range(2, 5)))
        (tmp_path / "new").rename(tmp_path / "metrics.jsonl")
        log.row(a_row(5))
    assert iterations(tmp_path) == [2, 3, 4, 5]
