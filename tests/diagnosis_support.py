"""A tiny trained run for the tools that look into one, and those tools' modules, which are no package: tests import them from here."""

import dataclasses
import hashlib
import sys
from pathlib import Path

import torch

from speedyzero.config import preset_config, resolve
from speedyzero.envs import describe
from speedyzero.log import write_json
from speedyzero.loop import Trainer
from tests.conftest import TINY
from tests.runs import save
from tests.tools_support import TOOLS

sys.path.append(str(TOOLS / "runs"))

import bounds
import byhand
import findings
import learning
import look
import opened
import overfit
import pictures

__all__ = [
    "CPU", "bad", "batch_of", "bounds", "byhand", "call_tool", "contents", "findings", "learning", "look", "opened", "overfit",
    "pictures", "trained_run",
]  # fmt: skip

CPU = torch.device("cpu")


def trained_run(folder: Path, iterations: int = 64, **settings) -> Trainer:
    """A tiny run in `folder`, saved after some iterations: its ring has lapped, and it has learned a little."""
    spec = describe("Catch-v0")
    config = dataclasses.replace(preset_config("cpu"), env="Catch-v0", run_dir=folder, **({"device": "cpu"} | TINY | settings))
    trainer = Trainer(resolve(config, image=spec.image, atari=False), spec, CPU)
    trainer.start()
    while trainer.iterations < iterations and trainer.phase() is not None:
        trainer.step(trainer.phase())
    folder.mkdir()
    write_json(folder / "config.json", trainer.config.to_json())
    (folder / "checkpoints").mkdir()
    save(trainer, folder / "checkpoints")
    return trainer


def call_tool(monkeypatch, capsys, tool, *arguments) -> tuple[object, str]:
    """Call a tool as a command would: exit code or message, and what it printed."""
    monkeypatch.setattr(sys, "argv", [tool.__name__ + ".py", *map(str, arguments)])
    code = 0
    try:
        tool.main()
    except SystemExit as stop:
        code = int(stop.code) if isinstance(stop.code, bool) else stop.code
    return code, capsys.readouterr().out


def contents(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


def batch_of(state, count=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    index = look.anywhere(state, count, generator)
    return index, *look.batches(state, index, generator)


def bad(found) -> list[str]:
    return [finding.text for finding in found if finding.verdict == "BAD"]
