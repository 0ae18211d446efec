"""The memory plan against what a run really allocates, and the refusal of a run that does not fit."""

import dataclasses

import pytest
import torch

from speedyzero import memory
from speedyzero.config import ConfigError, preset_config, resolve
from speedyzero.envs import EnvSpec, describe
from speedyzero.iteration import iteration
from speedyzero.memory import LEARN, PINNED, SEARCH, Live, Row, check_memory, plan, size_text, total
from speedyzero.ring import tensors
from speedyzero.state import allocate

CPU = torch.device("cpu")
CATCH = describe("Catch-v0")
PONG = EnvSpec("Pong-v5", "atari", True, (3, 96, 96), 6)


def pong(preset, **overrides):
    return resolve(dataclasses.replace(preset_config(preset), **{"device": "cuda"} | overrides), image=True, atari=True)


def of(rows, owner):
    return sum(row.bytes for row in rows if row.owner == owner)


def nbytes(*groups):
    """Bytes of the storages of some tensors, each once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for group in groups for t in group}
    return sum(storages.values())


@pytest.mark.parametrize("overrides", [{"optimizer": "clipped-lars"}, {"env": "CartPole-v1", "lanes": 3}, {"ring_positions": 98}])
def test_what_stays_is_what_the_state_allocates(tiny_config, overrides):
    config = tiny_config(**overrides)
    spec = describe(config.env)
    rows, state = plan(config, spec, "cpu"), allocate(config, spec, CPU)
    flat, network = state.learner.optimizer.flat, state.learner.network
    assert of(rows, "ring") == nbytes(tensors(state.ring).values())
    names = ("frames", "reward", "done", "first", "game_over", "actions")
    assert of(rows, "emulators") == nbytes(getattr(state.emulators, name) for name in names)
    assert of(rows, "inbox") == nbytes(vars(state.inbox).values())
    assert of(rows, "snapshot") == nbytes(state.snapshot.parameters(), state.snapshot.buffers())
    assert of(rows, "optimizer") == nbytes([flat.grads, flat.momentum, state.learner.statistics.kept])
    # A few counters and the optimiser's table of layers aside.
    assert 0 <= of(rows, "network") - nbytes(network.parameters(), network.buffers()) < 8192


@pytest.mark.parametrize(
    ("overrides", "stage"),
    [
        ({"batch_size": 64, "amp": True}, LEARN),
        ({"simulations": 30, "batch_size": 2, "search": "gumbel"}, SEARCH),
        ({"refresh": "sampled", "batch_size": 16}, SEARCH),
    ],
)
def test_the_peak_of_an_iteration_is_estimated_within_a_few_percent(tiny_config, overrides, stage):
    wide = {"channels": 16, "stem_channels": 16, "head_channels": 8, "lstm": 64, "projection": 64, "support": 30}
    config = tiny_config(**wide | overrides)
    rows, state = plan(config, CATCH, "cpu"), allocate(config, CATCH, CPU)
    state.emulators.reset()
    for _ in range(22):
        iteration(state, "collect", 0)
    transient = total(rows, "cpu") - sum(row.bytes for row in rows if row.stage is None)
    assert transient == sum(row.bytes for row in rows if row.stage == stage)
    with Live() as live:
        iteration(state, "train", config.refresh_roots)
    assert 0.95 < transient / live.peak < 1.05


def test_the_atari_ring_is_2_8_gb_and_on_cuda_half_precision_pinned_memory_and_graphs_count():
    config = pong("efficientzero")
    cuda, cpu = plan(config, PONG, "cuda"), plan(pong("efficientzero", device="cpu"), PONG, "cpu")
    assert round(of(cuda, "ring") / 1e9, 1) == 2.8
    for owner in ("snapshot", "search"):
        assert of(cuda, owner) == pytest.approx(of(cpu, owner) / 2, rel=0.05)
    assert {row.owner for row in cuda if row.where == PINNED} == {"checkpoint", "emulators"}
    assert of(cuda, "graphs") == max(of(cuda, "search"), of(cuda, "learn"))
    assert of(cpu, "graphs") == 0


def test_what_is_of_two_stages_is_never_there_at_once():
    rows = [Row("x", "", 1, "cpu"), Row("x", "", 30, "cpu", SEARCH), Row("x", "", 25, "cpu", LEARN), Row("x", "", 1000, PINNED, LEARN)]
    assert (total(rows, "cpu"), total(rows, PINNED), total(rows, "cuda")) == (31, 1000, 0)


def test_sizes_are_said_in_the_unit_that_suits_them():
    assert [size_text(size) for size in (8, 1536, 12 * 2**20, 2_764_800_000)] == ["8 B", "1.50 KiB", "12.00 MiB", "2.57 GiB"]


def test_a_run_that_just_fits_is_let_through_and_one_byte_less_is_not(tiny_config, monkeypatch):
    config = tiny_config()
    need = total(plan(config, CATCH, "cpu"), "cpu")
    monkeypatch.setattr(memory, "available_memory", lambda device: need)
    check_memory(config, CATCH, CPU)
    monkeypatch.setattr(memory, "available_memory", lambda device: need - 1)
    with pytest.raises(ConfigError, match="the run takes"):
        check_memory(config, CATCH, CPU)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"ring_positions": 10**7}, r"^--ring-positions 10000000: .* the ring with \d+\.\d\d GiB; at most about \d+ positions fit$"),
        ({"batch_size": 16384}, "^--batch-size 16384 or .* biggest part is the learn with .*; lower one$"),
        ({"simulations": 4000}, "^--simulations 4000 or --refresh-roots 4096 or .* biggest part is the search with .*; lower one$"),
    ],
)
def test_a_run_that_does_not_fit_is_refused_with_the_flags_of_its_biggest_part(overrides, message, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda device: 32 * 2**30)
    config = pong("efficientzero", **overrides)
    with pytest.raises(ConfigError, match=message) as refused:
        check_memory(config, PONG, torch.device("cuda"))
    if "ring_positions" in overrides:  # and the number that is said to fit does
        fit = int(str(refused.value).split("about ")[1].split()[0])
        assert fit > 100_000
        check_memory(dataclasses.replace(config, ring_positions=fit), PONG, torch.device("cuda"))


def test_pinned_memory_is_held_against_the_hosts(tiny_config, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda device: 2**50 if device.type == "cuda" else 1000)
    with pytest.raises(ConfigError, match="are free on pinned host; the biggest part is the checkpoint"):
        check_memory(tiny_config(), CATCH, torch.device("cuda"))


def test_live_counts_what_is_made_and_not_what_was_there():
    before = torch.zeros(1000)
    with Live() as live:
        before.add_(1)
        view = before[10:]
        assert (live.now, live.peak) == (0, 0)
        made = torch.empty(100)
        view = made.view(10, 10)[0]
        more = made + 1
        del made
        assert (live.now, live.peak) == (800, 800)  # the view holds on to it
        del view, more
        assert (live.now, live.peak) == (0, 800)
