"""The whole iteration, in every phase: it could be captured, it moves no tensor, and it does in order what DESIGN says."""

import pytest
import torch

from speedyzero import act, refresh
from speedyzero import iteration as steps
from speedyzero.envs import describe
from speedyzero.iteration import iteration
from speedyzero.loop import Trainer
from speedyzero_kernels.gather import observations
from tests.capture import CaptureSafety

CPU = torch.device("cpu")


def make(config):
    trainer = Trainer(config, describe(config.env), CPU)
    trainer.start()
    return trainer


def step_until(trainer, phase):
    while trainer.phase() != phase:
        trainer.step(trainer.phase())


@pytest.mark.parametrize(
    "forbidden",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: bool((x > 0).any()),
        lambda x: x.unique(),
        lambda x: x.long().repeat_interleave(x.long()),
    ],
)
def test_the_watch_itself_catches_what_a_capture_cannot_hold(forbidden):
    x = torch.ones(3)
    with pytest.raises(AssertionError, match="captured graph"), CaptureSafety():
        forbidden(x)


@pytest.mark.parametrize("refresh", ["sweep", "sampled"])
@pytest.mark.parametrize("search", ["puct", "gumbel"])
@pytest.mark.parametrize("optimizer", ["sgd", "clipped-lars"])
def test_every_phase_could_be_captured(tiny_config, search, refresh, optimizer):
    trainer = make(tiny_config(search=search, refresh=refresh, optimizer=optimizer, augment=True, shift=1))
    phases = ["collect", "sweep", "train", "learn"] if refresh == "sweep" else ["collect", "train", "learn"]
    for phase in phases:
        step_until(trainer, phase)
        roots = trainer.roots()
        with CaptureSafety() as watch:
            iteration(trainer.state, phase, roots)
        assert watch.operations > 10
        if phase in ("collect", "train"):
            trainer.slots += 1
        if phase == "sweep":
            trainer.swept += roots
        if phase in ("train", "learn"):
            trainer.updates += trainer.config.updates_per_iteration


def test_atari_iterations_could_be_captured(tiny_config):
    trainer = make(tiny_config(env="Pong-v5", ring_positions=100, start_transitions=90))
    for phase in ("collect", "sweep", "train"):
        step_until(trainer, phase)
        with CaptureSafety():
            iteration(trainer.state, phase, trainer.roots())
        trainer.slots += phase != "sweep"
        trainer.swept += 100 if phase == "sweep" else 0


def test_the_sweep_of_values_brings_values_and_priorities_up_to_the_snapshot_without_a_search(tiny_config):
    trainer = make(tiny_config(refresh_values=16))
    step_until(trainer, "learn")
    state, ring = trainer.state, trainer.state.ring
    index = refresh.sweep(ring, 16, trainer.config.frame_stack, ring.value_cursor.clone())
    alive = ~ring.done.view(-1)[index]
    ring.value.view(-1)[index] = 7.0
    policy, searched = ring.policy.clone(), ring.refreshed_at.clone()
    before, cursor = ring.cursor.clone(), ring.value_cursor.clone()
    steps._refresh_values(state)
    frames = observations(ring.frames, ring.first, index, trainer.config.frame_stack, **state.snapshot.input_format)
    wanted = torch.where(alive, act.values(state.snapshot, frames), 0.0)
    assert torch.equal(ring.value.view(-1)[index], wanted)
    assert torch.equal(ring.policy, policy)
    assert torch.equal(ring.refreshed_at, searched)
    assert torch.equal(ring.cursor, before)
    assert not torch.equal(ring.value_cursor, cursor)
    fresh = ring.priority.clone()
    refresh.refresh_priorities(ring, index, trainer.config)
    assert torch.equal(ring.priority, fresh), "priorities were those of the new values already"


