"""The page about runs: what it says of them, on files as a run leaves them."""

import json
import sys
from html.parser import HTMLParser

import pytest

from speedyzero import report
from speedyzero.chart import Level, Line, chart, ticks
from speedyzero.diagnosis import FEWEST, concerns, greatest_value
from speedyzero.report import grouped, page, phase_seconds
from speedyzero.run.record import RunError, read

CONFIG = {"support": 30, "discount": 0.99, "clip_reward": True}


def training(**values):
    """Rows of training that all say the same."""
    return [{"env_steps": 8 * n, "updates": n, **values} for n in range(1, FEWEST + 1)]


def titles(rows, **config):
    return [concern.title for concern in concerns(CONFIG | config, rows, 6)]


@pytest.mark.parametrize(
    ("values", "title"),
    [
        ({"search/visit_entropy": 0.05}, "Entropy collapsed"),
        ({"search/visit_entropy": 1.79}, "Searches undecided"),
        ({"search/priority_age": 1001.0}, "Stale priorities"),
        ({"train/skipped_updates": 3}, "Updates skipped"),
        ({"train/value_abs_max": 0.95 * greatest_value(30)}, "Values at their limit"),
        ({"train/value_target": 101.0, "charts/episodic_return": 900.0}, "Values out of line with returns"),
        ({"train/value_target": 1.0, "charts/episodic_return": -20.0}, "Values out of line with returns"),
    ],
)
def test_what_is_wrong_with_a_run_is_said_once_there_are_rows_enough(values, title):
    assert titles(training(**values)) == [title]
    if title != "Updates skipped":
        assert titles(training(**values)[1:]) == []


def test_a_run_in_order_has_no_warning_and_clipped_values_may_be_below_raw_returns():
    fine = {
        "search/visit_entropy": 1.0, "search/priority_age": 200.0, "train/skipped_updates": 0, "train/value_abs_max": 5.0,
        "train/value_target": 3.0, "charts/episodic_return": 9000.0,
    }  # fmt: skip
    assert titles(training(**fine)) == []
    raw = {"train/value_target": 3.0, "charts/episodic_return": 1.0}
    assert titles(training(**raw), clip_reward=False) == ["Values out of line with returns"]


def test_runs_that_differ_in_the_seed_alone_are_one_group(recorded):
    runs = {
        "a": recorded("Catch-v0", 0), "b": recorded("Catch-v0", 1), "c": recorded("Catch-v0", 0, lr=0.5, folder="other"),
    }  # fmt: skip
    groups = grouped(runs)
    assert [[name for name, _ in group.runs] for group in groups] == [["a", "b"], ["c"]]
    assert [group.name for group in groups] == ["lr 0.2", "lr 0.5"]


def test_the_time_between_two_rows_goes_to_the_phase_of_the_later():
    counts = [(100, 0, 1.0), (200, 0, 2.0), (200, 0, 5.0), (300, 10, 9.0), (300, 20, 16.0)]
    rows = [{"env_steps": steps, "updates": updates, "wall_s": seconds} for steps, updates, seconds in counts]
    assert phase_seconds(rows) == [2.0, 3.0, 4.0, 7.0]


class Links(HTMLParser):
    """What a page would load."""

    def __init__(self):
        super().__init__()
        self.found, self.texts, self.open = [], [], []

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href") and tag != "a"]

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_is_one_file_that_shows_scores_warnings_settings_videos_and_trees(recorded, monkeypatch, capsys):
    one = recorded("Pong-v5", 0, mean=14.6, human_normalised=1.0, skipped=7)
    two = recorded("Pong-v5", 1, mean=0.0, human_normalised=None, cut=[True] * 4, distinct_games=1, skipped=0)
    (one.folder / "watch.mp4").write_bytes(b"film")
    (one.folder / "tree_40.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    out = one.folder / "page.html"
    monkeypatch.setattr(sys, "argv", ["report", str(one.folder), str(two.folder), "--out", str(out)])
    report.main()
    links = Links()
    links.feed(out.read_text())
    assert all(link.startswith("data:") for link in links.found), "it needs nothing beside it"
    assert len(links.found) == 3
    text = " ".join(" ".join(links.texts).split())
    assert "7 of 30 updates were skipped" in text
    assert "4 (4 cut, 1 distinct)" in text
    assert "1.000" in text
    assert "What differs between the runs" in text
    assert "2 seeds, IQM" in out.read_text()


def test_what_is_no_run_is_refused_in_one_line_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path), "--out", str(tmp_path / "page.html")])
    with pytest.raises(SystemExit, match=r"^error: .*: no run there"):
        report.main()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RunError, match="given twice"):
        page([tmp_path, tmp_path])


def test_texts_from_files_are_no_markup(recorded):
    run = recorded("Catch-v0", 0)
    config = json.loads((run.folder / "config.json").read_text()) | {"preset": "<script>alert(1)</script>"}
    (run.folder / "config.json").write_text(json.dumps(config))
    assert "<script>alert" not in page([run.folder])
    assert read(run.folder).config["preset"].startswith("<script>")


def test_a_chart_places_points_by_hand():
    text = chart(
        [Line([0, 10], [0.0, 1.0], "s0", "a")], label="l", x_name="x", x_format=str, y_format=str, width=360, height=210,
        levels=[Level(1.02, "near"), Level(50.0, "far")],
    )  # fmt: skip
    assert 'd="M56.0 ' in text  # x = 0 at the left margin
    assert "L346.0 " in text  # x = 10 at the right one
    assert "near" in text
    assert "far" not in text, "it would flatten the curve"
    assert ticks(0, 10, 4) == [0, 5, 10]
    assert ticks(-21, -9.5, 4) == [-20, -15, -10]
