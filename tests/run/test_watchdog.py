"""The watchdog ends what does not end, in the process itself, and leaves everything else alone. No test waits for a clock."""

import subprocess
import sys
import textwrap
import threading

import pytest

from speedyzero.run import guard
from speedyzero.run.guard import LOOKS, STUCK, Watchdog


class Clock:
    """A clock that a test sets. `set` returns once the watchdog has looked at it twice: the second look began after the change."""

    def __init__(self):
        self.now, self._looks = 0.0, threading.Semaphore(0)

    def __call__(self) -> float:
        if threading.current_thread().name == "watchdog":
            self._looks.release()
        return self.now

    def set(self, now: float) -> None:
        self.now = now
        while self._looks.acquire(blocking=False):
            pass
        for _ in range(2):
            self._looks.acquire()


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(guard, "monotonic", clock)
    return clock


LIMIT = 1e-3 * LOOKS  # it looks every millisecond


def test_every_round_has_the_whole_limit_however_long_they_take_together(clock):
    ended = []
    dog = Watchdog(LIMIT, lambda limit: "stuck", ended.append)
    for begin in (0.0, 0.9 * LIMIT):
        clock.set(begin)
        with dog.watch():
            clock.set(begin + 0.9 * LIMIT)
    clock.set(100.0)  # nothing is watched
    dog.close()
    assert ended == []


def test_what_does_not_end_in_time_is_ended_with_its_line(clock, capsys):
    codes, ended = [], threading.Event()
    dog = Watchdog(LIMIT, lambda limit: f"it hangs for {limit} s", lambda code: (codes.append(code), ended.set()))
    with dog.watch():
        clock.now = 1.1 * LIMIT
        ended.wait()
    dog.close()
    assert codes == [STUCK]
    assert capsys.readouterr().err == f"error: it hangs for {LIMIT} s\n"


def test_a_hung_emulator_ends_the_run_with_the_stage_and_what_was_saved(tmp_path):
    """The whole command: emulators that never answer again, in a process that would wait for ever. The time is over when they hang."""
    code = f"""
        import threading
        from speedyzero.emulators import Emulators
        from speedyzero.__main__ import main
        from speedyzero.run import guard
        hung, recv, calls = threading.Event(), Emulators.recv, []
        guard.monotonic = lambda: 1e9 if hung.is_set() else 0.0
        def hang(self):
            calls.append(1)
            if len(calls) == 40:
                hung.set()
                threading.Event().wait()
            recv(self)
        Emulators.recv = hang
        main("--env Catch-v0 --preset smoke --watchdog 5 --checkpoint-interval 10 --run-dir {tmp_path / "run"}".split())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == STUCK, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: iteration ")
    assert "is stuck in stage 6 join for 5 s (--watchdog); go on from " in last
    assert last.endswith(f"--resume --run-dir {tmp_path / 'run'}")
