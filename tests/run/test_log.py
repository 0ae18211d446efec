"""`metrics.jsonl`: what a row holds, its rates, and which rows a resumed run goes on from."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from speedyzero.run.files import write_json
from speedyzero.run.rows import LONGEST
from tests.run import log_support
from tests.run.log_support import a_row, iterations, rows_of, run_log, said

clock = log_support.clock


def test_every_row_has_the_counts_the_clock_and_its_own_metrics_and_is_on_file_at_once(tmp_path, clock):
    with run_log(tmp_path) as log:
        clock.now += 2
        log.row({"losses/value_loss": 1.5, "charts/episodic_return": -21, **a_row(1)})
        assert rows_of(tmp_path) == [
            {
                "env_steps": 8, "updates": 4, "iteration": 1, "wall_s": 2.0, "losses/value_loss": 1.5, "charts/episodic_return": -21,
                "time/env_steps_per_s": 4.0, "time/updates_per_s": 2.0, "time/eta_s": (24_000 - 4) / 2,
            }
        ]  # fmt: skip


def test_scalars_become_plain_numbers_and_what_is_not_finite_null(tmp_path):
    values = {"a": np.int64(3), "b": torch.tensor(2.5), "c": torch.tensor(4), "d": math.nan, "e": np.float32("-inf")}
    with run_log(tmp_path) as log:
        log.row(a_row(1, **values))
    (row,) = rows_of(tmp_path)
    assert [row[key] for key in values] == [3, 2.5, 4, None, None]
    assert isinstance(row["c"], int)


def test_rates_are_means_over_the_last_minute(tmp_path, clock):
    with run_log(tmp_path, total_env_steps=10**6) as log:
        steps = 0
        for iteration in range(1, 41):  # 200 s at 20 steps/s, then 200 s at 100 steps/s
            clock.now += 10
            steps += 200 if iteration <= 20 else 1000
            log.row({"env_steps": steps, "updates": 0, "iteration": iteration})
    rates = [row["time/env_steps_per_s"] for row in rows_of(tmp_path)]
    assert rates[:20] == [20.0] * 20
    assert rates[22] == pytest.approx((3 * 20 + 3 * 100) / 6)
    assert rates[25:] == [100.0] * 15


def test_the_eta_is_that_of_the_slower_of_stepping_and_updating(tmp_path, clock):
    with run_log(tmp_path, total_env_steps=1000, total_updates=2000) as log:
        clock.now += 10
        log.row({"env_steps": 100, "updates": 0, "iteration": 1})  # nobody knows how long an update takes
        clock.now += 10
        log.row({"env_steps": 200, "updates": 100, "iteration": 2})  # 80 s of steps, 380 s of updates
        clock.now += 20
        log.row({"env_steps": 1000, "updates": 1600, "iteration": 3})  # 10 s of updates
        log.row({"env_steps": 1000, "updates": 2000, "iteration": 4})
    assert [row["time/eta_s"] for row in rows_of(tmp_path)] == [None, 380.0, 10.0, 0.0]


def test_a_resumed_run_has_every_row_once_and_its_clock_goes_on(tmp_path, clock):
    with run_log(tmp_path) as log:
        for iteration in range(1, 8):
            clock.now += 10
            log.row(a_row(iteration))
    clock.now += 5000  # the machine was off
    with run_log(tmp_path, resume_at=5) as log:
        assert iterations(tmp_path) == [1, 2, 3, 4, 5]
        for iteration in (6, 7, 8):
            clock.now += 20
            log.row(a_row(iteration))
    rows = rows_of(tmp_path)
    assert [(row["iteration"], row["wall_s"]) for row in rows] == list(enumerate([10, 20, 30, 40, 50, 70, 90, 110], 1))
    assert rows[5]["time/env_steps_per_s"] == 8 / 20
    with run_log(tmp_path, resume_at=-1) as log:
        assert (rows_of(tmp_path), log.wall_s) == ([], 0.0)


def test_a_new_run_does_not_touch_the_rows_of_an_old_one(tmp_path):
    with run_log(tmp_path) as log:
        log.row(a_row(1))
    with pytest.raises(FileExistsError, match=r"metrics.jsonl already holds a run; .* another --run-dir"):
        run_log(tmp_path)
    assert iterations(tmp_path) == [1]


def good(iteration: int, wall_s: float) -> bytes:
    return json.dumps(a_row(iteration, wall_s=wall_s)).encode() + b"\n"


def with_value(key: str, text: str) -> bytes:
    """A row of iteration 3 in which `key` is, literally, `text`."""
    fields = {"env_steps": "24", "updates": "12", "iteration": "3", "wall_s": "30.0", key: text}
    return ("{" + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}\n").encode()


BAD_LINES = {
    "not utf-8": good(3, 30)[:-2] + b', "x": "\xff"}\n',
    "no object": b"[3]\n",
    "bomb": b"[" * 100_000 + b"\n",
    "repeated": good(2, 25),
    "too long": good(3, 30)[:-2] + b" " * (LONGEST - len(good(3, 30)) + 1) + b"\n",
    "wall_s missing": json.dumps(a_row(3)).encode() + b"\n",
    **{f"wall_s {value[:9]}": with_value("wall_s", value) for value in ["-1", "1e400", '"12"', "true", "9" * 400]},
    **{f"iteration {value[:9]}": with_value("iteration", value) for value in ["-1", "3.0", "null", "1" * 5000]},
    "nan elsewhere": with_value("losses/loss", "NaN"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_line_that_is_no_row_is_dropped_and_counted(tmp_path, clock, capsys, name):
    (tmp_path / "metrics.jsonl").write_bytes(good(1, 10) + good(2, 20.5) + BAD_LINES[name])
    with run_log(tmp_path, resume_at=5) as log:
        assert log.wall_s == 20.5
        assert (tmp_path / "metrics.jsonl").read_bytes() == good(1, 10) + good(2, 20.5)
        clock.now += 1
        log.row(a_row(6))
    assert said(capsys, "dropped") == [f"{tmp_path}/metrics.jsonl: dropped 1 unreadable or repeated rows"]
    assert rows_of(tmp_path)[-1]["time/env_steps_per_s"] == 32.0


@pytest.mark.parametrize(("torn", "kept"), [(b'{"env_steps": 24, "upd', [1]), (b"\0\0\0\0", [1]), (good(2, 20)[:-1], [1, 2])])
def test_a_torn_last_line_is_dropped_without_a_word_and_kept_if_only_its_newline_is_missing(tmp_path, capsys, torn, kept):
    (tmp_path / "metrics.jsonl").write_bytes(good(1, 10) + torn)
    with run_log(tmp_path, resume_at=2) as log:
        log.row(a_row(3))
    assert iterations(tmp_path) == [*kept, 3]
    assert said(capsys, "dropped") == []


def test_json_files_are_sorted_and_finite_and_one_that_does_not_fit_leaves_the_old_file_and_is_named(tmp_path):
    path = tmp_path / "eval.json"
    write_json(path, {"b": [1.0, math.nan], "a": {"run": Path("x"), "c": (math.inf, None, True)}})
    text = path.read_text()
    assert list(json.loads(text).items()) == [("a", {"c": [None, None, True], "run": "x"}), ("b", [1.0, None])]
    (tmp_path / "eval.json.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as raised:
        write_json(path, {"mean": 2.0})
    assert raised.value.filename == str(path)
    assert path.read_text() == text
    assert not (tmp_path / "eval.json.tmp").exists()
