"""The watchdog ends what does not end, in the process itself, and leaves everything else alone. No test waits for a clock."""

import subprocess
import sys
import textwrap
import threading
from types import SimpleNamespace

import pytest

from speedyzero.run import guard
from speedyzero.run.guard import STUCK, Watchdog


class Told(threading.Condition):
    """A condition whose time is over when a test says so."""

    def __init__(self):
        super().__init__()
        self.over, self.entered = False, threading.Event()

    def wait_for(self, predicate, timeout):
        self.predicate, self.limit = predicate, timeout
        self.entered.set()
        super().wait_for(lambda: predicate() or self.over)
        return predicate()


@pytest.fixture
def condition(monkeypatch):
    condition = Told()
    monkeypatch.setattr(guard, "threading", SimpleNamespace(Condition=lambda: condition, Thread=threading.Thread))
    return condition


def test_every_round_has_the_whole_limit_however_long_they_take_together(condition):
    ended = []
    dog = Watchdog(1.5, lambda limit: "stuck", ended.append)
    with dog.watch():
        condition.entered.wait()
        of_the_first = condition.predicate
        assert condition.limit == 1.5
        assert not of_the_first()
    assert of_the_first(), "it has ended in time"
    with condition, dog.watch():  # the watchdog sleeps through the end of a round and the start of the next
        assert of_the_first(), "its limit is not that of the next"
    condition.over = True  # nothing is watched
    dog.close()
    assert ended == []


def test_what_does_not_end_in_time_is_ended_with_its_line(condition, capsys):
    codes, ended = [], threading.Event()
    dog = Watchdog(0.1, lambda limit: f"it hangs for {limit} s", lambda code: (codes.append(code), ended.set()))
    with dog.watch():
        condition.entered.wait()
        with condition:
            condition.over = True
            condition.notify_all()
        ended.wait()
    dog.close()
    assert codes == [STUCK]
    assert capsys.readouterr().err == "error: it hangs for 0.1 s\n"


def test_a_hung_emulator_ends_the_run_with_the_stage_and_what_was_saved(tmp_path):
    """The whole command: emulators that never answer again, in a process that would wait for ever. The time is over when they hang."""
    code = f"""
        import threading, types
        from speedyzero import envs
        from speedyzero.__main__ import main
        from speedyzero.run import guard
        hung, recv, calls = threading.Event(), envs.Emulators.recv, []
        class Told(threading.Condition):
            def wait_for(self, predicate, timeout):
                while not (super().wait_for(predicate, 0.05) or hung.is_set()):
                    pass
                return predicate()
        guard.threading = types.SimpleNamespace(Condition=Told, Thread=threading.Thread)
        def hang(self):
            calls.append(1)
            if len(calls) == 40:
                hung.set()
                threading.Event().wait()
            recv(self)
        envs.Emulators.recv = hang
        main("--env Catch-v0 --preset smoke --watchdog 5 --checkpoint-interval 10 --run-dir {tmp_path / "run"}".split())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == STUCK, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: iteration ")
    assert "is stuck in stage 6 join for 5 s (--watchdog); go on from " in last
    assert last.endswith(f"--resume --run-dir {tmp_path / 'run'}")
