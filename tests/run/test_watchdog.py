"""The watchdog ends what does not end, in the process itself, and leaves everything else alone."""

import subprocess
import sys
import textwrap
import threading
import time

from speedyzero.run.guard import STUCK, Watchdog


def test_rounds_that_end_in_time_are_left_alone_however_long_they_take_together():
    """Eight rounds of 0.2 s and a pause, of which each but not all together is within the limit."""
    ended = []
    dog = Watchdog(1.2, lambda limit: "stuck", ended.append)
    for _ in range(8):
        with dog.watch():
            time.sleep(0.2)
    time.sleep(1.5)  # nothing is watched
    dog.close()
    assert ended == []


def test_what_does_not_end_in_time_is_ended_with_its_line(capsys):
    codes, ended = [], threading.Event()

    def end(code):
        codes.append(code)
        ended.set()

    dog = Watchdog(0.1, lambda limit: f"it hangs for {limit} s", end)
    with dog.watch():
        assert ended.wait(20)
    dog.close()
    assert codes == [STUCK]
    assert capsys.readouterr().err == "error: it hangs for 0.1 s\n"


def test_a_hung_emulator_ends_the_run_with_the_stage_and_what_was_saved(tmp_path):
    """The whole command: emulators that never answer again, in a process that would wait for ever."""
    code = f"""
        import time
        from speedyzero import envs
        from speedyzero.__main__ import main
        recv, calls = envs.Emulators.recv, []
        def hang(self):
            calls.append(1)
            time.sleep(1000) if len(calls) == 40 else recv(self)
        envs.Emulators.recv = hang
        main("--env Catch-v0 --preset smoke --watchdog 5 --checkpoint-interval 10 --run-dir {tmp_path / "run"}".split())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == STUCK
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: iteration ")
    assert "is stuck in stage 6 join for 5 s (--watchdog); go on from " in last
    assert last.endswith(f"--resume --run-dir {tmp_path / 'run'}")
