"""tools/faults/kill_test.py as a command: a run that is killed or stopped again and again ends as one that was not, or it says why not."""

import json
import signal
import sys

import pytest

from tests.tools.faults_support import SMALL, kill_test, tool


def test_a_run_that_is_killed_again_and_again_ends_as_one_that_was_not(tmp_path):
    done = tool("kill_test", *SMALL, "--kills", "4", "--checkpoint-interval", "10", "--json", str(tmp_path / "report.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["broken"] == []
    assert report["figures"]["kills"] == 4
    assert report["figures"]["lost_max"] < 20
    # A kill in the write of the summary may find that the process has just ended, complete.
    assert sum(life["came"] and life["code"] == -signal.SIGKILL for life in report["lives"]) >= 3
    assert "every promise kept" in done.stdout


def test_a_run_that_is_asked_to_stop_loses_nothing_and_says_so_with_its_exit_code(tmp_path):
    # Tests share their cores: the tool's own bound of 10 s is for a machine of one's own.
    flags = ["--kills", "2", "--signal", "SIGUSR1", "--seed", "3", "--checkpoint-interval", "30", "--alternate-ring", "--heed", "100"]
    done = tool("kill_test", *SMALL, *flags, "--json", str(tmp_path / "report.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["figures"]["lost_max"] == 0
    # The first is heeded for sure; the second, in an evaluation of a moment, may come when all is done.
    codes = [life["code"] for life in report["lives"] if life["came"]]
    assert codes[0] == 138
    assert set(codes[1:]) <= {138, -signal.SIGUSR1, 0}
    assert 0 < report["figures"]["said_s_max"] <= report["figures"]["exit_s_max"] <= 100


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--kills", "0"], "error: --kills 0: must be at least 1"),
        (["--resume"], "error: --resume, --checkpoint-ring: which life has them is decided here; leave them out"),
        (["--run-dir", "."], "error: --run-dir .: exists already; give another folder"),
    ],
)
def test_the_kill_test_refuses_what_it_cannot_do(arguments, says, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["kill_test.py", *arguments])
    monkeypatch.setattr(kill_test, "Run", None)  # what is refused starts nothing
    with pytest.raises(SystemExit) as left:
        kill_test.main()
    assert left.value.code == says
