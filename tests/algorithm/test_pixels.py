"""Pixels normalised by their mean and spread over the random start: how these are measured, and that a network always sees by its own."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from speedyzero import batch as batches
from speedyzero import evaluate
from speedyzero.config import ConfigError, preset_config
from speedyzero.envs import describe
from speedyzero.loop import Trainer, train
from speedyzero.nets import fold, make_snapshot
from speedyzero.pixels import measure_pixels
from speedyzero.run import checkpoint
from tests.runs import resumed, save
from tests.test_loop import CPU, everything, finish, new

PONG = {"env": "Pong-v5", "frame_size": 32, "gray": True, "normalize_frames": True, "eval_max_steps": 5}


@pytest.fixture
def config(tiny_config):
    return tiny_config(**PONG)


def by_hand(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and scale [C, H, W] of frames [..., C, H, W] uint8."""
    pixels = frames.reshape(-1, *frames.shape[-3:]).astype(np.float64) / 255
    return pixels.mean(0), 1 / (pixels.std(0) + 0.02)


@pytest.mark.parametrize("head", [1, 5, 7, 9])
def test_statistics_are_numpys_over_the_slots_written_so_far(head):
    frames = torch.randint(256, (3, 7, 2, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(head))
    frames[:, :, 0, 0, 0] = 87  # never changes
    ring = SimpleNamespace(frames=frames, slots=7, lanes=3, head=torch.tensor(head))
    mean, scale = torch.zeros(2, 4, 5), torch.zeros(2, 4, 5)
    measure_pixels(ring, mean, scale)
    theirs = by_hand(frames[:, :head].numpy())
    np.testing.assert_allclose(mean.numpy(), theirs[0], rtol=1e-6)
    np.testing.assert_allclose(scale.numpy(), theirs[1], rtol=1e-6)
    assert scale[0, 0, 0] == pytest.approx(50)


def test_a_run_measures_its_random_start_once_and_learns_from_normalised_frames(config):
    trainer = new(config)
    pixels, snapshot = trainer.state.learner.network.pixels, trainer.state.snapshot.pixels
    while trainer.phase() == "collect":
        assert not pixels.mean.any()
        trainer.step("collect")
    start = trainer.state.ring.frames[:, : trainer.slots].numpy().copy()
    trainer.step(trainer.phase())
    mean, scale = by_hand(start)
    for mine in (pixels, snapshot):
        np.testing.assert_allclose(mine.mean.numpy(), mean, rtol=1e-6)
        np.testing.assert_allclose(mine.scale.numpy(), scale, rtol=1e-6)
    before = pixels.scale.clone()
    finish(trainer)
    assert torch.equal(pixels.scale, before)
    assert torch.equal(snapshot.scale, before)

    ring, network = trainer.state.ring, trainer.state.learner.network
    plain = dataclasses.replace(config, augment=False)
    index = torch.tensor([2 * ring.slots + 20])
    batch = batches.gather_batch(ring, index, torch.ones(1), plain, trainer.state.generator, normalisation=network.normalisation)
    slots = [20]
    while len(slots) < 4:
        slots.insert(0, slots[0] - (not ring.first[2, slots[0]]))
    stack = np.concatenate([ring.frames[2, slot].numpy() for slot in slots])
    want = np.clip((stack / 255 - mean) * scale, -5, 5)
    np.testing.assert_allclose(batch.observation[0].numpy(), want, atol=1e-5)
    with pytest.raises(ValueError, match=r"^normalisation: "):
        batches.observe(ring, index, plain, None)


# Iterations; the 20th is the last of the random start.
@pytest.mark.parametrize(("settings", "moments"), [({}, (10, 20, 21)), ({"search": "gumbel", "refresh": "sampled"}, (20,))])
def test_resuming_before_at_and_after_the_measurement_is_exact(tiny_config, tmp_path, settings, moments):
    config = tiny_config(**PONG, **settings, env_steps=100, final_updates=2)
    paths, trainer = [], new(config)
    while (phase := trainer.phase()) is not None:
        trainer.step(phase)
        if trainer.iterations in moments:
            paths.append(save(trainer, tmp_path / str(trainer.iterations)))
            assert (trainer.iterations > 20) == bool(trainer.state.learner.network.pixels.mean.any())
            assert (trainer.iterations < 20) == (trainer.phase() == "collect")
    assert len(paths) == len(moments)
    for path in paths:
        other = finish(resumed(config, path))
        for (name, mine), theirs in zip(everything(other).items(), everything(trainer).values(), strict=True):
            assert torch.equal(mine, theirs), name


def test_evaluation_uses_the_statistics_of_the_checkpoint(tiny_config, monkeypatch):
    config, spec = tiny_config(**PONG, env_steps=100, final_updates=2, simulations=24), describe("Pong-v5", frame_size=32, gray=True)
    train(config, spec, CPU)
    path = checkpoint.latest(config.run_dir / "checkpoints")
    tensors, _ = checkpoint.load(path)
    network = Trainer(config, spec, CPU).state.learner.network
    evaluate.load_weights(network, tensors, path)
    # What so short a run has learned is next to nothing, and its visits would be the same whatever it saw.
    for head in (network.policy_head, network.value_head):
        torch.nn.init.normal_(head.last.weight, std=1, generator=torch.Generator().manual_seed(0))
    seen, search = [], evaluate.search_observations

    def watched(snapshot, frames, *rest, **more):
        result = search(snapshot, frames, *rest, **more)
        seen.append((frames, result[0].policy))
        return result

    def first(play) -> tuple[torch.Tensor, torch.Tensor]:
        """The first frames of an evaluation, and the shares of visits of their search."""
        seen.clear()
        play()
        return seen[0]

    monkeypatch.setattr(evaluate, "search_observations", watched)
    of_file, _ = first(lambda: evaluate.evaluate_run(config.run_dir, 2, "cpu", None))
    right = first(lambda: evaluate.evaluate_network(network, config, spec, 0, 0))
    assert of_file.abs().max() > 1, "pixels as they are lie in 0..1"
    assert torch.equal(of_file, right[0])
    network.pixels.mean.zero_()
    network.pixels.scale.fill_(1)
    wrong = first(lambda: evaluate.evaluate_network(network, config, spec, 0, 0))
    assert 0 <= wrong[0].min() < wrong[0].max() <= 1
    assert not torch.equal(wrong[1], right[1])


def test_a_bf16_snapshot_keeps_the_statistics_in_fp32(config):
    network = new(config).state.learner.network
    network.pixels.mean.fill_(1 / 3)
    snapshot = make_snapshot(network.spec, CPU, amp=True)
    fold(network, snapshot)
    assert snapshot.input_format["dtype"] == torch.bfloat16
    assert torch.equal(snapshot.input_format["mean"], network.pixels.mean)


def test_without_the_option_nothing_is_normalised_or_saved(tiny_config):
    trainer = new(tiny_config(**PONG | {"normalize_frames": False}))
    assert trainer.state.snapshot.input_format.keys() == {"dtype", "memory_format"}
    assert not any("pixels" in name for name in trainer.state.tensors())
    assert preset_config("cpu-atari").normalize_frames
    assert not preset_config("efficientzero").normalize_frames


def test_what_shows_no_pixels_is_refused(tiny_config):
    with pytest.raises(ConfigError, match=r"^--normalize-frames True: CartPole-v1 shows no pixels"):
        tiny_config(env="CartPole-v1", normalize_frames=True)
