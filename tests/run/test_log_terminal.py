"""The terminal of a run: nothing that becomes of it ends the run, and the display leaves no file or thread behind."""

import contextlib
import io
import os
import sys
import threading

import pytest
from rich.live import Live

from tests.run.log_support import clock_of, iterations
from tests.run.test_log import a_row, curve, run_log


@pytest.fixture
def clock(monkeypatch):
    return clock_of(monkeypatch)


@pytest.mark.parametrize("live", [False, True])
def test_opening_and_closing_leaves_no_open_files_and_no_threads(tmp_path, capsys, live):
    def files() -> list[str]:
        return sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}"))

    before, threads = files(), set(threading.enumerate())
    for n in range(50):
        with run_log(tmp_path, resume_at=n, live=live) as log:
            log.row(a_row(n + 1))
            assert live or (files() == before and set(threading.enumerate()) == threads)
        with pytest.raises(FileExistsError):
            run_log(tmp_path)
    assert files() == before
    for thread in set(threading.enumerate()) - threads:  # the display's look twice a second whether they shall end
        thread.join(timeout=5)
    assert set(threading.enumerate()) == threads


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
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("stream", [full_disk, pipe, terminal])
def test_a_terminal_that_takes_nothing_more_ends_nothing(tmp_path, clock, monkeypatch, stream, live, early):
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
    if early:
        leave()
    with run_log(tmp_path, live=live) as log:
        log.row(a_row(1))
        if not early:
            tried.clear()
            leave()
        for iteration in (2, 3):
            clock.now += 20
            log.row(a_row(iteration))
            log.message("checkpoint saved")
        if live and not early and stream is not full_disk:  # there the display never began
            assert tried.wait(timeout=5)
        log.row(a_row(4))
    assert sys.stdout is out
    assert sys.stderr is err
    assert iterations(tmp_path) == [1, 2, 3, 4]
    assert [step for step, _ in curve(tmp_path, "updates")] == [1, 2, 3, 4]
    with contextlib.suppress(OSError):
        out.close()
