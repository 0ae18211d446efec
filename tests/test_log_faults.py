"""What a run's logs live through: a full disk, a deleted directory, damaged files, a clock that jumps, a terminal that is gone."""

import contextlib
import errno
import io
import json
import math
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch.utils.tensorboard import SummaryWriter

import speedyzero.log as log_module
from speedyzero import events as events_module
from speedyzero.log import write_json
from tests.test_log import Clock, a_row, curve, rows_of, run_log


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(log_module, "monotonic", clock)
    return clock


@contextlib.contextmanager
def file_size_limit(size: int):
    """No file of this process can grow beyond `size` bytes: the part of a write that fits is written, then EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def iterations(run_dir: Path) -> list[int]:
    return [row["iteration"] for row in rows_of(run_dir)]


def event_files(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "tensorboard").iterdir())


def steps_in(path: Path) -> list[int]:
    """Of every event with metrics in a file, as TensorBoard's own reader has them."""
    return [event.step for event in EventFileLoader(str(path)).Load() if event.HasField("summary")]


def said(capsys, word: str) -> list[str]:
    return [text for text in capsys.readouterr().out.splitlines() if word in text]


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
from tests.test_log import a_row, run_log
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
    done = subprocess.run(program, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
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


def test_json_that_does_not_fit_leaves_the_old_file_and_names_it(tmp_path):
    path = tmp_path / "eval.json"
    write_json(path, {"mean": 1.0})
    (tmp_path / "eval.json.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as raised:
        write_json(path, {"mean": 2.0})
    assert raised.value.filename == str(path)
    assert json.loads(path.read_text()) == {"mean": 1.0}
    assert not (tmp_path / "eval.json.tmp").exists()


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


# Damaged files


def good(iteration: int, wall_s: float) -> bytes:
    return json.dumps(a_row(iteration, wall_s=wall_s)).encode() + b"\n"


def with_value(key: str, text: str) -> bytes:
    """A row of iteration 3 in which `key` is, literally, `text`."""
    fields = {"env_steps": "24", "updates": "12", "iteration": "3", "wall_s": "30.0", key: text}
    return ("{" + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}\n").encode()


ODD = ["-1", "NaN", "Infinity", "-Infinity", "1e400", '"12"', "true", "null", "[1]", "{}", "1" * 5000, "", "0x10"]

BAD_LINES = {
    "binary": bytes(set(range(256)) - {10}) + b"\n",
    "nul": bytes(4096) + b"\n",
    "not utf-8": good(3, 30)[:-2] + b', "x": "\xff"}\n',
    "utf-16": json.dumps(a_row(3, wall_s=30)).encode("utf-16-le").replace(b"\n", b"") + b"\n",
    "byte order mark": b"\xef\xbb\xbf" + good(3, 30),
    "two rows on a line": good(3, 30)[:-1] + good(4, 40),
    "empty": b"\n",
    "number": b"3\n",
    "string": b'"iteration"\n',
    "list": b"[3]\n",
    "list of a row": b"[" + good(3, 30)[:-1] + b"]\n",
    "null": b"null\n",
    "bomb": b"[" * 100_000 + b"\n",
    "bomb of objects": b'{"a":' * 100_000 + b"\n",
    "bomb in a row": good(3, 30)[:-2] + b', "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
    "repeated": good(2, 25),
    "too long": good(3, 30)[:-2] + b" " * log_module.LONGEST + b"}\n",
    "nan elsewhere": with_value("losses/loss", "NaN"),
    "wall_s missing": json.dumps(a_row(3)).encode() + b"\n",
    "iteration missing": b'{"env_steps": 24, "updates": 12, "wall_s": 30}\n',
    "env_steps missing": b'{"updates": 12, "iteration": 3, "wall_s": 30}\n',
    **{f"wall_s {value[:9]}": with_value("wall_s", value) for value in [*ODD, "1e300", "9" * 400]},
    **{f"iteration {value[:9]}": with_value("iteration", value) for value in [*ODD, "3.0"]},
    **{f"updates {value[:9]}": with_value("updates", value) for value in [*ODD, "12.0", "9" * 400]},
}


@pytest.mark.parametrize("place", [1, 2])
@pytest.mark.parametrize("name", BAD_LINES)
def test_a_line_that_is_no_row_is_dropped_and_counted_and_the_clock_goes_on_from_the_last_row(tmp_path, clock, capsys, name, place):
    lines = [good(1, 10), good(2, 20.5)]
    lines.insert(place if name != "repeated" else 2, BAD_LINES[name])
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines))
    with run_log(tmp_path, resume_at=5) as log:
        assert log.wall_s == 20.5
        assert (tmp_path / "metrics.jsonl").read_bytes() == good(1, 10) + good(2, 20.5)
        clock.now += 1
        log.row(a_row(6))
    assert said(capsys, "dropped") == [f"{tmp_path}/metrics.jsonl: dropped 1 unreadable or repeated rows"]
    last = rows_of(tmp_path)[-1]
    assert (last["wall_s"], last["time/env_steps_per_s"]) == (21.5, 32.0)


