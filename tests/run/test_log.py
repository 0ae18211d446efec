import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import speedyzero.run.log as log_module
from speedyzero.run import display
from speedyzero.run.display import Progress, line, panel
from speedyzero.run.files import write_json
from speedyzero.run.log import RunLog


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(log_module, "monotonic", clock)
    return clock


def run_log(run_dir, **options) -> RunLog:
    return RunLog(run_dir, **{"total_env_steps": 20_000, "total_updates": 24_000, "live": False, **options})


def a_row(iteration: int, **others) -> dict:
    return {"env_steps": 8 * iteration, "updates": 4 * iteration, "iteration": iteration, **others}


def rows_of(run_dir: Path) -> list[dict]:
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (run_dir / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(row, parse_constant=refuse) for row in text.splitlines()]


def curve(run_dir: Path, key: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(key)]


def test_every_row_has_the_counts_and_the_clock_and_its_own_metrics(tmp_path, clock):
    with run_log(tmp_path) as log:
        clock.now += 2
        log.row({"losses/value_loss": 1.5, "charts/episodic_return": -21, **a_row(1)})
    assert rows_of(tmp_path) == [
        {
            "env_steps": 8,
            "updates": 4,
            "iteration": 1,
            "wall_s": 2.0,
            "losses/value_loss": 1.5,
            "charts/episodic_return": -21,
            "time/env_steps_per_s": 4.0,
            "time/updates_per_s": 2.0,
            "time/eta_s": (24_000 - 4) / 2,
        }
    ]


def test_a_row_is_on_file_before_the_log_is_closed(tmp_path):
    with run_log(tmp_path) as log:
        log.row(a_row(1))
        assert len(rows_of(tmp_path)) == 1


@pytest.mark.parametrize("key", ["env_steps", "updates", "iteration"])
def test_a_row_without_a_count_is_refused_by_name(tmp_path, key):
    metrics = a_row(1)
    del metrics[key]
    with run_log(tmp_path) as log, pytest.raises(ValueError, match=f"lacks {key}"):
        log.row(metrics)
    assert rows_of(tmp_path) == []


def test_numbers_that_are_not_finite_become_null(tmp_path):
    with run_log(tmp_path) as log:
        log.row(a_row(1, **{"losses/a": math.nan, "losses/b": math.inf, "losses/c": np.float32("-inf")}))
    (row,) = rows_of(tmp_path)
    assert row["losses/a"] is row["losses/b"] is row["losses/c"] is None


def test_scalars_of_numpy_and_torch_become_plain_numbers(tmp_path):
    values = {"a": np.int64(3), "b": torch.tensor(2.5), "c": torch.tensor(4), "d": np.float32(0.5), "e": True}
    with run_log(tmp_path) as log:
        log.row(a_row(1, **values))
    (row,) = rows_of(tmp_path)
    assert {key: row[key] for key in values} == {"a": 3, "b": 2.5, "c": 4, "d": 0.5, "e": 1}
    assert isinstance(row["c"], int)


def test_two_runs_of_the_same_metrics_differ_only_in_the_clock(tmp_path, clock):
    for name, pace in (("a", 1.0), ("b", 3.7)):
        with run_log(tmp_path / name) as log:
            for iteration in range(1, 6):
                clock.now += pace
                log.row(a_row(iteration, **{"losses/loss": 1 / iteration}))

    def timeless(row):
        return {key: value for key, value in row.items() if key != "wall_s" and not key.startswith("time/")}

    a, b = rows_of(tmp_path / "a"), rows_of(tmp_path / "b")
    assert a != b
    assert [timeless(row) for row in a] == [timeless(row) for row in b]


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


def test_tensorboard_gets_every_finite_metric_at_its_iteration(tmp_path):
    with run_log(tmp_path) as log:
        for iteration in (1, 2, 3):
            log.row(a_row(iteration, **{"losses/value_loss": math.nan if iteration == 2 else float(iteration)}))
    assert curve(tmp_path, "losses/value_loss") == [(1, 1.0), (3, 3.0)]
    assert curve(tmp_path, "env_steps") == [(1, 8.0), (2, 16.0), (3, 24.0)]
    tags = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()["scalars"]
    assert {"losses/value_loss", "env_steps", "updates", "time/env_steps_per_s"} <= set(tags)


