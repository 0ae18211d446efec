"""tools/inspect/learning.py: its numbers against worked examples, its rows on a tiny environment, and what it never learns from."""

import json
import math

import numpy as np
import pytest
import torch

from speedyzero import learn
from speedyzero.envs import describe
from tests.tools.conftest import CPU
from tools.inspect import learning

TINY = [
    "--env", "Catch-v0", "--preset", "smoke", "--device", "cpu", "--channels", 4, "--stem-channels", 4, "--head-channels", 2,
    "--head-hidden", 8, "--lstm", 8, "--support", 5, "--projection", 8, "--batch-size", 4, "--simulations", 3, "--lanes", 4,
    "--refresh-roots", 16, "--positions", 120, "--examined", 40, "--tail", 9,
]  # fmt: skip


@pytest.fixture
def bench(tiny_config):
    """A function of overrides: a trainer at its random start, and exams of held-out positions and of its own."""

    def make(**overrides):
        config = tiny_config(start_transitions=80, **overrides)
        spec = describe(config.env)
        trainer = learning.random_start(config, spec, CPU)
        held = learning.set_exam(learning.held_out(config, spec, CPU), config, 30, 9)
        return trainer, held, learning.set_exam(trainer.state.ring, config, 30, 9)

    return make


@pytest.mark.parametrize(
    ("score", "label", "expected"),
    [
        ([1, 2, 3, 4], [0, 0, 1, 1], 1.0),
        ([1, 3, 2, 4], [0, 0, 1, 1], 0.75),  # of four pairs one is the wrong way round
        ([5, 5, 5], [1, 0, 0], 0.5),
        ([1, 2, 2], [0, 0, 1], 0.75),  # one pair right, one a tie
        ([1, 2], [1, 1], math.nan),
    ],
)
def test_area_worked_by_hand(score, label, expected):
    assert learning.area(np.array(score, float), np.array(label, bool)) == pytest.approx(expected, nan_ok=True)


def test_effective_rank_of_directions():
    equal = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]]) + 7  # two directions alike, about a mean that is taken away
    assert learning.effective_rank(equal) == pytest.approx(2)
    assert learning.effective_rank(torch.tensor([[1.0, 0], [2, 0], [5, 0]])) == pytest.approx(1)


def test_a_new_network_learned_nothing_and_ranks_nothing(bench):
    """The heads' last layers start at zero: all prefixes are alike, so every pair is a tie, and the value is 0."""
    trainer, held, _ = bench()
    state = trainer.state
    row = learning.examine(state, held, state.snapshot) | learning.compare_latents(state, held, state.snapshot)
    assert row["ahead"] == [0.5] * 3
    assert row["prefix"] == pytest.approx(math.log(11))
    assert row["value"] == pytest.approx(0, abs=1e-6)
    assert row["rmse"] == pytest.approx(math.hypot(row["return"], row["std"]), rel=1e-4)
    assert 1 <= row["rank"] <= 30
    assert -1 <= row["cons"] <= 1


def test_exam_says_what_followed(bench):
    """Against the raw ring, position by position."""
    trainer, held, _ = bench()
    ring, config = held.ring, trainer.config
    slots = int(ring.head)
    assert len(held.index) == 30
    for row, flat in enumerate(held.index.tolist()):
        lane, slot = divmod(flat, ring.slots)
        assert not ring.done[lane, slot]
        assert held.long[row] == (slot + 9 < slots)
        for k in range(1, config.unroll + 1):
            assert held.ahead[row, k - 1] == bool((ring.reward[lane, slot + 1 : slot + k + 1] != 0).any())
            assert held.whole[row, k - 1] == (not ring.done[lane, slot + 1 : slot + k].any())
        after, factor, total = slot + 1, 1.0, 0.0
        while after < slots:
            total += factor * float(ring.reward[lane, after])
            if ring.done[lane, after]:
                break
            after, factor = after + 1, factor * config.discount
        assert held.followed[row] == pytest.approx(total)


