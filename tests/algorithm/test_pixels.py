"""Pixels normalised by their mean and spread over the random start: how these are measured, and that a network always sees by its own."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from speedyzero import batch as batches
from speedyzero import evaluate
from speedyzero.config import ConfigError
from speedyzero.envs import describe
from speedyzero.loop import train
from speedyzero.pixels import measure_pixels
from speedyzero.run import checkpoint
from speedyzero.snapshot import fold, make_snapshot
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


def test_evaluation_normalises_by_the_statistics_of_the_checkpoint(tiny_config, monkeypatch):
    config, spec = tiny_config(**PONG, env_steps=100, final_updates=2), describe("Pong-v5", frame_size=32, gray=True)
    train(config, spec, CPU)
    tensors, _ = checkpoint.load(checkpoint.latest(config.run_dir / "checkpoints"))
    played, seen = [], []
    push, search = evaluate.Frames.push, evaluate.search_observations
    monkeypatch.setattr(evaluate.Frames, "push", lambda self, emulators: played.append(emulators.frames.clone()) or push(self, emulators))
    monkeypatch.setattr(evaluate, "search_observations", lambda net, frames, *r, **m: seen.append(frames) or search(net, frames, *r, **m))
    evaluate.evaluate_run(config.run_dir, 2, "cpu", None)
    want = ((played[0] / 255 - tensors["network.pixels.mean"]) * tensors["network.pixels.scale"]).clamp(-5, 5)
    assert want.abs().max() > 1
    torch.testing.assert_close(seen[0], want.repeat(1, 4, 1, 1), atol=1e-5, rtol=0)  # the first frame, four times


def test_a_bf16_snapshot_keeps_the_statistics_in_fp32(config):
    network = new(config).state.learner.network
    network.pixels.mean.fill_(1 / 3)
    snapshot = make_snapshot(network.spec, CPU, amp=True)
    fold(network, snapshot)
    assert snapshot.input_format["dtype"] == torch.bfloat16
    assert torch.equal(snapshot.input_format["mean"], network.pixels.mean)


def test_without_the_option_nothing_is_normalised_or_saved_and_what_shows_no_pixels_is_refused(tiny_config):
    trainer = new(tiny_config(**PONG | {"normalize_frames": False}))
    assert trainer.state.snapshot.input_format.keys() == {"dtype", "memory_format"}
    assert not any("pixels" in name for name in trainer.state.tensors())
    with pytest.raises(ConfigError, match=r"^--normalize-frames True: CartPole-v1 shows no pixels"):
        tiny_config(env="CartPole-v1", normalize_frames=True)
