"""tools/curve: the rows, the table and the picture that it makes of a run's files, and what it refuses."""

import csv
import json
import sys
from pathlib import Path

import pytest

from tools import curve

CONFIG = {"env": "Pong-v5", "preset": "efficientzero", "seed": 7, "device": "cuda", "env_steps": 100_000}


def row(iteration: int, **more) -> dict:
    """A row as the log writes it, with its counts ten and two times the iteration and three seconds an iteration."""
    counts = {"iteration": iteration, "env_steps": 10 * iteration, "updates": 2 * iteration, "wall_s": 3.0 * iteration}
    return counts | {key.replace("__", "/"): value for key, value in more.items()}


def written_run(folder: Path, rows: list[dict] | str, **files) -> Path:
    """A run directory: the text or the rows of metrics.jsonl, and objects for config.json and other files of that kind."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(rows if isinstance(rows, str) else "".join(json.dumps(one) + "\n" for one in rows))
    for name, value in ({"config": CONFIG} | files).items():
        (folder / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


ROWS = [
    row(1, updates=0, charts__episodic_return=-21.0, charts__episodes=3, search__visit_entropy=1.75),
    row(2, charts__episodic_return=-19.5, charts__episodes=5, losses__value_loss=2.5, losses__loss=None, train__skipped_updates=1),
    row(9000, env_steps=100_000, charts__episodic_return=12.0, losses__value_loss=0.5, search__priority_age=80.5),
]
EVAL = {"mean": 14.6, "episodes": 32, "env_steps": 100_000, "updates": 18_000}
SUMMARY = {"env_steps": 100_000, "updates": 18_000, "wall_s": 724.6}


@pytest.fixture
def finished(tmp_path) -> Path:
    return written_run(tmp_path / "pong", ROWS, eval=EVAL, summary=SUMMARY)


def cells(folder: Path) -> list[str]:
    """Of a run's line of the table."""
    return [cell.strip() for cell in curve.table([curve.read(folder)], ["run"]).splitlines()[-1].strip("|").split("|")]


def test_the_csv_has_every_value_under_its_name_and_is_empty_where_a_row_is(finished):
    lines = list(csv.DictReader(curve.to_csv([curve.read(finished)], ["my run"]).splitlines()))
    assert [{key: value for key, value in line.items() if value} for line in lines] == [
        {"run": "my run"} | {key: str(value) for key, value in one.items() if value is not None} for one in ROWS
    ]


def test_a_line_that_is_no_row_or_repeats_one_is_left_out_and_counted_but_not_one_that_is_being_written(tmp_path):
    one, two, four = (json.dumps(row(n)) for n in (1, 2, 4))
    odd = ['{"iteration": 3', "[]", '{"iteration": 3, "env_steps": 1, "updates": 2}', "\ufffe"]
    run = curve.read(written_run(tmp_path / "run", "\n".join([one, two, *odd, two, one, four, four[:9]])))
    assert [one["iteration"] for one in run.rows] == [1, 2, 4]
    assert run.left_out == 6


def test_the_table_has_the_clock_of_the_run_and_the_score_on_the_human_scale(finished, tmp_path):
    expected = ["Pong-v5", "efficientzero", "7", "cuda", "100,000", "18,000", "12 min 05 s", "14.60 over 32 episodes", "1.000"]
    assert cells(finished) == expected
    unfinished = written_run(tmp_path / "a", [row(4, charts__episodic_return=-9.0), row(5, charts__episodic_return=-3.0), row(20)])
    assert cells(unfinished)[4:] == ["200", "40", "1 min 00 s, unfinished", "none yet (the last games of training -3.00)", "-"]
    other = written_run(tmp_path / "b", ROWS, config=CONFIG | {"env": "Catch-v0"}, eval=EVAL | {"updates": 9000}, summary=SUMMARY)
    assert cells(other)[-2:] == ["14.60 over 32 episodes, played after 100,000 steps and 9,000 updates", "-"]


def test_runs_are_laid_over_each_other_each_under_its_name(finished, tmp_path, call):
    """The picture shows what the rows hold, the evaluation as a point, and the two scores of reference."""
    other = written_run(tmp_path / "other" / "pong", ROWS[:2])
    panels = {axes.get_title(): axes for axes in curve.figure_of([curve.read(finished), curve.read(other)], ["sweep", "sampled"]).axes}
    lines = {name: [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines] for name, axes in panels.items()}
    training, played, second, human, random = lines["Return of whole games"]
    assert training == ([10, 20, 100_000], [-21.0, -19.5, 12.0])
    assert played == ([100_000], [14.6])
    assert second == ([10, 20], [-21.0, -19.5])
    assert (human[1], random[1]) == ([14.6, 14.6], [-20.7, -20.7])
    legend = [text.get_text() for text in panels["Return of whole games"].get_legend().get_texts()]
    assert legend == ["sweep, evaluation: 14.60 over 32 episodes", "sampled", "human: 14.6", "random: -20.7"]
    assert lines["Value loss"] == [([20, 100_000], [2.5, 0.5]), ([20], [2.5])]
    assert lines["Age of the priorities"] == [([100_000], [80.5]), ([], [])]
    assert "Policy loss" not in panels, "no row has one"
    out = tmp_path / "docs" / "v1.0"
    _, printed = call(curve, finished, other, "--out", out)
    assert printed.startswith(f"wrote {out}.csv and {out}.png\n")
    with open(f"{out}.csv") as file:  # the folders have one name
        assert [line["run"] for line in csv.DictReader(file)] == [str(finished)] * 3 + [str(other)] * 2
    assert Path(f"{out}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nowhere"], "nowhere: no run there"),
        (["empty"], "empty: metrics.jsonl has no row yet"),
        (["torn"], "torn/config.json: cannot be read"),
        (["pong", "catch"], "catch: is of Catch-v0, and pong of Pong-v5"),
        (["pong", "--labels", "a", "b"], "--labels: 2 for 1 runs"),
        (["pong", "--out", "pong/eval.json/x"], "--out pong/eval.json/x"),
        (["pong", "--picture"], "matplotlib is missing"),
    ],
)
def test_curve_says_in_one_line_what_is_wrong_and_writes_nothing(finished, tmp_path, call, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    written_run(tmp_path / "empty", "")
    written_run(tmp_path / "torn", ROWS, config="{")
    written_run(tmp_path / "catch", ROWS, config=CONFIG | {"env": "Catch-v0"})
    before = sorted(tmp_path.rglob("*"))
    message, _ = call(curve, *arguments, *([] if "--picture" in arguments else ["--no-picture"]))
    assert message.startswith(f"error: {named}")
    assert "\n" not in message
    assert sorted(tmp_path.rglob("*")) == before
