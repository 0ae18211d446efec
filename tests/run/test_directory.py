"""One process on a run directory, a directory that is deleted, and signals: what a run says and what it leaves."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from speedyzero import loop
from speedyzero.config import ConfigError
from speedyzero.envs import describe
from speedyzero.loop import Trainer, train
from speedyzero.run import checkpoint
from speedyzero.run.directory import Lock
from speedyzero.run.guard import Interrupt, Interrupted
from speedyzero.run.saver import Saver
from speedyzero.run.trained import read_config

CPU = torch.device("cpu")


LOCK = """
import sys, pathlib
from speedyzero.run.directory import Lock
try:
    Lock(pathlib.Path(sys.argv[1])); print("locked")
except ValueError as error:
    print(error)
"""


def try_to_lock(run_dir) -> str:
    """What another process says that wants the directory."""
    return subprocess.run([sys.executable, "-c", LOCK, str(run_dir)], check=True, capture_output=True, text=True).stdout.strip()


def ends_alike(one, two) -> bool:
    """Whether the newest checkpoints of two run directories hold the same tensors."""
    (a, _), (b, _) = (checkpoint.load(checkpoint.latest(run_dir / "checkpoints")) for run_dir in (one, two))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def flip(path, at, bit=1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= bit
    path.write_bytes(data)


@pytest.fixture
def finished(tiny_config, tmp_path):
    """The config of a run that came to its end, and a copy of its directory."""
    config = tiny_config(checkpoint_interval=10, keep=3)
    assert train(config, describe(config.env), CPU) is None
    shutil.copytree(config.run_dir, tmp_path / "as it was")
    return config, tmp_path / "as it was"


def resume(config) -> signal.Signals | None:
    return train(dataclasses.replace(config, resume=True), describe(config.env), CPU)


def one_line(capsys) -> str:
    """What was printed since the last call, in one line."""
    return " ".join(capsys.readouterr().out.split())


def test_a_second_process_is_kept_out_until_the_first_ends(tmp_path):
    (tmp_path / "lock").write_text("x" * 300)  # as a killed process may leave it: it locks nobody out
    lock = Lock(tmp_path)
    holder = f"process {os.getpid()} on {os.uname().nodename}"
    assert try_to_lock(tmp_path) == f"--run-dir {tmp_path}: {holder} is training there; wait for it, stop it, or give another folder"
    (tmp_path / "lock").write_text("two\nlines")
    assert "another process is training there" in try_to_lock(tmp_path)
    lock.release()
    lock.release()
    assert try_to_lock(tmp_path) == "locked"


def test_a_second_run_on_a_directory_in_use_is_refused_and_changes_nothing(tiny_config):
    config = tiny_config()
    with_lock = Lock(config.run_dir)
    with pytest.raises(ConfigError, match="is training there"):
        train(config, describe(config.env), CPU)
    assert [path.name for path in config.run_dir.iterdir()] == ["lock"]
    with_lock.release()
    assert train(config, describe(config.env), CPU) is None
    before = {path: path.read_bytes() for path in config.run_dir.rglob("*") if path.is_file() and path.name != "lock"}
    again = Lock(config.run_dir)
    for going_on in (True, False):
        with pytest.raises(ConfigError, match="is training there"):
            train(dataclasses.replace(config, resume=going_on), describe(config.env), CPU)
    again.release()
    with pytest.raises(ConfigError, match="exists already; go on with it by --resume"):
        train(config, describe(config.env), CPU)
    assert {path: path.read_bytes() for path in before} == before


def test_a_lock_knows_when_its_directory_is_gone(tmp_path):
    run_dir = tmp_path / "run"
    lock = Lock(run_dir)
    assert not lock.lost()
    shutil.rmtree(run_dir)
    assert lock.lost()
    lock.renew()
    assert not lock.lost()
    assert "is training there" in try_to_lock(run_dir)
    # Moved away, and another in its place.
    run_dir.rename(tmp_path / "moved")
    other = Lock(run_dir)
    assert lock.lost()
    with pytest.raises(ConfigError):
        lock.renew()
    other.release()


def test_a_directory_deleted_while_running_is_created_again_and_can_be_resumed(tiny_config, capsys, monkeypatch):
    monkeypatch.setattr("speedyzero.run.frames.PIECE", 8)
    save = Saver.save
    # Nothing is being written when the directory is deleted: on a busy machine the deletion itself would fail.
    monkeypatch.setattr(Saver, "save", lambda self, *arguments: (save(self, *arguments), self.settle()))
    config = tiny_config(checkpoint_interval=10, log_interval=5)
    whole = tiny_config(checkpoint_interval=10, log_interval=5, run_dir=config.run_dir.with_name("whole"))
    assert train(whole, describe(config.env), CPU) is None
    step, count = Trainer.step, []

    def stepping(trainer, phase):
        count.append(phase)
        if len(count) == 25:
            assert checkpoint.latest(config.run_dir / "checkpoints") is not None
            shutil.rmtree(config.run_dir)
        if len(count) == 45:
            os.kill(os.getpid(), signal.SIGTERM)
        step(trainer, phase)

    monkeypatch.setattr(Trainer, "step", stepping)
    assert train(config, describe(config.env), CPU) == signal.SIGTERM
    assert f"{config.run_dir} was deleted while running: created again, and the next checkpoint goes there" in one_line(capsys)
    names = sorted(path.name for path in (config.run_dir / "checkpoints").glob("checkpoint_*"))
    assert names == [f"checkpoint_{i:09d}.safetensors" for i in (40, 45)]
    assert resume(read_config(config.run_dir)) is None
    assert "replaying" not in one_line(capsys)
    assert ends_alike(config.run_dir, whole.run_dir)


@pytest.mark.parametrize("fails_at", ["save", "write"])
def test_a_checkpoint_that_cannot_be_written_is_told_and_tried_again(tiny_config, capsys, monkeypatch, fails_at):
    config = tiny_config(checkpoint_interval=10)
    full = OSError(28, "No space left on device")
    save, calls = Saver.save if fails_at == "save" else checkpoint.save, []

    def failing(*arguments, **more):
        calls.append(1)
        if len(calls) in (2, 3):
            raise full
        return save(*arguments, **more)

    monkeypatch.setattr(*((Saver, "save") if fails_at == "save" else (checkpoint, "save")), failing)
    assert train(dataclasses.replace(config, checkpoint_ring=False), describe(config.env), CPU) is None
    told = "the checkpoint was not written (No space left on device), the one before stands; tried again after 10 iterations"
    assert one_line(capsys).count(told) == 2
    assert len(list((config.run_dir / "checkpoints").glob("checkpoint_*"))) == 2


def test_a_run_that_cannot_be_saved_at_its_end_fails(tiny_config, monkeypatch):
    config = tiny_config()
    monkeypatch.setattr(checkpoint, "save", lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    with pytest.raises(OSError, match="Read-only file system"):
        train(config, describe(config.env), CPU)
    assert not (config.run_dir / "summary.json").exists()


def test_damaged_checkpoints_are_put_aside_and_the_run_goes_on_from_the_one_before_unless_all_are(finished, capsys):
    config, before = finished
    kept = checkpoint.by_iteration(config.run_dir / "checkpoints")
    for path in kept[1:]:
        flip(path, path.stat().st_size // 2, 4)
    capsys.readouterr()
    assert resume(config) is None
    said = capsys.readouterr().out
    for path in kept[1:]:
        assert f"{path} is damaged" in said.replace("\n", "")
        assert path.with_name(path.name + ".damaged").exists()
    assert f"at iteration {int(kept[0].stem.rpartition('_')[2])}" in said
    assert ends_alike(config.run_dir, before)
    there = checkpoint.by_iteration(config.run_dir / "checkpoints")
    for path in there:
        path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(checkpoint.DamagedError, match="every checkpoint there is damaged"):
        resume(config)
    assert checkpoint.by_iteration(config.run_dir / "checkpoints") == there


def of_another_run(piece, config) -> None:
    other = dataclasses.replace(config, run_dir=config.run_dir.with_name("other"), seed=1)
    assert train(other, describe(config.env), CPU) is None
    shutil.copy(other.run_dir / "checkpoints" / "frames" / piece.name, piece)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda piece, config: flip(piece, -9), "is damaged"),
        (lambda piece, config: piece.unlink(), "does not exist"),
        (of_another_run, "frames holds frames of another run"),
    ],
)
def test_frames_that_are_damaged_missing_or_of_another_run_come_from_the_replay_and_the_run_is_the_same(finished, capsys, spoil, says):
    config, before = finished
    checkpoint.latest(config.run_dir / "checkpoints").unlink()
    (piece,) = (config.run_dir / "checkpoints" / "frames").iterdir()
    spoil(piece, config)
    capsys.readouterr()
    assert resume(config) is None
    said = one_line(capsys)
    assert says in said
    assert "; the frames come from replaying the emulators" in said
    assert ends_alike(config.run_dir, before)


@pytest.mark.parametrize("number", [number for number in Interrupt.SIGNALS if number != signal.SIGHUP])  # of which two come
def test_the_first_signal_asks_and_the_second_does_what_it_always_does(number):
    heard = []
    before = signal.signal(number, lambda *_: heard.append(number))
    try:
        with Interrupt() as interrupt:
            interrupt.check_stop()
            os.kill(os.getpid(), number)
            assert (interrupt.requested, heard) == (number, [])
            with pytest.raises(Interrupted):
                interrupt.check_stop()
            os.kill(os.getpid(), number)
            assert heard == [number]
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("during", ["replay", "evaluation"])
def test_a_signal_while_resuming_or_evaluating_ends_the_run_at_once_and_loses_nothing(finished, capsys, monkeypatch, during):
    config, _ = finished
    (config.run_dir / "summary.json").unlink()
    before = {path: path.read_bytes() for path in (config.run_dir / "checkpoints").iterdir() if path.is_file()}
    end = checkpoint.read_meta(max(before))
    asked_to_stop, calls = loop._asked_to_stop, []
    late = 20 if during == "replay" else end["slots"] + 3

    def checking(ranks, interrupt):
        calls.append(1)
        if len(calls) == late:
            os.kill(os.getpid(), signal.SIGUSR1)
        return asked_to_stop(ranks, interrupt)

    monkeypatch.setattr(loop, "_asked_to_stop", checking)
    assert resume(config) == signal.SIGUSR1
    assert len(calls) == late
    assert f"stopped by SIGUSR1, nothing is lost; go on with --resume --run-dir {config.run_dir}" in one_line(capsys)
    assert {path: path.read_bytes() for path in before} == before
    assert resume(config) is None
    assert json.loads((config.run_dir / "summary.json").read_text())["iterations"] == end["iterations"]
