"""What the tests of bad files share: a small run that was stopped, to be spoilt, and the one line that its files are refused with."""

import contextlib
import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from speedyzero.loop import Trainer
from speedyzero.run.frames import FrameStore

sys.path.append(str(Path(__file__).parents[2] / "tools" / "faults"))

from badfiles import run as victims
from badfiles import worker
from badfiles.run import Run

CPU = torch.device("cpu")
NESTED = json.loads("[" * 300 + "]" * 300)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of two small runs that were stopped."""
    directory = tmp_path_factory.mktemp("runs")
    victims.make_all(directory)
    return directory


@pytest.fixture
def run(runs, tmp_path):
    """One of them, to be spoilt."""
    shutil.copytree(runs / "one", tmp_path / "one")
    return Run(tmp_path / "one")


@pytest.fixture(autouse=True)
def in_time():
    """A test that waits for ever on a file fails, and does not stop the others."""

    def late(*_):
        raise TimeoutError("a file was waited for")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(90)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refused(error: type[Exception], function, *arguments) -> str:
    """The one line that `function` refuses its arguments with."""
    with pytest.raises(error) as caught:
        function(*arguments)
    line = str(caught.value)
    assert line.isprintable(), ascii(line)
    assert len(line) < 600, ascii(line)
    return line


@contextlib.contextmanager
def taking_less_than(mib: int):
    """What is done within takes less memory than that at any time."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = worker._memory("VmRSS")
    yield
    took = worker._memory("VmHWM") - before
    assert took < mib << 20, f"took {took >> 20} MiB"


def resume(run: Run) -> Trainer:
    """The trainer that goes on from the run's files; its emulators are stopped."""
    trainer = Trainer(run.config, run.spec, CPU)
    try:
        trainer.load(run.paths["checkpoint"], FrameStore(run.checkpoints / "frames"), lambda line: None)
    finally:
        trainer.state.emulators.close()
    return trainer


def resaved(run: Run, change) -> Run:
    """The run with its checkpoint saved anew, checksums and all, after `change(tensors, meta)`."""
    tensors, meta = run.held("checkpoint")
    change(tensors, meta)
    run.paths["checkpoint"].write_bytes(run.saved(tensors, meta))
    return run


def odd_id(value: object) -> str:
    """A short name of a parameter, whatever it holds."""
    return ascii(value)[:40]