def test_counts_that_were_too_high_make_no_eta_of_less_than_nothing(tmp_path, clock, capsys):
    (tmp_path / "metrics.jsonl").write_bytes(good(100, 10))
    with run_log(tmp_path, resume_at=100) as log:
        clock.now += 1
        log.row(a_row(2))
    assert rows_of(tmp_path)[-1]["time/eta_s"] is None
    assert "eta" not in capsys.readouterr().out


def test_a_row_of_a_later_iteration_however_late_is_dropped_without_a_word(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_bytes(good(1, 10) + good(6, 60) + with_value("iteration", "9" * 18) + good(2, 20))
    with run_log(tmp_path, resume_at=5):
        pass
    assert iterations(tmp_path) == [1, 2]
    assert capsys.readouterr().out == ""


def test_rows_out_of_order_are_kept_as_they_are(tmp_path):
    lines = good(2, 20) + good(1, 10) + good(3, 30)
    (tmp_path / "metrics.jsonl").write_bytes(lines)
    with run_log(tmp_path, resume_at=5):
        assert (tmp_path / "metrics.jsonl").read_bytes() == lines


@pytest.mark.parametrize(("size", "kept"), [(log_module.LONGEST - 1, True), (log_module.LONGEST, False), (log_module.LONGEST + 1, False)])
def test_a_row_is_kept_if_it_is_shorter_than_the_longest(tmp_path, size, kept):
    row = good(3, 30)
    row = row[:-2] + b" " * (size - len(row)) + row[-2:]
    assert len(row) == size
    (tmp_path / "metrics.jsonl").write_bytes(good(1, 10) + row + good(2, 20))
    with run_log(tmp_path, resume_at=5):
        assert iterations(tmp_path) == ([1, 3, 2] if kept else [1, 2])


@pytest.mark.parametrize("ends", [b"\n" + good(2, 20), b""])
def test_a_line_of_a_hundred_megabytes_takes_no_memory(tmp_path, capsys, ends):
    with open(tmp_path / "metrics.jsonl", "wb") as file:
        file.write(good(1, 10))
        for _ in range(100):
            file.write(b"[" * 1_000_000)
        file.write(ends)
    tracemalloc.start()
    with run_log(tmp_path, resume_at=5):
        peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20
    assert iterations(tmp_path) == ([1, 2] if ends else [1])
    assert len(said(capsys, "dropped 1 ")) == bool(ends)  # a torn last line is not worth one


def mutated(data: bytes, chance: random.Random) -> bytes:
    """`data` after one to four accidents."""
    for _ in range(chance.randint(1, 4)):
        kind = chance.randrange(8)
        at = chance.randrange(len(data) + 1)
        lines = data.splitlines(keepends=True)
        if kind == 0 and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at]
        elif kind == 2 and len(lines) > 1:
            i, j = chance.sample(range(len(lines)), 2)
            lines[i], lines[j] = lines[j], lines[i]
            data = b"".join(lines)
        elif kind == 3 and lines:
            lines.insert(chance.randrange(len(lines)), chance.choice(lines))
            data = b"".join(lines)
        elif kind == 4:
            data = data[:at] + chance.randbytes(chance.randint(1, 40)) + data[at:]
        elif kind == 5:
            words = [b"NaN", b"1e999", b"-", b'"', b"}\n{", b"\0" * 9, b"[" * 3000, b"true", b"9" * 30]
            data = data[:at] + chance.choice(words) + data[at:]
        elif kind == 6:
            data = data[:at] + data[at + chance.randint(1, 30) :]
        else:
            data = data[:at] + bytes(len(data[at : at + 64])) + data[at + 64 :]
    return data


