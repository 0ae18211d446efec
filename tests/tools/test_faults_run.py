"""tools/faults/run.py: what a run says, and the rows of its metrics.jsonl, as the tools read them."""

import json

from tests.tools.faults_support import run as runs


def test_what_a_run_says_is_kept_with_what_was_said_before_and_told_alone(tmp_path):
    (tmp_path / "output.txt").write_text("before\n")
    run = runs.Run(["--env", "NoSuch-v0"], tmp_path / "output.txt")
    assert run.process.wait(120) == 1
    assert run.last_line().startswith("error: --env NoSuch-v0")
    assert "before" not in run.said()
    assert (tmp_path / "output.txt").read_text() == "before\n" + run.said()
    run.end()


def test_a_torn_last_line_is_no_row_and_any_other_is_a_fault():
    good = b'{"iteration": 1, "env_steps": 8, "updates": 0}\n'
    assert runs.rows_of(b"") == ([], [])
    assert runs.rows_of(good + good[:-9]) == ([json.loads(good)], [])
    found, wrong = runs.rows_of(good[:-9] + b"\n" + good + b'{"iteration": 1.0, "env_steps": 8, "updates": 0}\n')
    assert found == [json.loads(good)]
    assert [line.partition(":")[0] for line in wrong] == ["line 1", "line 3"]
