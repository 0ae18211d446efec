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
        lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: x.masked_select(x > 0),
        lambda x: bool((x > 0).any()), lambda x: x.unique(), lambda x: x.long().repeat_interleave(x.long()),
    ],
)  # fmt: skip
def test_the_watch_itself_catches_what_a_capture_cannot_hold(forbidden):
    x = torch.ones(3)
    with pytest.raises(AssertionError, match="captured graph"), CaptureSafety():
        forbidden(x)


ATARI = {"env": "Pong-v5", "ring_positions": 100, "start_transitions": 90}


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "clipped-lars"}, {"search": "gumbel", "refresh_values": 16, "consistency_steps": 2},
        {"refresh": "sampled"}, {"search": "gumbel", "refresh": "sampled", "optimizer": "clipped-lars"}, ATARI,
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)  # fmt: skip
def test_every_phase_could_be_captured(tiny_config, settings):
    trainer = make(tiny_config(augment=True, shift=1, **settings))
    phases = ["collect", "sweep", "train", "learn"]
    for phase in [phase for phase in phases if phase != "sweep" or "refresh" not in settings][: 3 if settings is ATARI else 4]:
        step_until(trainer, phase)
        roots = trainer.roots()
        with CaptureSafety() as watch:
            iteration(trainer.state, phase, roots)
        assert watch.operations > 10
        trainer.slots += phase in ("collect", "train")
        trainer.swept += roots if phase == "sweep" else 0
        trainer.updates += trainer.config.updates_per_iteration * (phase in ("train", "learn"))


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
    trainer, seen = make(config), []
    while (phase := trainer.phase()) is not None:
        if phase not in seen[-1:]:
            seen.append(phase)
        trainer.step(phase)
    assert seen == ["collect", "sweep", "train", "learn"]
    assert config.env_steps <= trainer.env_steps < config.env_steps + config.lanes
    assert config.total_updates <= trainer.updates < config.total_updates + config.updates_per_iteration
    assert int(trainer.state.updates) == trainer.updates
    assert int(trainer.state.ring.head) == trainer.slots


@pytest.mark.parametrize("clip", [False, True])
def test_the_ring_holds_what_the_emulators_gave_and_rewards_clipped_if_the_config_says_so(tiny_config, clip):
    trainer = make(tiny_config(env_steps=170, clip_reward=clip))
    emulators, ring = trainer.state.emulators, trainer.state.ring
    for given in (-3.0, 0.5, 7.0, 0.0):
        emulators.reward.fill_(given)
        while trainer.phase() == "collect":
            frames, reward, done, first = (getattr(emulators, n).clone() for n in ("frames", "reward", "done", "first"))
            trainer.step("collect")
            slot = (trainer.slots - 1) % ring.slots
            assert torch.equal(ring.frames[:, slot], frames)
            assert torch.equal(ring.raw_reward[:, slot], reward)
            assert torch.equal(ring.reward[:, slot], reward.sign() if clip else reward)
            assert torch.equal(ring.done[:, slot], done)
            assert torch.equal(ring.first[:, slot], first)
            if given:
                break


def test_the_first_sweep_gives_every_position_of_the_random_start_targets(tiny_config):
    trainer = make(tiny_config())
    step_until(trainer, "train")
    ring = trainer.state.ring
    there = (ring.age() >= 1) & (ring.age() < min(trainer.slots, ring.slots))
    assert (ring.refreshed_at[:, there] >= 0).all()
    policies = ring.policy[:, there].float().sum(-1)[~ring.done[:, there]]
    assert policies.allclose(torch.tensor(1.0), atol=2e-3)