@pytest.mark.parametrize("refresh", ["sweep", "sampled"])
def test_no_tensor_of_the_state_ever_moves(tiny_config, refresh):
    trainer = make(tiny_config(refresh=refresh))

    def addresses():
        state = trainer.state
        named = state.tensors() | {f"grad {i}": p.grad for i, p in enumerate(state.learner.network.parameters())}
        named |= {f"emulators {n}": getattr(state.emulators, n) for n in ("frames", "reward", "done", "first", "actions")}
        named |= {f"inbox {n}": t for n, t in vars(state.inbox).items()}
        return {name: (tensor.data_ptr(), tensor.shape, tensor.stride()) for name, tensor in named.items()}

    before = addresses()
    while trainer.phase() is not None:
        trainer.step(trainer.phase())
    assert addresses() == before


def test_the_phases_come_in_order_and_end_at_the_counts_of_the_config(tiny_config):
    config = tiny_config()
    trainer = make(config)
    seen = []
    while (phase := trainer.phase()) is not None:
        if not seen or seen[-1] != phase:
            seen.append(phase)
        trainer.step(phase)
    assert seen == ["collect", "sweep", "train", "learn"]
    assert config.env_steps <= trainer.env_steps < config.env_steps + config.lanes
    assert config.total_updates <= trainer.updates < config.total_updates + config.updates_per_iteration
    assert int(trainer.state.updates) == trainer.updates
    assert int(trainer.state.ring.head) == trainer.slots


def test_the_first_sweep_gives_every_position_of_the_random_start_targets(tiny_config):
    trainer = make(tiny_config())
    step_until(trainer, "train")
    ring = trainer.state.ring
    filled = min(trainer.slots, ring.slots)
    age = ring.age()
    searched = ring.refreshed_at[:, (age >= 1) & (age < filled)] >= 0
    assert searched.all()
    assert ring.policy[:, (age >= 1) & (age < filled)].float().sum(-1)[~ring.done[:, (age >= 1) & (age < filled)]].allclose(
        torch.tensor(1.0), atol=2e-3
    )


def test_the_live_roots_of_a_training_step_are_searched_and_their_actions_sent(tiny_config):
    trainer = make(tiny_config())
    step_until(trainer, "train")
    trainer.step("train")
    ring = trainer.state.ring
    newest = ring.newest()
    assert (ring.refreshed_at.view(-1)[newest] >= 0).all()
    assert torch.equal(ring.action.view(-1)[newest], trainer.state.emulators.actions)


def test_the_rewards_and_frames_of_the_ring_are_those_that_the_emulators_gave(tiny_config):
    trainer = make(tiny_config(env_steps=170))
    emulators, ring = trainer.state.emulators, trainer.state.ring
    while trainer.phase() == "collect":
        frames, reward, done, first = (getattr(emulators, n).clone() for n in ("frames", "reward", "done", "first"))
        trainer.step("collect")
        slot = (trainer.slots - 1) % ring.slots
        assert torch.equal(ring.frames[:, slot], frames)
        assert torch.equal(ring.raw_reward[:, slot], reward)
        assert torch.equal(ring.done[:, slot], done)
        assert torch.equal(ring.first[:, slot], first)


def test_the_snapshot_is_copied_every_interval_and_not_between(tiny_config):
    trainer = make(tiny_config(snapshot_interval=4, updates_per_iteration=2))
    step_until(trainer, "train")
    weights = trainer.state.snapshot.prediction_block.first.weight
    changes = []
    for _ in range(6):
        before = weights.clone()
        trainer.step("train")
        changes.append(not torch.equal(before, weights))
    assert changes == [False, True, False, True, False, True]


def test_a_snapshot_interval_that_updates_step_over_still_copies(tiny_config):
    trainer = Trainer(tiny_config(snapshot_interval=5, updates_per_iteration=2), describe("Catch-v0"), CPU)
    trainer.start()
    while trainer.phase() != "train":
        trainer.step(trainer.phase())
    weights, changes = trainer.state.snapshot.prediction_block.first.weight, []
    for _ in range(5):
        before = weights.clone()
        trainer.step("train")
        changes.append(not torch.equal(before, weights))
    assert changes == [False, False, True, False, True], "updates 2 4 6 8 10"


