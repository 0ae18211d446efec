"""tools/runs/look.py: what it prints, draws and picks of a tiny run, of which it changes nothing, and its errors."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from speedyzero import ring
from speedyzero.loop import Trainer
from speedyzero.run import checkpoint
from speedyzero.state import State
from tests.tools.diagnosis_support import CPU, batch_of, call_tool, contents, look, opened, trained_run


@pytest.fixture(scope="module")
def trainer(tmp_path_factory) -> Trainer:
    return trained_run(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture
def run(trainer) -> Path:
    return trainer.config.run_dir


@pytest.fixture
def copy(trainer, tmp_path) -> Path:
    """A copy of the run, to break."""
    return shutil.copytree(trainer.config.run_dir, tmp_path / "run")


@pytest.fixture
def state(trainer) -> State:
    return opened.open_run(trainer.config.run_dir, CPU)[0]


@pytest.fixture
def call(monkeypatch, capsys):
    return partial(call_tool, monkeypatch, capsys)


def test_look_prints_verdicts_and_tables_draws_a_picture_and_changes_nothing(run, tmp_path, call):
    before = contents(run)
    code, printed = call(look, run, "--positions", 4, "--at", "1:5", "--out", tmp_path)
    assert code == 0
    assert contents(run) == before
    assert printed.count("\nposition ") == 5
    assert "position 4: lane 1, slot 5," in printed
    assert "BAD" not in printed
    assert (tmp_path / "look.png").read_bytes()[12:16] == b"IHDR"


def test_look_draws_the_same_again_and_others_by_another_seed(state):
    drawn = [look.positions(state, 8, torch.Generator().manual_seed(seed)).tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    eventful = (state.ring.reward != 0) | state.ring.done
    for flat in drawn[0][:4]:
        lane, slot = divmod(flat, state.ring.slots)
        assert any(eventful[lane, (slot + k) % state.ring.slots] for k in range(1, 4))
    assert all(ring.eligible(state.ring, state.config).view(-1)[flat] for flat in drawn[0])


def test_look_exits_with_1_if_something_is_bad(copy, call):
    path = copy / "checkpoints" / "checkpoint_000000064.safetensors"
    tensors, meta = checkpoint.load(path)
    checkpoint.save(path, tensors | {"ring.priority": torch.ones_like(tensors["ring.priority"])}, meta)
    code, printed = call(look, copy, "--positions", 1, "--out", copy)
    assert code == 1
    assert "BAD  dead slots with a priority" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--at", "4:0"], "--at 4:0: there are lanes 0 to 3 and slots 0 to 23"),
        (["--at", "1"], "--at 1: give LANE:SLOT"),
        (["--positions", "0"], "--positions 0: must be at least 1"),
        (["--out", "/nowhere/at/all"], "--out /nowhere/at/all: not a folder"),
    ],
)
def test_bad_arguments_are_one_line(run, call, arguments, said):
    message, printed = call(look, run, *arguments)
    assert message.startswith(f"error: {said}")
    assert "\n" not in message
    assert printed == ""


def test_a_run_that_is_none_or_has_nothing_to_learn_from_is_one_line(tmp_path, call):
    assert "no run there" in call(look, tmp_path)[0]
    trained_run(tmp_path / "run", iterations=12)
    assert "no position can be learned from yet" in call(look, tmp_path / "run", "--out", tmp_path)[0]
    (tmp_path / "run" / "checkpoints" / "checkpoint_000000012.safetensors").unlink()
    assert "no checkpoint there" in call(look, tmp_path / "run", "--out", tmp_path)[0]


def test_a_batch_of_positions_is_what_an_update_learns_from(state):
    index, batch, plain = batch_of(state, 40)
    assert ring.eligible(state.ring, state.config).view(-1)[index].all()
    assert len(set(index.tolist())) == len(index)
    assert torch.equal(batch.targets.value, plain.targets.value)