def test_a_training_step_searches_all_roots_on_the_snapshot_and_plays_what_the_last_of_them_say(tiny_config, monkeypatch):
    trainer = make(tiny_config())
    while trainer.updates < 30:
        trainer.step(trainer.phase())
    given, found, refreshed = [], [], []
    choose, search, priorities = steps.act.choose, steps._search, steps.refresh.refresh_priorities

    def searching(state, index):
        represent, state.learner.network.represent = state.learner.network.represent, None  # the network in training is not asked
        found.append((index, *search(state, index)))
        state.learner.network.represent = represent
        return found[-1][1:]

    monkeypatch.setattr(steps.act, "choose", lambda c, r, n, u, g: given.append((r, n)) or choose(c, r, n, u, g))
    monkeypatch.setattr(steps, "_search", searching)
    monkeypatch.setattr(steps.refresh, "refresh_priorities", lambda ring, index, c: refreshed.append(index) or priorities(ring, index, c))
    roots = trainer.roots()
    trainer.step("train")
    (live, noise), (index, result, _, all_noise), ring = given[0], found[0], trainer.state.ring
    assert index.numel() == roots + 4
    assert torch.equal(index[-4:], ring.newest())
    assert torch.equal(refreshed[0], index)
    assert all(torch.equal(a, b[-4:]) for a, b in zip(live[:4], result[:4], strict=True))
    assert torch.equal(noise, all_noise[-4:])
    assert not torch.equal(live.visits, result.visits[:4]), "or the test could not tell"
    assert torch.equal(ring.action.view(-1)[ring.newest()], trainer.state.emulators.actions)
    assert (ring.refreshed_at.view(-1)[index] == 30).all()


def test_the_sweep_of_values_brings_values_and_priorities_up_to_the_snapshot_without_a_search(tiny_config):
    trainer = make(tiny_config(refresh_values=16))
    step_until(trainer, "learn")
    state, ring = trainer.state, trainer.state.ring
    index = refresh.sweep(ring, 16, trainer.config.frame_stack, ring.value_cursor.clone())
    alive = ~ring.done.view(-1)[index]
    ring.value.view(-1)[index] = 7.0
    kept = [tensor.clone() for tensor in (ring.policy, ring.refreshed_at, ring.cursor)]
    cursor = ring.value_cursor.clone()
    steps._refresh_values(state)
    frames = observations(ring.frames, ring.first, index, trainer.config.frame_stack, **state.snapshot.input_format)
    wanted = torch.where(alive, act.values(state.snapshot, frames), 0.0)
    assert torch.equal(ring.value.view(-1)[index], wanted)
    assert all(torch.equal(a, b) for a, b in zip(kept, (ring.policy, ring.refreshed_at, ring.cursor), strict=True))
    assert not torch.equal(ring.value_cursor, cursor)
    fresh = ring.priority.clone()
    refresh.refresh_priorities(ring, index, trainer.config)
    assert torch.equal(ring.priority, fresh), "priorities were those of the new values already"


@pytest.mark.parametrize(("interval", "copied"), [(4, [4, 8]), (5, [6, 10])])  # after updates 2 4 6 8 10, two an iteration
def test_the_snapshot_is_copied_as_soon_as_an_interval_is_over_and_not_between(tiny_config, interval, copied):
    trainer = make(tiny_config(snapshot_interval=interval, updates_per_iteration=2))
    step_until(trainer, "train")
    weights, changed = trainer.state.snapshot.prediction_block.first.weight, []
    for _ in range(5):
        before = weights.clone()
        trainer.step("train")
        changed += [] if torch.equal(before, weights) else [trainer.updates]
    assert changed == copied


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


@pytest.mark.parametrize("wanted", [True, False])
def test_searches_and_fresh_values_refresh_priorities_only_where_that_is_wanted(tiny_config, wanted):
    trainer = make(tiny_config(priority_refresh=wanted, refresh_values=8))
    step_until(trainer, "train")
    ring = trainer.state.ring
    assert ring.measured.any() == wanted, "the sweeps before training"
    ring.measured.zero_()
    trainer.step("train")
    drawn = trainer.config.updates_per_iteration * trainer.config.batch_size
    assert (ring.measured.sum() > drawn) == wanted, "more than the updates drew"
