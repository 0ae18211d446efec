"""tools/inspect: loads a run exactly, changes nothing of it, and shows the pictures in their places."""

import dataclasses
import itertools
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from speedyzero import ring
from speedyzero.loop import Trainer
from speedyzero.run import checkpoint
from speedyzero.run.files import write_json
from speedyzero.run.resume import filled
from speedyzero.state import State
from tests.tools.diagnosis_support import CPU, call_tool, contents, trained_run
from tools.inspect import look, pictures
from tools.inspect.load_run import load_run


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
    return load_run(trainer.config.run_dir, CPU)[0]


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


def test_a_run_that_is_none_or_has_nothing_to_learn_from_is_one_line(tmp_path, call):
    assert "no run there" in call(look, tmp_path)[0]
    trained_run(tmp_path / "run", iterations=12)
    assert "no position can be learned from yet" in call(look, tmp_path / "run", "--out", tmp_path)[0]
    (tmp_path / "run" / "checkpoints" / "checkpoint_000000012.safetensors").unlink()
    assert "no checkpoint there" in call(look, tmp_path / "run", "--out", tmp_path)[0]


def test_a_run_is_loaded_as_it_was_saved(trainer, state):
    mine, theirs = state.tensors(), trainer.state.tensors()
    assert all(torch.equal(filled(name, mine[name], trainer.slots), filled(name, theirs[name], trainer.slots)) for name in theirs)
    assert state.ring.frames.any()
    assert state.config == dataclasses.replace(trainer.config, graph="off")


def test_frames_that_were_not_kept_are_replayed_and_a_damaged_checkpoint_is_passed_over(trainer, copy):
    shutil.rmtree(copy / "checkpoints" / "frames")
    newer = copy / "checkpoints" / "checkpoint_000000099.safetensors"
    newer.write_bytes(b"nothing")
    found, path = load_run(copy, CPU)
    assert path == copy / "checkpoints" / "checkpoint_000000064.safetensors"
    assert torch.equal(found.ring.frames, trainer.state.ring.frames)
    assert newer.read_bytes() == b"nothing"


def test_a_checkpoint_of_another_network_is_refused(trainer, copy):
    write_json(copy / "config.json", trainer.config.to_json() | {"lstm": 16})
    with pytest.raises(checkpoint.CheckpointError, match=r"holds another network or ring than config.json says \(network.prefix_lstm"):
        load_run(copy, CPU)


def test_a_run_on_cuda_can_be_loaded_on_a_cpu(trainer, copy):
    """Its snapshot is in bf16 and its generator's state of another size."""
    path = copy / "checkpoints" / "checkpoint_000000064.safetensors"
    tensors, meta = checkpoint.load(path)
    tensors = {name: tensor.bfloat16() if name.startswith("snapshot.") else tensor.clone() for name, tensor in tensors.items()}
    tensors["generator"] = torch.zeros(16, dtype=torch.uint8)
    checkpoint.save(path, tensors, meta)
    write_json(copy / "config.json", trainer.config.to_json() | {"device": "cuda", "graph": "on"})
    found = load_run(copy, CPU)[0]
    name, mine = next(found.snapshot.named_parameters())
    assert torch.equal(mine, trainer.state.snapshot.get_parameter(name).bfloat16().float())


def test_a_picture_has_the_stack_left_to_right_the_future_below_and_the_augmented_at_the_right(tmp_path):
    colours = torch.rand(1, 2, 2, 3, generator=torch.Generator().manual_seed(0))  # [positions, steps, stack, RGB]
    plain = colours.flatten(2)[..., None, None].expand(-1, -1, -1, 40, 40)
    pictures.write_png(tmp_path / "a.png", pictures.picture(plain, plain * 0.5, stack=2, pixels=True))
    image, side = torch.from_numpy(np.array(Image.open(tmp_path / "a.png"))), 41
    for k, frame, half in itertools.product(range(2), range(2), range(2)):
        corner = image[k * side, half * (2 * side + pictures.GAP) + frame * side]
        assert (corner - colours[0, k, frame] * (0.5 if half else 1.0) * 255).abs().max() <= 1
    assert image[0, 2 * side].tolist() == [255, 255, 255]
