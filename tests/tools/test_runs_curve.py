"""tools/runs/curve.py: what its picture shows, the files it writes, what it does without, and its errors."""

import csv
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.tools.recorded_support import CONFIG, ROWS, SUMMARY, cells, finished_run, row, written_run
from tests.tools.tools_support import TOOLS, load_tool


@pytest.fixture
def tool(monkeypatch):
    return partial(load_tool, monkeypatch, "runs")


@pytest.fixture
def finished(tmp_path) -> Path:
    return finished_run(tmp_path / "pong")


def run_curve(tool, capsys, *arguments, monkeypatch) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["curve.py", *map(str, arguments)])
    tool("curve").main()
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (800, "800"), (2500, "2.5k"), (100_000, "100k"), (1_250_000, "1.25M"), (-0.5, "-0.5"), (-2000, "-2k")]
)
def test_an_axis_counts_in_thousands(tool, value, text):
    assert tool("curve").thousands(value) == text


def panels(figure) -> dict:
    """The panels of a picture by title: each line's data, and the texts of the legend."""
    found = {}
    for axes in figure.axes:
        lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]
        legend = axes.get_legend()
        found[axes.get_title()] = lines, [text.get_text() for text in legend.get_texts()] if legend else []
    return found


def test_the_picture_shows_what_the_rows_hold_the_evaluation_as_a_point_and_the_two_scores_of_reference(tool, finished):
    curve = tool("curve")
    found = panels(curve.figure_of([curve.read(finished)], ["pong"]))
    (training, played, human, random), legend = found["return of whole games"]
    assert training == ([10, 20, 100_000], [-21.0, -19.5, 12.0])
    assert played == ([100_000], [14.6])
    assert (human[1], random[1]) == ([14.6, 14.6], [-20.7, -20.7])
    assert legend == ["last games of training", "evaluation: 14.60 over 32 episodes", "human: 14.6", "random: -20.7"]
    assert found["value loss"][0] == [([4, 18_000], [2.5, 0.5])]
    assert found["entropy of the visits"][0] == [([], [])]  # before the first update there is no place for it
    assert found["age of the priorities"][0] == [([18_000], [80.5])]
    assert found["progress"][0] == [
        ([3 / 3600, 6 / 3600, 7.5], [10, 20, 100_000]), ([3 / 3600, 6 / 3600, 7.5], [0, 4, 18_000])
    ]  # fmt: skip
    assert {"value prefix loss", "policy loss", "consistency loss", "values"} < set(found)


def test_runs_are_laid_over_each_other_each_under_its_name(tool, finished, tmp_path, capsys, monkeypatch):
    other = written_run(tmp_path / "other" / "pong", ROWS[:2])
    curve = tool("curve")
    found = panels(curve.figure_of([curve.read(finished), curve.read(other)], ["sweep", "sampled"]))
    legend = ["sweep, evaluation: 14.60 over 32 episodes", "sampled", "human: 14.6", "random: -20.7"]
    assert found["return of whole games"][1] == legend
    assert found["value loss"][0] == [([4, 18_000], [2.5, 0.5]), ([4], [2.5])]
    assert found["progress"][1] == ["environment steps", "updates"]
    out = tmp_path / "docs" / "v1.0"
    printed = run_curve(tool, capsys, finished, other, "--out", out, monkeypatch=monkeypatch)
    assert printed[0] == f"wrote {out}.csv and {out}.png"
    names = [str(finished), str(other)]  # their folders have one name
    assert [cells(line)[0] for line in printed[1:]] == ["run", "---", *names]
    assert [line["run"] for line in csv.DictReader(Path(f"{out}.csv").read_text().splitlines())] == [names[0]] * 3 + [names[1]] * 2
    assert Path(f"{out}.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.parent.iterdir()) == ["v1.0.csv", "v1.0.png"]


def test_a_run_with_nothing_but_counts_can_be_drawn(tool, tmp_path):
    curve = tool("curve")
    figure = curve.figure_of([curve.read(written_run(tmp_path / "run", [row(1, updates=0)], config=CONFIG | {"env": "Catch-v0"}))], ["run"])
    assert panels(figure)["return of whole games"] == ([([], [])], ["last games of training"])
    assert "unfinished at 10 of 100,000" in figure.get_suptitle()


def curve_fails(tool, capsys, monkeypatch, *arguments) -> str:
    with pytest.raises(SystemExit) as error:
        run_curve(tool, capsys, *arguments, monkeypatch=monkeypatch)
    assert isinstance(error.value.code, str)
    assert error.value.code.startswith("error: ")
    assert "\n" not in error.value.code
    return error.value.code


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "RUN_DIR: is missing"),
        (["nowhere"], "nowhere: no run there"),
        (["empty"], "empty/metrics.jsonl: has no row yet"),
        (["bare"], "bare: metrics.jsonl is missing"),
        (["torn"], "torn/config.json: is not JSON"),
        (["list"], "list/eval.json: is not an object"),
        (["typed"], "typed/summary.json: wall_s is missing or no float"),
        (["pong", "catch"], "catch: is of Catch-v0, and pong of Pong-v5"),
        (["pong", "--labels", "a", "b"], "--labels: 2 for 1 runs"),
        (["pong"] * 11, "11 runs: no more than 10"),
        (["pong", "--out", "pong/eval.json/x"], "--out pong/eval.json/x"),
    ],
)
def test_curve_says_in_one_line_what_is_wrong_and_writes_nothing(tool, finished, tmp_path, capsys, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    written_run(tmp_path / "empty", "")
    written_run(tmp_path / "bare", "")
    (tmp_path / "bare" / "metrics.jsonl").unlink()
    written_run(tmp_path / "torn", ROWS, config="{")
    written_run(tmp_path / "list", ROWS, eval="[]")
    written_run(tmp_path / "typed", ROWS, summary=SUMMARY | {"wall_s": "long"})
    written_run(tmp_path / "catch", ROWS, config=CONFIG | {"env": "Catch-v0"})
    before = sorted(tmp_path.rglob("*"))
    more = [] if "--out" in arguments else ["--no-picture"]
    assert named in curve_fails(tool, capsys, monkeypatch, *arguments, *more)
    assert sorted(tmp_path.rglob("*")) == before


def test_without_matplotlib_there_is_one_line_and_without_the_picture_it_is_not_needed(tool, finished, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "speedyzero[plot]" in curve_fails(tool, capsys, monkeypatch, finished)
    assert not (tmp_path / "docs").exists()
    assert run_curve(tool, capsys, finished, "--no-picture", monkeypatch=monkeypatch)[0] == "wrote docs/runs/pong.csv"
    assert [path.name for path in (tmp_path / "docs" / "runs").iterdir()] == ["pong.csv"]


def test_a_curve_needs_no_pytorch(finished, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('PyTorch was imported')")
    command = [sys.executable, str(TOOLS / "runs" / "curve.py"), str(finished), "--no-picture", "--out", str(tmp_path / "x")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stderr) == (0, "")
