"""The rows of `metrics.jsonl`: which of a damaged file a resumed run goes on from, what a clock that jumps does to them, their size."""

import json
import math
import os
import random
import shutil
import time
import tracemalloc

import pytest

import speedyzero.run.log as log_module
from speedyzero.run import events as events_module
from tests.run.log_support import clock_of, event_files, iterations, mutated, said
from tests.run.test_log import a_row, curve, rows_of, run_log


@pytest.fixture
def clock(monkeypatch):
    return clock_of(monkeypatch)


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
