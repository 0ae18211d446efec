"""The fuzz of `tools/faults/mutate.py` and its parts in `badfiles`: no spoilt file does harm, and harm would be seen."""

import sys
from pathlib import Path
from random import Random

import pytest

from speedyzero.config import ConfigError
from speedyzero.run.checkpoint import CheckpointError
from speedyzero.run.frames import FrameStore
from tests.run.bad_files_support import in_time as in_time
from tests.run.bad_files_support import run as run
from tests.run.bad_files_support import runs as runs

sys.path.append(str(Path(__file__).parents[2] / "tools" / "faults"))

import mutate
from badfiles import victim, worker
from badfiles.run import Case


def test_files_spoilt_in_every_way_are_refused_in_one_line_or_do_no_harm(runs):
    done = mutate.run_cases(runs, 220, seed=1, batch=220)
    assert [case for case in done if case["outcome"] == "failed"] == []
    assert [case["case"] for case in done] == list(range(220))
    assert {case["kind"].split(":")[0] for case in done} == {kind.target + " " + kind.name.split(":")[0] for kind in worker.KINDS}
    assert sum(case["outcome"] == "refused" for case in done) > 150
    assert sum(case["outcome"] == "accepted" for case in done) > 10
    harmless = ("damage: nothing", "everything twice", "metadata more")
    assert [case for case in done if (case["outcome"] == "same") != case["kind"].endswith(harmless)] == []


WORSE = """
import os, signal, time
from badfiles import worker
from badfiles.victim import Outcome

def meet(run, target, case, calls=[]):
    calls.append(1)
    if len(calls) == 4 and not os.path.exists("died"):
        open("died", "w").close()
        os.kill(os.getpid(), signal.SIGSEGV)
    if len(calls) == 5:
        bytes(bytearray(200 << 20))
    if len(calls) == 6:
        time.sleep(60)
    return Outcome("refused", "no")

worker.meet, worker.LIMIT = meet, 1
worker.main()
"""


def test_a_process_that_dies_grows_or_hangs_is_named_and_the_cases_after_it_are_run(runs, tmp_path, monkeypatch):
    """Two calls come before the first case of each process."""
    (tmp_path / "worse.py").write_text(WORSE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    done = mutate.run_cases(runs, 7, batch=40, worker="worse")
    assert [case["case"] for case in done] == list(range(7))
    failed = {case["case"]: case["why"] for case in done if case["outcome"] == "failed"}
    assert failed.pop(1).startswith("ended the process by SIGSEGV")
    assert 380 < int(failed.pop(4).removeprefix("took ").removesuffix(" MiB")) < 420
    assert failed == {5: "hung: the process was ended"}


def test_a_worker_that_cannot_start_is_told(runs):
    with pytest.raises(RuntimeError, match=r"outside of a case, a process ended .* exit code 1: .*No module named"):
        mutate.run_cases(runs, 3, worker="badfiles.nothing")


def test_a_case_is_the_same_whenever_it_is_made_and_every_kind_is_among_a_thousand(run):
    def spoilt(kind):
        case = kind.make(Random(f"7 {kind.name}"), run)
        return case.expect, case.note, case.spoilt if isinstance(case.spoilt, bytes) else None

    some = worker.KINDS[::4]
    assert [spoilt(kind) for kind in some] == [spoilt(kind) for kind in some]
    assert {kind.name for _, kind in worker.plan(1000, 0)} == {kind.name for kind in worker.KINDS}
    some = worker.plan(1000, 0, "frames pieces")
    assert len(some) > 20
    assert [pair for pair in worker.plan(1000, 0) if pair[1].target == "frames" and "pieces" in pair[1].name] == some
    assert worker.plan(40, 0) == worker.plan(1000, 0)[:40] != worker.plan(1000, 1)[:40]


def test_what_a_spoilt_file_does_is_judged_by_what_it_was_to_do(run, monkeypatch):
    good = run.good["frames"]
    assert victim.meet(run, "frames", Case(good, "same")).what == "same"
    assert victim.meet(run, "frames", Case(good, "accepted")).what == "same"
    assert victim.meet(run, "frames", Case(good, "refused")).what == "failed"
    assert victim.meet(run, "frames", Case(b"other", "same")).what == "failed"
    assert victim.meet(run, "frames", Case(b"other", "either")).what == "accepted"
    run.put("frames", bad := Case(good[:-1], "refused"))
    assert victim.meet(run, "frames", bad).what == "refused"
    assert victim.meet(run, "frames", Case(good[:-1], "accepted")).what == "failed"
    for error in (KeyError("x"), CheckpointError("two\nlines"), CheckpointError(""), CheckpointError("x" * 2000), SystemExit(1)):
        def refuse(*_, error=error):
            raise error

        monkeypatch.setattr(FrameStore, "read", refuse)
        assert victim.meet(run, "frames", bad).what == "failed", error
    monkeypatch.undo()
    assert victim.meet(run, "checkpoint", Case(b"", "refused")).what == "failed"
    run.put("checkpoint", None)
    run.put("frames", None)
    assert {path.read_bytes() for path in run.paths.values()} == set(run.good.values())


@pytest.mark.parametrize("line", ["", "two\nlines", "\x1b[2J", "\ud800", "x" * 801])
def test_what_is_not_one_printable_line_is_no_refusal(line):
    assert victim.refusal(ConfigError("--lr é: " + "x" * 700)).startswith("--lr")
    with pytest.raises(victim.BadLine):
        victim.refusal(ConfigError(line))


def test_the_table_counts_kinds_by_outcome():
    outcomes = ("refused", "refused", "same", "failed")
    done = [{"kind": kind, "outcome": outcome} for kind, outcome in zip("aaab", outcomes, strict=True)]
    rows = [line.split() for line in mutate.table(done).splitlines()]
    assert rows == [
        ["tried", "refused", "accepted", "equivalent", "failed"], ["a", "3", "2", "0", "1", "0"], ["b", "1", "0", "0", "0", "1"],
        ["all", "4", "2", "0", "1", "1"],
    ]  # fmt: skip