def test_held_out_positions_are_never_drawn(bench, monkeypatch):
    """Every batch is of the training ring, the held-out games are others, and their ring stays as it was."""
    trainer, held, own = bench()
    assert held.ring is not trainer.state.ring
    slots = int(held.ring.head)
    mine = {tuple(lane.tolist()) for lane in trainer.state.ring.action[:, : slots - 1]}
    theirs = {tuple(lane.tolist()) for lane in held.ring.action[:, : slots - 1]}
    assert len(mine | theirs) == 2 * trainer.config.lanes
    before = {name: getattr(held.ring, name).clone() for name in vars(held.ring)}
    rings, update = [], learn.update
    monkeypatch.setattr(learn, "update", lambda learner, ring, *others: (rings.append(ring), update(learner, ring, *others))[1])
    monkeypatch.setattr(learning, "FIRST_MARK", 4)
    assert [row["updates"] for row in learning.rows(trainer, held, own, 12)] == [4, 8, 12]
    assert len(rings) == 12
    assert all(ring is trainer.state.ring for ring in rings)
    assert all(torch.equal(getattr(held.ring, name), tensor) for name, tensor in before.items())


@pytest.mark.parametrize("settings", [{"refresh": "sampled"}, {"augment": True, "shift": 1, "search": "gumbel"}])
def test_examining_changes_nothing_of_the_training(bench, monkeypatch, settings):
    """And it is what the trainer does after its sweep."""
    ends = []
    for mark in (2, 12):
        monkeypatch.setattr(learning, "FIRST_MARK", mark)
        trainer, held, own = bench(**settings)
        list(learning.rows(trainer, held, own, 12))
        ends.append(trainer.state.tensors())
    trainer, _, _ = bench(**settings)
    while trainer.phase() == "sweep":
        trainer.step("sweep")
    while trainer.updates < 12:
        trainer.step("learn")
    ends.append(trainer.state.tensors())
    for name, tensor in ends[2].items():
        if not name.startswith("averages"):
            assert torch.equal(ends[0][name], tensor), name
            assert torch.equal(ends[1][name], tensor), name


@pytest.mark.parametrize(("roots", "first", "then"), [(16, 16, 4), (128, 64, 32)])
def test_the_first_sweep_takes_many_roots_and_meets_none_twice(bench, roots, first, then):
    trainer, _, _ = bench(refresh_roots=roots, ring_positions=512)
    known = (trainer.slots - 1) * trainer.config.lanes
    assert trainer.phase() == "sweep"
    assert trainer.roots() == first <= known
    while trainer.phase() == "sweep":
        trainer.step("sweep")
    assert trainer.swept >= known
    assert trainer.roots() == then  # a quarter: the ring is a sixth full


def test_he_changes_the_weights_and_leaves_zeros(bench):
    """The heads still say nothing, and where actions are planes of their own, none differs from another."""
    trainer, held, _ = bench(action_encoding="one-hot")
    network = trainer.state.learner.network
    before = network.dynamics_block.first.weight.clone()
    learning.he(network, 0)
    after = network.dynamics_block.first.weight
    assert float(after.detach().std() / before.detach().std()) > 1.5
    assert not network.dynamics_conv.weight[:, 4:].any()
    assert network.dynamics_conv.weight[:, :4].all()
    trainer.state.refold()
    assert learning.examine(trainer.state, held, trainer.state.snapshot)["ahead"] == [0.5] * 3


def test_rows_of_a_tiny_run(call, monkeypatch, tmp_path):
    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr(learning, "FIRST_MARK", 3)
    code, printed = call(learning, *TINY, "--budget-updates", 10, "--out", out, "--init", "he", "--lr", 0.5)
    assert code == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["updates"] for row in found] == [3, 6, 10]
    assert found[-1]["windows"] == 40
    assert found[0]["init"] == "he"
    assert len(found[0]["ahead"]) == 3
    assert found[0]["const"] == found[1]["const"] > found[0]["floor"]
    assert {"learned", "corr", "rmse", "std", "cons", "rank", "entropy", "norm", "win/s", "train_ahead"} <= set(found[0])
    lines = printed.splitlines()
    assert lines[0].startswith("Catch-v0, seed 0, init he: 120 random transitions and as many held out")
    assert lines[1].split()[:2] == ["updates", "seconds"]
    assert [line.split()[0] for line in lines[2:]] == ["3", "6", "10"]
    assert {len(line) for line in lines[1:]} == {len(lines[1])}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tail", "200"], "--positions 120: 4 lanes have 33 steps"),
        (["--resume"], "--resume: not here"),
        (["--examined", "0"], "--examined 0: must be at least 1"),
        (["--lr", "-1"], "--lr -1.0: must be greater than 0"),
    ],
)
def test_bad_arguments_are_one_line(call, arguments, said):
    message, printed = call(learning, *TINY, *arguments)
    assert message.startswith(f"error: {said}")
    assert "\n" not in message
    assert printed == ""