def test_a_resumed_run_has_every_row_once_and_its_clock_goes_on(tmp_path, clock):
    with run_log(tmp_path) as log:
        for iteration in range(1, 8):
            clock.now += 10
            log.row(a_row(iteration, **{"losses/loss": 1.0}))
    clock.now += 5000  # the machine was off
    with run_log(tmp_path, resume_at=5) as log:
        assert [row["iteration"] for row in rows_of(tmp_path)] == [1, 2, 3, 4, 5]
        for iteration in (6, 7, 8):
            clock.now += 20
            log.row(a_row(iteration, **{"losses/loss": 2.0}))
    rows = rows_of(tmp_path)
    assert [row["iteration"] for row in rows] == list(range(1, 9))
    assert [row["wall_s"] for row in rows] == [10, 20, 30, 40, 50, 70, 90, 110]
    assert rows[5]["time/env_steps_per_s"] == 8 / 20
    assert curve(tmp_path, "losses/loss") == [(n, 1.0) for n in range(1, 6)] + [(n, 2.0) for n in range(6, 9)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


@pytest.mark.parametrize("torn", [b'{"env_steps": 24, "upd', b"{", b'{"env_steps": 24}', b"\0\0\0\0\0\0"])
def test_a_torn_last_line_is_dropped_without_a_word(tmp_path, capsys, torn):
    with run_log(tmp_path) as log:
        for iteration in (1, 2):
            log.row(a_row(iteration))
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(torn)
    capsys.readouterr()
    with run_log(tmp_path, resume_at=2) as log:
        log.row(a_row(3))
    assert [row["iteration"] for row in rows_of(tmp_path)] == [1, 2, 3]
    assert "unreadable" not in capsys.readouterr().out


def test_a_last_row_that_lacks_only_its_newline_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"env_steps": 8, "updates": 4, "iteration": 1, "wall_s": 3}')
    with run_log(tmp_path, resume_at=1) as log:
        log.row(a_row(2))
    assert [row["iteration"] for row in rows_of(tmp_path)] == [1, 2]


def test_an_unreadable_row_in_the_middle_is_dropped_and_said(tmp_path, capsys):
    with run_log(tmp_path) as log:
        log.row(a_row(1))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write("not json\n[1]\n" + json.dumps(a_row(2, wall_s=3.5)) + "\n")
    with run_log(tmp_path, resume_at=9):
        pass
    assert [row["iteration"] for row in rows_of(tmp_path)] == [1, 2]
    assert f"{tmp_path}/metrics.jsonl: dropped 2 unreadable or repeated rows" in capsys.readouterr().out


def test_resuming_before_the_first_row_keeps_none(tmp_path, clock):
    with run_log(tmp_path) as log:
        log.row(a_row(0))
    with run_log(tmp_path, resume_at=-1) as log:
        clock.now += 4
        log.row(a_row(0, x=1))
    assert [(row["x"], row["wall_s"]) for row in rows_of(tmp_path)] == [(1, 4.0)]


def test_a_new_run_does_not_touch_the_rows_of_an_old_one(tmp_path):
    with run_log(tmp_path) as log:
        log.row(a_row(1))
    with pytest.raises(FileExistsError, match=r"metrics.jsonl already holds a run; .* another --run-dir"):
        run_log(tmp_path)
    assert len(rows_of(tmp_path)) == 1


def test_without_a_terminal_lines_are_ten_seconds_apart_with_the_first_and_the_last(tmp_path, clock, capsys):
    with run_log(tmp_path, live=None) as log:
        for iteration in range(1, 28):
            clock.now += 1
            log.row(a_row(iteration))
    lines = capsys.readouterr().out.splitlines()
    assert [text.split("  ")[0] for text in lines] == [
        f"env_steps {8 * iteration}/20000" for iteration in (1, 11, 21, 27)
    ]


def test_a_message_comes_after_the_row_that_led_to_it(tmp_path, clock, capsys):
    with RunLog(tmp_path, total_env_steps=100, total_updates=100) as log:
        for iteration in (1, 2):
            log.row({"env_steps": 10 * iteration, "updates": 0, "iteration": iteration})
        log.message("playing")
    lines = capsys.readouterr().out.splitlines()
    assert [text.split("/")[0] for text in lines] == ["env_steps 10", "env_steps 20", "playing"]


def test_the_last_row_is_not_said_twice(tmp_path, clock, capsys):
    log = run_log(tmp_path)
    log.row(a_row(1))
    log.close()
    log.close()
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_plain_line_reads_as_in_the_manual_and_is_never_wrapped(tmp_path, clock, capsys):
    with run_log(tmp_path, total_updates=1600) as log:
        clock.now += 1200 / 41
        log.row(
            {
                "env_steps": 1200,
                "updates": 400,
                "iteration": 150,
                "charts/episodic_return": 0.35,
                "losses/loss": 3.21,
                "charts/priority_age": 96,
            }
        )
    eta = f"{int(18800 / 41) // 60}m{round(18800 / 41) % 60:02d}s"
    assert capsys.readouterr().out == (
        f"env_steps 1200/20000  updates 400  return 0.35  loss 3.21  priority_age 96  41 steps/s  eta {eta}\n"
    )


def progress(**changes) -> Progress:
    fields = {
        "env_steps": 5000, "updates": 400, "iteration": 625, "total_env_steps": 20_000, "total_updates": 24_000,
        "env_steps_per_s": 41.0, "updates_per_s": 200.0, "eta_s": 192.0, "metrics": {},
    }  # fmt: skip
    return Progress(**(fields | changes))


