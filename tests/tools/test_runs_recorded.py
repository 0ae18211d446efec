"""tools/runs/recorded.py: the rows, the CSV and the line of the table that it makes of a run's files."""

import csv
import json
from functools import partial
from pathlib import Path

import pytest

from tests.tools.recorded_support import CONFIG, EVAL, ROWS, SUMMARY, cells, finished_run, row, written_run
from tests.tools.tools_support import load_tool


@pytest.fixture
def tool(monkeypatch):
    return partial(load_tool, monkeypatch, "runs")


@pytest.fixture
def finished(tmp_path) -> Path:
    return finished_run(tmp_path / "pong")


def test_the_csv_has_every_row_under_the_names_of_the_log_and_is_empty_where_a_row_is(tool, finished):
    recorded = tool("recorded")
    head, *lines = csv.reader(recorded.to_csv([recorded.read(finished)], ["my run"]).splitlines())
    assert head == [
        "run", "iteration", "env_steps", "updates", "wall_s", "charts/episodic_return", "charts/episodes", "losses/loss",
        "losses/value_prefix_loss", "losses/value_loss", "losses/policy_loss", "losses/consistency_loss", "train/value_abs_max",
        "train/value_target", "search/visit_entropy", "search/priority_age", "train/grad_norm", "train/learning_rate",
        "train/skipped_updates",
    ]  # fmt: skip
    nothing = [""]
    assert lines == [
        ["my run", "1", "10", "0", "3.0", "-21.0", "3", *nothing * 7, "1.75", *nothing * 4],
        ["my run", "2", "20", "4", "6.0", "-19.5", "5", *nothing * 2, "2.5", *nothing * 8, "1"],
        ["my run", "9000", "100000", "18000", "27000.0", "12.0", *nothing * 3, "0.5", *nothing * 5, "80.5", *nothing * 3],
    ]


def test_a_line_that_is_no_row_or_repeats_one_is_left_out_and_counted_but_not_one_that_is_being_written(tool, tmp_path):
    one, two, four = (json.dumps(row(n)) for n in (1, 2, 4))
    odd = ['{"iteration": 3', "[]", '{"iteration": 3, "env_steps": 1, "updates": 2}', json.dumps(row(3, losses__loss="much")), "\ufffe"]
    run = tool("recorded").read(written_run(tmp_path / "run", "\n".join([one, two, *odd, two, one, four, four[:9]])))
    assert [one["iteration"] for one in run.rows] == [1, 2, 4]
    assert run.left_out == 7


def test_the_table_of_a_finished_run_has_the_gpu_the_clock_of_the_run_and_the_score_on_the_human_scale(tool, finished):
    recorded = tool("recorded")
    head, rule, line = recorded.table([recorded.read(finished)], ["pong"]).splitlines()
    assert len(cells(head)) == len(cells(rule)) == 9
    expected = ["Pong-v5", "efficientzero", "7", "NVIDIA H100", "100,000", "18,000", "12 min 05 s", "14.60 over 32 episodes", "1.000"]
    assert cells(line) == expected


def test_the_table_of_an_unfinished_run_says_so_and_has_the_last_return_that_was_logged(tool, tmp_path):
    recorded = tool("recorded")
    rows = [row(4, charts__episodic_return=-9.0), row(5, charts__episodic_return=-3.0), row(20)]
    run = recorded.read(written_run(tmp_path / "run", rows))
    expected = ["cuda", "200", "40", "1 min 00 s, unfinished", "none yet (the last games of training -3.00)", "-"]
    assert cells(recorded.table([run], ["run"]).splitlines()[-1])[3:] == expected


def test_a_score_of_another_checkpoint_than_the_last_says_which_and_no_game_of_the_26_has_no_human_scale(tool, tmp_path):
    recorded = tool("recorded")
    run = written_run(tmp_path / "run", ROWS, config=CONFIG | {"env": "Catch-v0"}, eval=EVAL | {"updates": 9000}, summary=SUMMARY)
    line = cells(recorded.table([recorded.read(run)], ["run"]).splitlines()[-1])
    assert line[-2:] == ["14.60 over 32 episodes, played after 100,000 steps and 9,000 updates", "-"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (3599.4, "59 min 59 s"), (3600, "1 h 00 min"), (7500, "2 h 05 min")],
)
def test_a_clock_is_for_a_person(tool, seconds, text):
    assert tool("recorded").clock(seconds) == text
