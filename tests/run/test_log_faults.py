"""What the logs live through: a full disk, a deleted run directory."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.run import log_support
from tests.run.log_support import a_row, curve, file_size_limit, iterations, run_log, said

clock = log_support.clock


def test_rows_that_do_not_fit_are_lost_whole_with_one_line_and_counted_when_there_is_room_again(tmp_path, clock, capsys):
    with run_log(tmp_path) as log:
        log.row(a_row(1))
        size = (tmp_path / "metrics.jsonl").stat().st_size
        with file_size_limit(size + 20):
            log.row(a_row(2))
            log.row(a_row(3))
            assert (tmp_path / "metrics.jsonl").stat().st_size == size
        log.row(a_row(4))
        log.row(a_row(5))
    lines = [text.split("  ")[0] for text in capsys.readouterr().out.splitlines()[1:]]
    assert lines == [
        "env_steps 8/20000",
        "env_steps 16/20000",
        "metrics.jsonl: rows are being lost (File too large)",
        "env_steps 32/20000",
        "metrics.jsonl: rows are written again; 2 lost",
        "env_steps 40/20000",
    ]
    assert iterations(tmp_path) == [1, 4, 5]
    assert [step for step, _ in curve(tmp_path, "updates")] == [8, 32, 40]


TINY_DISK = """
import pathlib, shutil, sys
import speedyzero.run.log
from tests.run.log_support import a_row, run_log
speedyzero.run.log.RETRY_S = 0.0
run_dir = pathlib.Path(sys.argv[1])
ballast = run_dir / "ballast"
with run_log(run_dir) as log:
    for iteration in range(1, 6):
        log.row(a_row(iteration, number=1 / 3))
    with open(ballast, "wb", buffering=0) as file:
        try:
            while file.write(bytes(512)):
                pass
        except OSError as error:
            assert error.errno == 28
    for iteration in range(6, 200):
        log.row(a_row(iteration, number=1 / 3))
    ballast.unlink()
    for iteration in range(200, 206):
        log.row(a_row(iteration, number=1 / 3))
shutil.copytree(run_dir, sys.argv[2])
"""


def test_a_disk_that_really_fills_and_is_emptied_again(tmp_path):
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=64k none {disk}"
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("a disk cannot be mounted here")
    program = ["unshare", "-rm", "sh", "-c", f'{mount} && exec "{sys.executable}" -c "$0" {disk} {copy}', TINY_DISK]
    done = subprocess.run(program, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
    got = iterations(copy)
    lost = 205 - len(got)
    assert 100 < lost < 200
    assert [line for line in done.stdout.splitlines() if line.startswith("metrics")] == [
        "metrics.jsonl: rows are being lost (No space left on device); make room",
        f"metrics.jsonl: rows are written again; {lost} lost",
    ]
    assert got == [*range(1, len(got) - 5), *range(200, 206)]
    assert [step for step, _ in curve(copy, "updates")] == [8 * iteration for iteration in got]


@pytest.mark.parametrize("moved", [False, True])
def test_after_the_run_directory_is_deleted_or_moved_the_logs_begin_again_there(tmp_path, capsys, moved):
    run_dir, away = tmp_path / "a" / "run", tmp_path / "away"
    with run_log(run_dir) as log:
        log.row(a_row(1))
        run_dir.rename(away) if moved else shutil.rmtree(tmp_path / "a")
        log.row(a_row(2))
        log.row(a_row(3))
    assert said(capsys, "deleted") == [f"{run_dir}/metrics.jsonl was deleted while running: it begins again"]
    assert iterations(run_dir) == [2, 3]
    assert [step for step, _ in curve(run_dir, "updates")] == [16, 24]
    if moved:
        assert iterations(away) == [1]
        assert [step for step, _ in curve(away, "updates")] == [8]
