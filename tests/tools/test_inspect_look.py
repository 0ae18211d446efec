"""tools/inspect/look: loads a run exactly, changes nothing of it, and shows the pictures in their places."""

import dataclasses
import itertools
import shutil

import pytest
import torch

from speedyzero import ring
from speedyzero.config import preset_config
from speedyzero.ring import eligible
from speedyzero.run import checkpoint
from speedyzero.run.files import write_json
from speedyzero.run.saver import filled
from tests.tools.conftest import CPU, contents, trained_run
from tools.inspect import look, pictures
from tools.inspect.load_run import load_run


def test_look_prints_verdicts_and_tables_draws_a_picture_and_changes_nothing(run, tmp_path, call):
    before = contents(run)
    code, printed = call(look, run, "--positions", 4, "--out", tmp_path)
    assert code == 0
    assert contents(run) == before
    assert printed.count("\nposition ") == 4
    assert "BAD" not in printed
    assert (tmp_path / "look.png").read_bytes()[12:16] == b"IHDR"


def test_look_draws_the_same_again_half_of_it_where_something_happens(state):
    drawn = [look.positions(state, 8, torch.Generator().manual_seed(seed)).tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    eventful = (state.ring.reward != 0) | state.ring.done
    for flat in drawn[0][:4]:
        lane, slot = divmod(flat, state.ring.slots)
        assert any(eventful[lane, (slot + k) % state.ring.slots] for k in range(1, 4))
    assert eligible(state.ring, state.config).view(-1)[drawn[0]].all()


def test_a_value_target_is_taken_apart_as_on_paper():
    """One lane of 12 slots, 14 written: slots 0 and 1 are the newest. Episodes end at slots 4 and 9."""
    config = dataclasses.replace(preset_config("cpu"), lanes=1, ring_positions=12, discount=0.5)
    made = ring.allocate(1, 12, (1, 1, 1), torch.float32, 2, CPU)
    made.reward.copy_(torch.tensor([[1, 0, 1, 0, -1, 0, 1, 1, 0, -1, 0, 1.0]]))
    made.value.copy_(torch.arange(12.0) * 8)
    made.done[0, [4, 9]] = True
    # Of 2: the reward 0 of slot 3 and half the value 24 there. Of 3 and 8: the -1 of the end, and nothing after it. Of 10: rewards 1, 1, 0
    # of slots 11, 0, 1, at 1, 1/2 and 1/4, and 1/8 of the value 8 of slot 1.
    found = [look.value_parts(made, config, 0, slot, n) for slot, n in ((2, 1), (3, 1), (8, 2), (10, 3))]
    assert found == [(0, 12), (-1, 0), (-1, 0), (1.5, 1)]


def rewrite(folder, change, name="checkpoint_000000064") -> None:
    """Save a run's checkpoint again after `change(tensors)`."""
    path = folder / "checkpoints" / f"{name}.safetensors"
    tensors, meta = checkpoint.load(path)
    checkpoint.save(path, change({name: tensor.clone() for name, tensor in tensors.items()}), meta)


def test_look_exits_with_1_if_something_is_bad(copy, call):
    rewrite(copy, lambda tensors: tensors | {"ring.priority": torch.ones_like(tensors["ring.priority"])})
    code, printed = call(look, copy, "--positions", 1, "--out", copy)
    assert code == 1
    assert "BAD  dead slots with a priority" in printed


def test_a_run_that_is_none_or_has_nothing_to_learn_from_is_one_line(tmp_path, call):
    assert "no run there" in call(look, tmp_path)[0]
    trained_run(tmp_path / "run", iterations=12)
    assert "no position can be learned from yet" in call(look, tmp_path / "run", "--out", tmp_path)[0]
    (tmp_path / "run" / "checkpoints" / "checkpoint_000000012.safetensors").unlink()
    assert "has no checkpoint yet" in call(look, tmp_path / "run", "--out", tmp_path)[0]


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
    rewrite(copy, lambda tensors: {
        name: tensor.bfloat16() if name.startswith("snapshot.") else tensor for name, tensor in tensors.items()
    } | {"generator": torch.zeros(16, dtype=torch.uint8)})  # fmt: skip
    write_json(copy / "config.json", trainer.config.to_json() | {"device": "cuda", "graph": "on"})
    name, mine = next(load_run(copy, CPU)[0].snapshot.named_parameters())
    assert torch.equal(mine, trainer.state.snapshot.get_parameter(name).bfloat16().float())


def test_a_picture_has_the_stack_left_to_right_the_future_below_and_the_augmented_at_the_right():
    colours = torch.rand(5, 2, 2, 3, generator=torch.Generator().manual_seed(0))  # [positions, steps, stack, RGB]
    plain = colours.flatten(2)[..., None, None].expand(-1, -1, -1, 3, 4)
    image = pictures.picture(plain, plain * 0.5, stack=2, pixels=True)
    height, width, down = 4, 5, 3 * 4  # of a frame and its line; of a block
    assert image.shape == (5 * down, 2 * 3 * width, 3)
    for position, k, half, frame in itertools.product(range(5), range(2), range(2), range(2)):
        corner = image[position * down + k * height, (half * 3 + frame) * width]
        assert (corner - colours[position, k, frame] * (0.5 if half else 1.0) * 255).abs().max() <= 1
    assert image[0, 2 * width].tolist() == [255, 255, 255]
    grey = pictures.picture(plain[:, :, :2], plain[:, :, :2], stack=2, pixels=False)
    assert (grey[..., 0] == grey[..., 1]).all()
