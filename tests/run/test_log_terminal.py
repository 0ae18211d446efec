"""The terminal of a run: its lines, its bar, and that nothing that happens to it ends the run."""

import contextlib
import io
import os
import re
import sys
import threading

import pytest
from rich.console import Console
from rich.live import Live

from speedyzero.run.display import Display, Status, line
from tests.run import log_support
from tests.run.log_support import a_row, iterations, run_log, said

clock = log_support.clock

CONFIG = {"env": "Catch-v0", "preset": "cpu", "seed": 3, "device": "cuda"}


def test_the_first_line_names_the_run_and_the_last_what_to_do_next(tmp_path, capsys):
    with run_log(tmp_path, config=CONFIG, total_env_steps=80, total_updates=40) as log:
        log.row(a_row(10))
        log.message("played 2 games")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Catch-v0, preset cpu, seed 3, device cuda, in {tmp_path}"
    assert lines[2] == "played 2 games"
    assert lines[3].endswith(str(tmp_path))
    assert f"python -m speedyzero.evaluate {tmp_path}" in lines[4]
    assert f"tensorboard --logdir {tmp_path}" in lines[5]


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_that_is_not_complete_or_failed_is_not_called_done(tmp_path, capsys, fails):
    with contextlib.suppress(RuntimeError), run_log(tmp_path, total_env_steps=80, total_updates=40) as log:
        log.row(a_row(10 if fails else 9))
        if fails:
            raise RuntimeError("boom")
    assert said(capsys, "done") == []


def test_without_a_terminal_lines_are_ten_seconds_apart_with_the_first_the_last_and_the_one_before_a_message(tmp_path, clock, capsys):
    with run_log(tmp_path, live=None) as log:
        for iteration in range(1, 28):
            clock.now += 1
            log.row(a_row(iteration))
            if iteration == 5:
                log.message("saved")
    log.close()
    lines = [text.split("  ")[0] for text in capsys.readouterr().out.splitlines()[1:]]
    assert lines == ["env_steps 8/20000", "env_steps 40/20000", "saved", *(f"env_steps {8 * n}/20000" for n in (15, 25, 27))]


def status(**changes) -> Status:
    fields = {
        "wall_s": 60.0, "env_steps": 1200, "updates": 400, "total_env_steps": 20_000, "total_updates": 1600, "env_steps_per_s": 41.2,
        "updates_per_s": 200.0, "eta_s": 458.5, "metrics": {},
    }  # fmt: skip
    return Status(**(fields | changes))


def test_a_line_shows_what_is_known_and_counts_updates_in_the_learn_phase():
    metrics = {"charts/episodic_return": 0.35, "losses/loss": 3.21, "search/priority_age": 96.4}
    assert line(status(metrics=metrics)) == (
        "env_steps 1200/20000  updates 400  return 0.35  loss 3.21  41 steps/s  priority_age 96.4  eta 7m38s"
    )
    learning = status(env_steps=20_000, env_steps_per_s=None, eta_s=29_100)
    assert line(learning) == "env_steps 20000/20000  updates 400/1600  200 updates/s  eta 8h05m"
    counts = [(0, 0), (2000, 0), (2000, 8), (20_000, 8), (20_000, 1600)]
    assert [status(env_steps=a, updates=b).phase for a, b in counts] == ["collect", "collect", "train", "learn", "done"]


@pytest.mark.parametrize("width", [80, 120])
def test_the_bar_is_two_lines_that_fit_and_never_goes_back(clock, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    totals = {"total_env_steps": 100_000, "total_updates": 120_000}
    metrics = {"charts/episodic_return": -20.71, "losses/loss": 1234.5, "search/priority_age": 96.4}
    display = Display(status(env_steps=0, updates=0, eta_s=None, **totals), True, clock)
    shares = []
    for env_steps, updates in [(22_000, 0), (100_000, 10_000), (100_000, 65_000), (100_008, 120_000)]:
        display.show(status(env_steps=env_steps, updates=updates, metrics=metrics, **totals))
        console = Console(file=io.StringIO(), width=width)
        console.print(display._drawn())
        bar, numbers = console.file.getvalue().splitlines()
        assert "eta 7m38s" in bar
        assert " 41 steps/s" in numbers or " 200 up" in numbers
        assert len(bar) <= width
        assert len(numbers) <= width
        shares.append(re.search(r"(\d+)%", bar)[1])
    display.close()
    assert shares == ["10", "50", "75", "100"]


@pytest.mark.parametrize("live", [False, True])
def test_opening_and_closing_leaves_no_open_files_and_no_threads(tmp_path, capsys, live):
    def files() -> list[str]:
        return sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}"))

    before, threads = files(), set(threading.enumerate())
    for n in range(10):
        with run_log(tmp_path, resume_at=n, live=live) as log:
            log.row(a_row(n + 1))
            assert live or files() == before
        with pytest.raises(FileExistsError):
            run_log(tmp_path)
    assert files() == before
    for thread in set(threading.enumerate()) - threads:  # the display's look twice a second whether they shall end
        thread.join(timeout=5)
    assert set(threading.enumerate()) <= threads  # an earlier test's display may have ended meanwhile


def full_disk():
    """A stream on a full disk, and nothing more to do to it."""
    return open("/dev/full", "wb", buffering=0), lambda: None


def pipe():
    """A stream into a pipe, and how to make its reader leave."""
    reader, writer = os.pipe()
    return open(writer, "wb", buffering=0), lambda: os.close(reader)


def terminal():
    """A stream to a terminal, and how to hang up."""
    theirs, mine = os.openpty()
    return open(mine, "wb", buffering=0), lambda: os.close(theirs)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("stream", [full_disk, pipe, terminal])
def test_a_terminal_that_takes_nothing_more_ends_nothing(tmp_path, clock, monkeypatch, stream, live):
    refresh, tried = Live.refresh, threading.Event()

    def refresh_and_tell(display):
        try:
            refresh(display)
        finally:
            if threading.current_thread() is not threading.main_thread():
                tried.set()

    monkeypatch.setattr(Live, "refresh", refresh_and_tell)
    raw, leave = stream()
    out, err = io.TextIOWrapper(raw, write_through=True), sys.stderr
    monkeypatch.setattr(sys, "stdout", out)
    with run_log(tmp_path, live=live) as log:
        log.row(a_row(1))
        tried.clear()
        leave()
        for iteration in (2, 3):
            clock.now += 20
            log.row(a_row(iteration))
            log.message("checkpoint saved")
        if live and stream is not full_disk:  # there the display never began
            assert tried.wait(timeout=5)
        log.row(a_row(4))
    assert sys.stdout is out
    assert sys.stderr is err
    assert iterations(tmp_path) == [1, 2, 3, 4]
    with contextlib.suppress(OSError):
        out.close()
