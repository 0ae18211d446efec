"""The suite: what is run, resumed, left alone, and what comes of it. Processes are stand-ins that leave the files of a run."""

import io
import json
import os
import re
import signal
import sys
import threading

import pytest

from speedyzero import suite
from speedyzero.config import ConfigError
from speedyzero.suite import Run, Slot, Suite, plan_for, prepared, results, slots_for, work

CPU = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Three runs. `script`: what the process of a run does, by its name; by default it completes it."""
    monkeypatch.setattr(suite, "POLL_S", 0.01)
    script = {}
    complete = "import sys, pathlib; d = pathlib.Path(sys.argv[1]); d.mkdir(exist_ok=True); (d / 'summary.json').touch()"
    monkeypatch.setattr(Run, "command", lambda run, flags: [sys.executable, "-c", script.get(run.name, complete), str(run.folder), *flags])
    made = [Run("Catch-v0", seed, tmp_path / f"seed{seed}") for seed in range(3)]
    made[0].script = script
    return made


def test_missing_runs_are_done_complete_ones_left_alone_and_a_failure_does_not_stop_the_others(runs):
    runs[0].folder.mkdir()
    (runs[0].folder / "summary.json").touch()
    runs[0].script["seed1"] = "import sys; print('starting'); sys.exit('error: no room')"
    lines = []
    many = Suite(runs, [Slot("job 0", CPU), Slot("job 1", CPU)], ["--lr", "1"], lines.append)
    work(many, suite.Console(file=open(os.devnull, "w")))  # noqa: SIM115
    assert [run.state for run in runs] == ["done", "failed", "done"]
    assert runs[0].tries == 0
    assert runs[1].why == "error: no room"
    assert sorted(" ".join(line.split()[:2]) for line in lines) == ["seed1 failed:", "seed1 starts", "seed2 is", "seed2 starts"]


def test_the_live_table_keeps_its_colours_when_a_line_is_printed_above_it(runs):
    out = io.StringIO()
    console = suite.Console(file=out, force_terminal=True, width=60)
    runs[1].state = "failed"
    with suite.Live(suite.live_table(Suite(runs, [], [], print), suite.time.monotonic()), console=console, auto_refresh=False) as live:
        live.refresh()
        suite.say(console, "seed1 failed: error: --lr [bold]: no number")
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert "seed1 failed: error: --lr [bold]: no number\n" in shown
    assert shown.count("0 of 3 runs complete, 0 s at work\n") > 1
    assert not re.search(r"\[(green|red|yellow|dim)\]", shown)


def test_a_stuck_run_is_tried_again_and_not_for_ever(runs):
    runs[1].folder.mkdir()
    runs[0].script["seed1"] = "import sys; sys.exit(70)"
    many = Suite(runs[1:2], [Slot("job 0", CPU)], [], lambda line: None)
    work(many, suite.Console(file=open(os.devnull, "w")))  # noqa: SIM115
    assert (runs[1].state, runs[1].tries) == ("failed", suite.MOST_TRIES)


@pytest.mark.parametrize("numbers", [[signal.SIGINT], [signal.SIGHUP, signal.SIGHUP]])
def test_a_signal_lets_the_runs_at_work_save_and_starts_no_other(runs, tmp_path, numbers):
    runs[0].script["seed0"] = """
import pathlib, signal, sys, time
def save(*_):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(0.2)
    pathlib.Path(sys.argv[1] + ".saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
pathlib.Path(sys.argv[1] + ".ready").touch()
time.sleep(60)
"""
    many = Suite(runs, [Slot("job 0", CPU)], [], lambda line: None)
    # Either is ignored where the tests run in the background of a shell or under nohup.
    before = {number: signal.signal(number, signal.default_int_handler) for number in set(numbers)}

    def interrupt():
        while not (tmp_path / "seed0.ready").exists():
            pass
        for number in numbers:
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    work(many, suite.Console(file=open(os.devnull, "w")))  # noqa: SIM115
    thread.join()
    assert (tmp_path / "seed0.saved").exists()
    assert [run.state for run in runs] == ["waiting"] * 3
    assert many.stopped_by == numbers[0]
    for number, handler in before.items():
        assert signal.signal(number, handler) == signal.default_int_handler


def test_a_run_that_was_begun_is_resumed_with_its_own_settings(tmp_path):
    run = Run("Pong-v5", 2, tmp_path / "Pong-v5_seed2")
    new = ["--env", "Pong-v5", "--seed", "2", "--run-dir", str(run.folder), "--lr", "1"]
    assert run.command(["--lr", "1"])[3:] == new
    run.folder.mkdir()
    (run.folder / "config.json").write_text('{"env_steps": 400}')
    assert run.command(["--lr", "1"])[3:] == ["--resume", "--run-dir", str(run.folder)]
    (run.folder / "metrics.jsonl").write_text('{"env_steps": 50}\n{"env_steps": 100}\n{"env_st')
    assert run.progress() == 0.25


def test_one_process_runs_on_each_device(monkeypatch):
    monkeypatch.setattr(suite.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in slots_for(None, [])] == ["4", "7"]
    assert [slot.on_cpu for slot in slots_for(3, ["--device=cpu"])] == [True] * 3
    with pytest.raises(ConfigError, match="--jobs 3: one process runs on each of the 2 CUDA devices"):
        slots_for(3, [])


def test_a_suite_keeps_its_flags_and_the_threads_of_its_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "usable_cores", lambda: 8)
    plan = plan_for(tmp_path, ["--lr", "1"], 2)
    assert plan.run_flags == ["--lr", "1", "--threads", "4"]
    assert plan_for(tmp_path, ["--threads", "1"], 2).run_flags == ["--threads", "1"]
    (tmp_path / "suite.json").write_text(json.dumps(vars(plan)))
    assert plan_for(tmp_path, ["--lr", "1"], 8) == plan
    with pytest.raises(ConfigError, match="its runs were made with '-- --lr 1'"):
        plan_for(tmp_path, ["--lr", "2"], 2)


def test_the_runs_of_atari26_are_78_and_flags_that_the_suite_gives_are_refused(tmp_path):
    runs, slots = prepared(suite.Arguments(tmp_path), ["--device", "cpu"])
    assert len({run.folder for run in runs}) == 78
    assert {run.seed for run in runs[:26]} == {0}, "every game once before a second seed"
    assert len(slots) == 1
    with pytest.raises(ConfigError, match="-- --seed=3: the suite gives it to each run itself"):
        prepared(suite.Arguments(tmp_path), ["--seed=3"])


def test_results_use_what_a_game_that_was_cut_may_not_be_used_for_nowhere(recorded):
    whole = recorded("Pong-v5", 0, mean=14.6, human_normalised=1.0)
    cut = recorded("Pong-v5", 1, mean=0.0, human_normalised=None, cut=[True])
    other = recorded("Boxing-v5", 0, mean=6.1, human_normalised=0.5)
    found = results([whole, cut, other])
    assert found["games"]["Pong-v5"] == {"scores": [14.6, 0.0], "mean": 7.3, "human_normalised": [1.0]}
    ours, theirs = found["aggregates"][:2]
    assert ours["cells"] == ["0.750", "0.750", "0.750", "0.250"]
    assert theirs["cells"] == ["1.943", "1.090", "", ""]
    out = io.StringIO()
    suite.print_results(found, suite.Console(file=out, width=80))
    rows = [line.split("│")[1].strip() for line in out.getvalue().split("rliable")[1].splitlines() if line.startswith("│")]
    assert [row for row in rows if row] == ["these runs", "EfficientZero"], "names whole, and none without a number"