@pytest.mark.parametrize(
    ("env_steps", "updates", "phase"),
    [(0, 0, "collect"), (2000, 0, "collect"), (2000, 8, "train"), (20_000, 8, "learn"), (20_000, 24_000, "done")],
)
def test_the_phase_follows_from_the_counts(env_steps, updates, phase):
    assert progress(env_steps=env_steps, updates=updates).phase == phase


def test_in_the_learn_phase_the_line_counts_updates(tmp_path):
    text = line(progress(env_steps=20_000, updates=21_000))
    assert text == "env_steps 20000/20000  updates 21000/24000  200 updates/s  eta 3m12s"


def test_a_value_is_shown_until_a_newer_one_comes(tmp_path, clock, capsys):
    with run_log(tmp_path) as log:
        log.row(a_row(1, **{"charts/episodic_return": 7.0}))
        clock.now += 20
        log.row(a_row(2))
    assert "return 7.00" in capsys.readouterr().out.splitlines()[1]
    assert "charts/episodic_return" not in rows_of(tmp_path)[1]


def drawn(now: Progress, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=40, color_system=None)
    console.print(panel(now, 3723.0, width))
    return console.file.getvalue().splitlines()


FULL = {
    "charts/episodic_return": -20.71,
    "charts/priority_age": 12_345_678,
    **{f"losses/{name}_loss": -1234.5678 for name in ("value", "policy", "value_prefix", "consistency", "x", "y", "z")},
}


@pytest.mark.parametrize("width", [40, 60, 80, 100])
@pytest.mark.parametrize(
    "now",
    [
        progress(env_steps=0, updates=0, env_steps_per_s=None, updates_per_s=None, eta_s=None),
        progress(metrics=FULL),
        progress(env_steps=300_000, total_env_steps=300_000, updates=999_999, total_updates=1_200_000, metrics=FULL),
        progress(env_steps=20_000, updates=24_000, eta_s=0.0),
        progress(total_env_steps=0, env_steps=0),
    ],
)
def test_the_panel_has_the_same_height_whatever_is_known_and_never_wraps(now, width):
    lines = drawn(now, width)
    assert len(lines) == 9
    assert all(len(text) == width for text in lines)


def test_the_panel_shows_the_counts_rates_return_losses_and_phase():
    text = "\n".join(drawn(progress(metrics=FULL), 100))
    for part in (
        "speedyzero · train", "25.0%", "eta 3m12s", "5,000 / 20,000", "41/s", "400 / 24,000", "200/s", "1h02m",
        "625", "-20.7", "value prefix", "consistency", "-1,235",
    ):  # fmt: skip
        assert part in text, part


def test_in_the_learn_phase_the_bar_counts_updates():
    assert "87.5%" in "\n".join(drawn(progress(env_steps=20_000, updates=21_000), 80))
    assert "99.9%" in "\n".join(drawn(progress(env_steps=19_999), 80))  # not 100% before the end


def test_the_live_display_ends_below_the_messages(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with run_log(tmp_path, live=True) as log:
        log.row(a_row(1))
        log.message("checkpoint [bold] saved")
        print("a stray print")
        log.row(a_row(2500))
    text = capsys.readouterr().out
    assert "checkpoint [bold] saved" in text
    assert text.index("a stray print") < text.rindex("speedyzero")
    assert "20,000 / 20,000" in text[text.rindex("speedyzero") :]


def test_an_error_in_the_run_closes_the_log_and_goes_on(tmp_path, capsys):
    def crash():
        with run_log(tmp_path) as log:
            log.row(a_row(1))
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        crash()
    assert curve(tmp_path, "updates") == [(1, 4.0)]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0.4, "0s"), (59.6, "1m00s"), (192, "3m12s"), (3600, "1h00m"), (29_100, "8h05m"), (183_600, "2d03h")],
)
def test_durations_are_short(seconds, text):
    assert display._duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"), (0, "0"), (0.0, "0.00"), (0.35, "0.35"), (-12.44, "-12.4"), (1204.4, "1,204"), (96, "96"),
        (0.00123, "1.2e-03"), (12_345_678, "1.2e+07"),
    ],
)  # fmt: skip
def test_numbers_are_short(value, text):
    assert display._short(value) == text


def test_json_files_are_sorted_indented_and_finite(tmp_path):
    write_json(tmp_path / "eval.json", {"b": [1.0, math.nan], "a": {"run": Path("x"), "c": (math.inf, None, True)}})
    assert (tmp_path / "eval.json").read_text() == (
        "{\n"
        '  "a": {\n    "c": [\n      null,\n      null,\n      true\n    ],\n    "run": "x"\n  },\n'
        '  "b": [\n    1.0,\n    null\n  ]\n'
        "}\n"
    )


def test_a_json_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    write_json(tmp_path / "a.json", {"n": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(tmp_path / "a.json", {"n": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"n": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
