"""What is no file where one should be, or a file of another kind: refused at once and in one line by all that read files."""

import os
from pathlib import Path

import pytest
import torch

from speedyzero.__main__ import main
from speedyzero.config import ConfigError
from speedyzero.evaluate import evaluate_run, read_config
from speedyzero.run import checkpoint
from speedyzero.run.checkpoint import CheckpointError, DamagedError
from speedyzero.run.frames import FrameStore
from tests.run.bad_files_support import in_time as in_time
from tests.run.bad_files_support import refused, resume
from tests.run.bad_files_support import run as run
from tests.run.bad_files_support import runs as runs

PLACES = {
    "a pipe": (os.mkfifo, "not a regular file"),
    "/dev/zero": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "a folder": (Path.mkdir, "Is a directory"),
    "a link to itself": (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    "what cannot be read": (lambda path: path.symlink_to("/proc/self/mem"), "Input/output error"),
}


@pytest.mark.parametrize("name", PLACES)
def test_what_is_no_file_is_refused_at_once_wherever_a_file_is_read(run, name):
    put, says = PLACES[name]
    for path in run.paths.values():
        path.unlink()
        put(path)
    assert f"config.json: cannot be read ({says})" in refused(ConfigError, read_config, run.directory)
    run.put("config", None)
    path = run.paths["checkpoint"]
    for read in (checkpoint.load, checkpoint.read_meta):
        assert f"{path.name} cannot be read ({says})" in refused(CheckpointError, read, path)
    assert f"cannot be read ({says})" in refused(CheckpointError, evaluate_run, run.directory, 1, "cpu", 0, str(path))
    assert f"cannot be read ({says})" in refused(CheckpointError, checkpoint.newest_whole, run.checkpoints, print)
    assert os.path.lexists(path), "it is not put aside as damaged: it was not read"
    into = torch.zeros(4, 24, 1, 10, 5)
    assert f"cannot be read ({says})" in refused(CheckpointError, FrameStore(run.checkpoints / "frames").read, into, 25)


@pytest.mark.parametrize("target", ["config", "checkpoint"])
def test_the_program_says_so_in_one_line_and_ends(run, capsys, target):
    run.paths[target].unlink()
    os.mkfifo(run.paths[target])
    with pytest.raises(SystemExit) as end:
        main(["--resume", "--run-dir", str(run.directory)])
    assert end.value.code.startswith(f"error: {run.paths[target]}")
    assert "not a regular file" in end.value.code
    assert "\n" not in end.value.code


def test_files_of_other_kinds_are_refused_in_each_others_places(run):
    good = dict(run.good)
    for target, error, read in (
        ("config", ConfigError, lambda: read_config(run.directory)),
        ("checkpoint", CheckpointError, lambda: checkpoint.load(run.paths["checkpoint"])),
        ("frames", CheckpointError, lambda: FrameStore(run.checkpoints / "frames").read(torch.zeros(4, 24, 1, 10, 5), 25)),
    ):
        for other, contents in (*good.items(), ("empty", b""), ("picture", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")):
            if other != target and (target, other) != ("checkpoint", "frames"):  # a piece is in a checkpoint's format
                run.paths[target].write_bytes(contents)
                refused(error, read)
        run.paths[target].write_bytes(good[target])
    run.paths["checkpoint"].write_bytes(good["frames"])
    assert "is a checkpoint of None" in refused(CheckpointError, resume, run)
    assert "does not say how far" in refused(DamagedError, evaluate_run, run.directory, 1, "cpu", 0)
