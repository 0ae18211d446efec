"""tools/runs/opened.py: a run's newest whole checkpoint is opened as it was saved, wherever it trained, or is refused."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from speedyzero.loop import Trainer
from speedyzero.run import checkpoint
from speedyzero.run.files import write_json
from speedyzero.run.resume import filled
from speedyzero.state import State
from tests.tools.diagnosis_support import CPU, opened, trained_run


@pytest.fixture(scope="module")
def trainer(tmp_path_factory) -> Trainer:
    return trained_run(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture
def copy(trainer, tmp_path) -> Path:
    """A copy of the run, to break."""
    return shutil.copytree(trainer.config.run_dir, tmp_path / "run")


@pytest.fixture
def state(trainer) -> State:
    return opened.open_run(trainer.config.run_dir, CPU)[0]


def test_a_run_is_opened_as_it_was_saved(trainer, state):
    mine, theirs = state.tensors(), trainer.state.tensors()
    assert all(torch.equal(filled(name, mine[name], trainer.slots), filled(name, theirs[name], trainer.slots)) for name in theirs)
    assert state.ring.frames.any()
    assert state.config == dataclasses.replace(trainer.config, graph="off")


def test_frames_that_were_not_kept_are_replayed(trainer, copy):
    shutil.rmtree(copy / "checkpoints" / "frames")
    found, path = opened.open_run(copy, CPU)
    assert path == copy / "checkpoints" / "checkpoint_000000064.safetensors"
    assert torch.equal(found.ring.frames, trainer.state.ring.frames)


def test_a_damaged_checkpoint_is_passed_over_and_stays(copy):
    newer = copy / "checkpoints" / "checkpoint_000000099.safetensors"
    newer.write_bytes(b"nothing")
    assert opened.open_run(copy, CPU)[1].name == "checkpoint_000000064.safetensors"
    assert newer.read_bytes() == b"nothing"


def test_a_checkpoint_of_another_network_is_refused(trainer, copy):
    write_json(copy / "config.json", trainer.config.to_json() | {"lstm": 16})
    with pytest.raises(checkpoint.CheckpointError, match=r"holds another network or ring than config.json says \(network.prefix_lstm"):
        opened.open_run(copy, CPU)


def test_a_run_on_cuda_can_be_opened_on_a_cpu(trainer, copy):
    """Its snapshot is in bf16 and its generator's state of another size."""
    path = copy / "checkpoints" / "checkpoint_000000064.safetensors"
    tensors, meta = checkpoint.load(path)
    tensors = {name: tensor.bfloat16() if name.startswith("snapshot.") else tensor.clone() for name, tensor in tensors.items()}
    tensors["generator"] = torch.zeros(16, dtype=torch.uint8)
    checkpoint.save(path, tensors, meta)
    write_json(copy / "config.json", trainer.config.to_json() | {"device": "cuda", "graph": "on"})
    found = opened.open_run(copy, CPU)[0]
    name, mine = next(found.snapshot.named_parameters())
    assert torch.equal(mine, trainer.state.snapshot.get_parameter(name).bfloat16().float())