def strict_rows(data: bytes) -> list[dict]:
    """The rows of a file of which every line must be one."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert data == b"" or data.endswith(b"\n")
    return [json.loads(line.decode("utf-8"), parse_constant=refuse) for line in data.split(b"\n")[:-1]]


def test_whatever_accidents_befall_metrics_a_run_resumes_on_the_rows_that_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # 800 of them take their time
    with run_log(tmp_path / "whole") as log:
        for iteration in range(5, 105, 5):
            log.row(a_row(iteration, **{"losses/value_loss": 1 / iteration, "charts/episodic_return": -21}))
    whole = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    originals = {line: json.loads(line)["iteration"] for line in whole.split(b"\n")[:-1]}
    chance = random.Random(0)
    unlike = 0
    for case in range(400):
        run_dir = tmp_path / str(case)
        run_dir.mkdir()
        data = mutated(whole, chance)
        (run_dir / "metrics.jsonl").write_bytes(data)
        resume_at = chance.choice([-1, 0, 40, 57, 100, 10**6])
        if data:
            with pytest.raises(FileExistsError, match="already holds a run"):
                run_log(run_dir)
            assert (run_dir / "metrics.jsonl").read_bytes() == data
        with run_log(run_dir, resume_at=resume_at) as log:
            kept = strict_rows((run_dir / "metrics.jsonl").read_bytes())
            assert all(type(row) is dict and type(row["iteration"]) is int and row["iteration"] <= resume_at for row in kept), case
            assert all(math.isfinite(row["wall_s"]) and row["wall_s"] >= 0 for row in kept), case
            kept_at = [row["iteration"] for row in kept]
            assert len(set(kept_at)) == len(kept_at), case
            survivors = {originals[line] for line in data.split(b"\n") if line in originals}
            assert {n for n in survivors if n <= resume_at} <= set(kept_at), case
            began = kept[-1]["wall_s"] if kept else 0
            assert 0 <= log.wall_s - began < 60, case
            log.row(a_row(10**7))
        after = strict_rows((run_dir / "metrics.jsonl").read_bytes())
        assert after[:-1] == kept, case
        assert after[-1]["iteration"] == 10**7, case
        unlike += kept_at != [n for n in originals.values() if n <= resume_at]
        shutil.rmtree(run_dir)
    assert unlike > 100  # the accidents were serious


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


# The clock


def test_jumps_of_the_time_of_day_change_no_row_and_break_nothing(tmp_path, clock, monkeypatch):
    rows = {}
    for name, jumps in (("steady", [0, 0, 0, 0, 0, 0]), ("jumping", [0, 7200, -9000, 10**8, -1.8e9, 0.5])):
        now = 1.7e9
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: now)  # noqa: B023 (the newest is what is wanted)
            patch.setattr(events_module, "time", lambda: now)  # noqa: B023
            with run_log(tmp_path / name) as log:
                for iteration, jump in enumerate(jumps, 1):
                    now += jump
                    clock.now += 10
                    log.row(a_row(iteration))
        rows[name] = rows_of(tmp_path / name)
    assert rows["jumping"] == rows["steady"]
    assert [row["wall_s"] for row in rows["jumping"]] == [10, 20, 30, 40, 50, 60]
    assert [step for step, _ in curve(tmp_path / "jumping", "updates")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("later", [1.7e9 - 7200, 1.7e9, 1.7e9 + 0.4, -5.0])
def test_a_run_resumed_after_the_clock_was_set_back_still_supersedes_what_came_after_its_checkpoint(tmp_path, monkeypatch, later):
    for resume_at, now, value in ((None, 1.7e9, 1.0), (2, later, 2.0), (3, later, 3.0)):
        monkeypatch.setattr(events_module, "time", lambda: now)  # noqa: B023
        with run_log(tmp_path, resume_at=resume_at) as log:
            for iteration in range((resume_at or 0) + 1, 6):
                log.row(a_row(iteration, x=value))
    assert curve(tmp_path, "x") == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 3.0), (5, 3.0)]
    assert len(event_files(tmp_path)) == 3


# Bounds


def test_a_row_costs_what_the_manual_says(tmp_path):
    others = {f"losses/metric_{n:02d}_loss": 0.1234567890123456 + n for n in range(21)}
    with run_log(tmp_path) as log:
        log.row(a_row(100_000, **others))
        before = [path.stat().st_size for path in (tmp_path / "metrics.jsonl", *event_files(tmp_path))]
        log.row(a_row(100_025, **others))
        after = [path.stat().st_size for path in (tmp_path / "metrics.jsonl", *event_files(tmp_path))]
    rows, events = (b - a for a, b in zip(before, after, strict=True))
    assert 800 < rows < 1200
    assert 500 < events < 900


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
    with run_log(tmp_path, resume_at=5):
        pass
    assert path.exists()


# Leaks, and the terminal


@pytest.mark.parametrize("live", [False, True])
def test_opening_and_closing_leaves_no_open_files_and_no_threads(tmp_path, capsys, live):
    def files() -> list[str]:
        return sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}"))

    before, threads = files(), set(threading.enumerate())
    for n in range(50):
        with run_log(tmp_path, resume_at=n, live=live) as log:
            log.row(a_row(n + 1))
            assert live or (files() == before and set(threading.enumerate()) == threads)
        with pytest.raises(FileExistsError):
            run_log(tmp_path)
    assert files() == before
    patience = time.monotonic() + 5  # the display's thread looks twice a second whether it shall end
    while set(threading.enumerate()) != threads and time.monotonic() < patience:
        time.sleep(0.05)
    assert set(threading.enumerate()) == threads


def full_disk():
    """A stream on a full disk, and nothing more to do to it."""
    return open("/dev/full", "wb", buffering=0), lambda: None


def pipe():
    """A stream into a pipe, and how to make its reader leave."""
    reader, writer = os.pipe()
    return open(writer, "wb", buffering=0), lambda: os.close(reader)


def terminal():
    """A stream to a terminal, and how to hang up."""
    theirs, mine = os.openpty()
    return open(mine, "wb", buffering=0), lambda: os.close(theirs)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("stream", [full_disk, pipe, terminal])
def test_a_terminal_that_takes_nothing_more_ends_nothing(tmp_path, clock, monkeypatch, stream, live, early):
    raw, leave = stream()
    out, err = io.TextIOWrapper(raw, write_through=True), sys.stderr
    monkeypatch.setattr(sys, "stdout", out)
    if early:
        leave()
    with run_log(tmp_path, live=live) as log:
        log.row(a_row(1))
        if not early:
            leave()
        for iteration in (2, 3):
            clock.now += 20
            log.row(a_row(iteration))
            log.message("checkpoint saved")
        if live and not early:
            time.sleep(0.7)  # until the display's own thread has tried
        log.row(a_row(4))
    assert sys.stdout is out
    assert sys.stderr is err
    assert iterations(tmp_path) == [1, 2, 3, 4]
    assert [step for step, _ in curve(tmp_path, "updates")] == [1, 2, 3, 4]
    with contextlib.suppress(OSError):
        out.close()
