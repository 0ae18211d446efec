"""The contents of a checkpoint whose checksums are good: what no run can have saved is refused, what one can have saved is not."""

import zlib

import pytest
import torch

from speedyzero.envs import Emulators, EnvError
from speedyzero.run.checkpoint import CheckpointError, DamagedError
from speedyzero.run.resume import _can_draw
from tests.run.bad_files_support import CPU, NESTED, refused, resaved, resume
from tests.run.bad_files_support import in_time as in_time
from tests.run.bad_files_support import run as run
from tests.run.bad_files_support import runs as runs

GAMES, LOG = "emulators.finished", "emulators.log"


def test_the_checkpoint_that_is_spoilt_below_is_a_good_one(run):
    assert resume(resaved(run, lambda tensors, meta: None)).iterations == 31


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors, meta: meta.pop("best"), "best is missing"),
        (lambda tensors, meta: meta.update(best=float("nan")), "best is nan"),
        (lambda tensors, meta: meta.update(best=float("-inf")), "best is -inf"),
        (lambda tensors, meta: meta.update(best=3), "best is 3"),
        (lambda tensors, meta: meta.update(env="a\nb"), "is a checkpoint of 'a\\nb'"),
        (lambda tensors, meta: meta.update(env=NESTED), "is a checkpoint of [[[[[[[...]]]]]]]"),
        (lambda tensors, meta: meta.update(updates="a\nb"), "updates is 'a\\nb'"),
        (lambda tensors, meta: meta.update(swept=2**48), "swept is 281474976710656"),
        (lambda tensors, meta: meta.update(episodes=True), "episodes is True"),
        (lambda tensors, meta: meta.update(env_steps=-1), "env_steps is -1"),
        (lambda tensors, meta: meta.update(turn_owed=NESTED), "turn_owed is [[["),
        (lambda tensors, meta: meta.update(emulators=[]), "emulators is []"),
        (lambda tensors, meta: meta["emulators"].update(envpool="1.2.5\nx"), "emulators: envpool is '1.2.5\\nx'"),
        (lambda tensors, meta: meta["emulators"].update(seed=NESTED), "emulators: seed is [[["),
        (lambda tensors, meta: meta["emulators"].update(finished=[["nan", 1]]), "emulators: finished is [['nan', 1]]"),
        (lambda tensors, meta: meta["emulators"].update(log=5), "emulators: log is 5"),
        (lambda tensors, meta: tensors.update({"emulators.seed": torch.zeros(1)}), "emulators: seed is 0"),
        (lambda tensors, meta: tensors.update({"emulators.returns": torch.zeros(4, dtype=torch.bfloat16)}), "is of torch.bfloat16"),
        (lambda tensors, meta: tensors["recent"].__setitem__((0, 1), 1e308), "the games in recent"),
        (lambda tensors, meta: tensors["recent"].__setitem__((0, 1), -1.0), "the games in recent"),
        (lambda tensors, meta: tensors["recent"].__setitem__((0, 1), 0.5), "the games in recent"),
        (lambda tensors, meta: tensors["recent"].__setitem__((0, 0), float("nan")), "the games in recent"),
        (lambda tensors, meta: tensors["recent"].__setitem__((0, 0), 1e300), "the games in recent"),
        (lambda tensors, meta: tensors.update(recent=torch.zeros(1001, 2, dtype=torch.float64)), "the games in recent"),
        (lambda tensors, meta: tensors.update({GAMES: torch.tensor([[float("nan"), 1.0]]).double()}), "the games in emulators.finished"),
        (lambda tensors, meta: tensors.update({GAMES: torch.zeros(2, 3).double()}), "the games in emulators.finished"),
        (lambda tensors, meta: tensors.pop(GAMES), "the games in emulators.finished"),
    ],
)  # fmt: skip
def test_what_no_run_can_have_saved_is_refused_in_one_line(run, change, says):
    assert says in refused(CheckpointError, resume, resaved(run, change))


@pytest.mark.parametrize(
    ("left", "following", "can"),
    [
        (1, 0, True), (1, 624, True), (624, 1, True), (2, 623, True), (300, 325, True),  # as PyTorch counts: new, or `left` to come
        (624, 624, False), (2, 624, False), (624, 2, False), (1, 623, False), (0, 624, False), (0, 0, False), (2, 0, False),
        (625, 0, False), (-1, 2, False), (624, -1, False), (1, 2**32, False), (-(2**31), 0, False),
    ],
)  # fmt: skip
def test_a_generator_that_would_read_beyond_its_words_is_refused(run, left, following, can):
    def change(tensors, meta):
        tensors["generator"][8:12] = torch.tensor([left], dtype=torch.int32).view(torch.uint8)
        tensors["generator"][16:24] = torch.tensor([following], dtype=torch.int64).view(torch.uint8)

    resaved(run, change)
    if can:
        torch.rand(2000, generator=resume(run).state.generator)
    else:
        assert "the generator's state" in refused(DamagedError, resume, run)


def test_every_state_that_a_generator_comes_to_is_accepted():
    generator = torch.Generator().manual_seed(3)
    for draw in range(1500):
        assert _can_draw(generator.get_state(), CPU), draw
        torch.rand(1 + draw % 3, generator=generator)
    unseeded = generator.get_state()
    unseeded[12:16] = 0
    assert not _can_draw(unseeded, CPU)


def test_an_action_that_there_is_not_never_reaches_the_emulators(run, monkeypatch):
    """Neither from the ring, whose newest ones are sent again after a failed step, nor from the log."""
    def log_too(tensors, meta):
        tensors[LOG][3, 2] = 3
        meta["emulators"]["log_crc"] = zlib.crc32(tensors[LOG].numpy().tobytes())

    sent = []
    monkeypatch.setattr(Emulators, "send", lambda self: sent.append(self.actions.clone()))
    refused(DamagedError, resume, resaved(run, lambda tensors, meta: tensors["ring.action"].__setitem__((1, 0), 3)))
    refused(DamagedError, resume, resaved(run, lambda tensors, meta: tensors["ring.action"].__setitem__((1, 0), -1)))
    assert "action log is damaged" in refused(EnvError, resume, resaved(run, log_too))
    assert sent == []
