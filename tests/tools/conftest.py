"""A tiny trained run for the tools that look into one, and a call of a tool as a command would make it."""

import dataclasses
import hashlib
import shutil
import sys
from pathlib import Path

import pytest
import torch

from speedyzero.config import preset_config, resolve
from speedyzero.envs import describe
from speedyzero.loop import Trainer
from speedyzero.run.files import write_json
from speedyzero.state import State
from tests.conftest import TINY
from tests.runs import save
from tools.inspect import look
from tools.inspect.load_run import load_run

CPU = torch.device("cpu")


def trained_run(folder: Path, iterations: int = 64, **settings) -> Trainer:
    """A tiny run in `folder`, saved after some iterations: its ring has lapped, and it has learned a little."""
    spec = describe("Catch-v0")
    config = dataclasses.replace(preset_config("cpu"), env="Catch-v0", run_dir=folder, **({"device": "cpu"} | TINY | settings))
    trainer = Trainer(resolve(config, image=spec.image, atari=False), spec, CPU)
    trainer.start()
    while trainer.iterations < iterations and trainer.phase() is not None:
        trainer.step(trainer.phase())
    (folder / "checkpoints").mkdir(parents=True)
    write_json(folder / "config.json", trainer.config.to_json())
    save(trainer, folder / "checkpoints")
    return trainer


@pytest.fixture(scope="session")
def trainer(tmp_path_factory) -> Trainer:
    return trained_run(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture
def run(trainer) -> Path:
    """The directory of a run, for reading only."""
    return trainer.config.run_dir


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """A copy of it, to break."""
    return shutil.copytree(run, tmp_path / "run")


@pytest.fixture
def state(run) -> State:
    return load_run(run, CPU)[0]


@pytest.fixture
def call(monkeypatch, capsys):
    """Calls a tool as a command would: exit code or message, and what it printed."""

    def calls(tool, *arguments) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", [tool.__name__, *map(str, arguments)])
        code = 0
        try:
            tool.main()
        except SystemExit as stop:
            code = int(stop.code) if isinstance(stop.code, bool) else stop.code
        return code, capsys.readouterr().out

    return calls


def contents(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


def batch_of(state, count=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    index = look.anywhere(state, count, generator)
    return index, *look.batches(state, index, generator)


def bad(found) -> list[str]:
    return [finding.text for finding in found if finding.verdict == "BAD"]