def test_the_live_search_is_that_of_the_live_roots(tiny_config, monkeypatch):
    trainer = Trainer(tiny_config(), describe("Catch-v0"), CPU)
    trainer.start()
    while trainer.updates < 30:
        trainer.step(trainer.phase())
    given, found = [], []
    choose, search = steps.act.choose, steps._search
    monkeypatch.setattr(steps.act, "choose", lambda c, r, n, u, g: given.append((r, n)) or choose(c, r, n, u, g))
    monkeypatch.setattr(steps, "_search", lambda s, i: found.append((i, *search(s, i))) or found[-1][1:])
    trainer.step("train")
    (live, noise), (index, result, _, all_noise) = given[0], found[0]
    ring = trainer.state.ring
    assert torch.equal(index[-4:], ring.newest())
    assert all(torch.equal(a, b[-4:]) for a, b in zip(live, result, strict=True))
    assert torch.equal(noise, all_noise[-4:])
    assert not torch.equal(live.visits, result.visits[:4]), "or the test could not tell"


def test_search_runs_on_the_snapshot_not_on_the_network_in_training(tiny_config):
    trainer = Trainer(tiny_config(), describe("Catch-v0"), CPU)
    trainer.start()
    while trainer.phase() != "train":
        trainer.step(trainer.phase())
    trainer.state.learner.network.represent = None
    steps._search(trainer.state, trainer.state.ring.newest())


def test_priority_and_age_are_written_by_a_training_step(tiny_config):
    trainer = Trainer(tiny_config(), describe("Catch-v0"), CPU)
    trainer.start()
    while trainer.updates < 10:
        trainer.step(trainer.phase())
    before = trainer.updates
    trainer.step("train")
    ring = trainer.state.ring
    assert (ring.refreshed_at.view(-1)[ring.newest()] == before).all()


def test_every_searched_position_gets_its_priority_refreshed(tiny_config, monkeypatch):
    calls, real = [], steps.refresh.refresh_priorities
    monkeypatch.setattr(steps.refresh, "refresh_priorities", lambda ring, index, c: calls.append(index.numel()) or real(ring, index, c))
    trainer = make(tiny_config())
    step_until(trainer, "train")
    calls.clear()
    roots = trainer.roots()
    trainer.step("train")
    assert calls == [roots + 4]


@pytest.mark.parametrize("clip", [False, True])
def test_rewards_are_clipped_where_the_config_says_so(tiny_config, clip):
    trainer = make(tiny_config(clip_reward=clip))
    rewards = trainer.state.emulators.reward
    for value in (-3.0, 0.5, 7.0):
        rewards.fill_(value)
        trainer.step("collect")
        newest = trainer.state.ring.newest()
        assert trainer.state.ring.raw_reward.view(-1)[newest].tolist() == [value] * 4
        expected = (1.0 if value > 0 else -1.0) if clip else value
        assert trainer.state.ring.reward.view(-1)[newest].tolist() == [expected] * 4


def test_under_sampled_refresh_each_update_learns_from_the_windows_that_were_searched_for_it(tiny_config, monkeypatch):
    trainer = make(tiny_config(refresh="sampled"))
    step_until(trainer, "train")
    searched, learned = [], []
    windows, update = steps.refresh.windows, steps.learn.update
    monkeypatch.setattr(steps.refresh, "windows", lambda ring, index, length: searched.append(index) or windows(ring, index, length))
    monkeypatch.setattr(steps.learn, "update", lambda net, ring, index, *rest: learned.append(index) or update(net, ring, index, *rest))
    trainer.step("train")
    assert len(learned) == trainer.config.updates_per_iteration == 2
    assert all(torch.equal(a, b) for a, b in zip(searched, learned, strict=True))
    assert not torch.equal(learned[0], learned[1])
