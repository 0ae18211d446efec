"""What a resumed run does not hand on: actions that would crash the emulators, a generator that would read out of bounds."""

import pytest
import torch

from speedyzero.emulators import Emulators
from speedyzero.envs import EnvError, describe
from speedyzero.loop import Trainer
from speedyzero.run import checkpoint, resume
from speedyzero.run.checkpoint import DamagedError
from tests.runs import save

CPU = torch.device("cpu")


@pytest.fixture
def saved(tiny_config, tmp_path):
    """A config, and a function that saves a checkpoint of it with its tensors and meta changed."""
    config = tiny_config()
    trainer = Trainer(config, describe(config.env), CPU)
    trainer.start()
    for _ in range(5):
        trainer.step("collect")
    path = save(trainer, tmp_path / "checkpoints")

    def changed(change):
        tensors, meta = checkpoint.load(path)
        change(tensors, meta)
        checkpoint.save(path, tensors, meta)
        return path

    return config, changed


def restored(saved, change) -> Trainer:
    config, changed = saved
    trainer = Trainer(config, describe(config.env), CPU)
    resume.restore(trainer, changed(change), log=str)
    return trainer


def test_an_action_out_of_range_never_reaches_the_emulators(saved, monkeypatch):
    """Neither from the ring, whose newest ones are sent again after a failed step, nor from the log."""
    monkeypatch.setattr(Emulators, "send", lambda self: pytest.fail("sent"))
    for action in (3, -1):
        with pytest.raises(DamagedError, match=r"ring\.action"):
            restored(saved, lambda tensors, meta, action=action: tensors["ring.action"].view(-1)[:1].fill_(action))
    with pytest.raises(EnvError, match="action log is damaged"):
        restored(saved, lambda tensors, meta: (tensors["ring.action"].zero_(), tensors["emulators.log"].fill_(3)))


@pytest.mark.parametrize(
    ("left", "following", "can"),
    [
        (1, 0, True), (1, 624, True), (624, 1, True), (300, 325, True),  # as PyTorch counts: new, or `left` to come
        (624, 624, False), (624, 2, False), (0, 0, False), (1, 2**32, False), (-(2**31), 0, False),
    ],
)  # fmt: skip
def test_a_generator_that_would_read_beyond_its_words_is_refused(saved, left, following, can):
    def change(tensors, meta):
        tensors["generator"][8:12] = torch.tensor([left], dtype=torch.int32).view(torch.uint8)
        tensors["generator"][16:24] = torch.tensor([following], dtype=torch.int64).view(torch.uint8)

    if can:
        torch.rand(2000, generator=restored(saved, change).state.generator)
    else:
        with pytest.raises(DamagedError, match="the generator's state"):
            restored(saved, change)


def test_every_state_that_a_generator_comes_to_is_accepted():
    generator = torch.Generator().manual_seed(3)
    for draw in range(700):
        assert resume._can_draw(generator.get_state(), CPU), draw
        torch.rand(1 + draw % 3, generator=generator)
