"""The terminal of a run: its lines, its bar, and that nothing that happens to it ends the run."""

import contextlib
import dataclasses
import io
import os
import sys
import threading

import pytest
from rich.live import Live

from speedyzero import schedule
from speedyzero.config import preset_config
from speedyzero.run.display import Status
from tests.run import log_support
from tests.run.log_support import a_row, iterations, run_log, said

clock = log_support.clock

def test_the_first_line_names_the_run_and_the_last_what_to_do_next(tmp_path, capsys):
    config = {"env": "Catch-v0", "preset": "cpu", "seed": 3, "device": "cuda"}
    with run_log(tmp_path, config=config, total_env_steps=80, total_updates=40) as log:
        log.row(a_row(10))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Catch-v0, preset cpu, seed 3, device cuda, in {tmp_path}"
    commands = [line.partition(":")[2].strip() for line in lines[-4:]]
    python = [f"python -m speedyzero.{tool} {tmp_path}" for tool in ("watch", "report", "evaluate")]
    assert commands == [*python[:2], f"{python[2]} --episodes 100", f"tensorboard --logdir {tmp_path}"]


def test_the_bar_never_goes_back_from_phase_to_phase_and_ends_at_its_end():
    # Lanes that do not divide the steps: the last iteration of each kind goes beyond.
    config = dataclasses.replace(preset_config("cpu"), lanes=7, env_steps=1000, updates_per_iteration=3)
    counts, shown = schedule.Counts(), []
    while (phase := schedule.next_phase(config, counts)) is not None:
        counts = schedule.count(config, counts, phase, schedule.sweep_roots(config, counts.slots))
        status = Status(0.0, counts.env_steps, counts.updates, config.env_steps, config.total_updates, None, None, None, {})
        shown.append(status.done)
    assert shown == sorted(shown)
    assert shown[-1] == config.env_steps + config.total_updates


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
    lines = [text.split("  ")[0] for text in capsys.readouterr().out.splitlines()[1:]]
    assert lines == ["env_steps 8/20000", "env_steps 40/20000", "saved", *(f"env_steps {8 * n}/20000" for n in (15, 25, 27))]


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
        thread.join(timeout=60)
    assert set(threading.enumerate()) <= threads  # an earlier test's display may have ended meanwhile


def stream(kind: str):
    """A stream, and how its reader leaves: of a full disk there is none."""
    if kind == "full disk":
        return open("/dev/full", "wb", buffering=0), lambda: None
    theirs, mine = os.pipe() if kind == "pipe" else os.openpty()
    return open(mine, "wb", buffering=0), lambda: os.close(theirs)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("kind", ["full disk", "pipe", "terminal"])
def test_a_terminal_that_takes_nothing_more_ends_nothing(tmp_path, clock, monkeypatch, kind, live):
    refresh, tried = Live.refresh, threading.Event()

    def refresh_and_tell(display):
        try:
            refresh(display)
        finally:
            if threading.current_thread() is not threading.main_thread():
                tried.set()

    monkeypatch.setattr(Live, "refresh", refresh_and_tell)
    raw, leave = stream(kind)
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
        if live and kind != "full disk":  # there the display never began
            assert tried.wait(timeout=60)
        log.row(a_row(4))
    assert sys.stdout is out
    assert sys.stderr is err
    assert iterations(tmp_path) == [1, 2, 3, 4]
    with contextlib.suppress(OSError):
        out.close()
