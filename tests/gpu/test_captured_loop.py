"""The captured loop on a GPU: it does what the uncaptured one does, in memory that does not grow, and its emulators' errors come out."""

import pytest
import torch

from speedyzero.config import Config
from speedyzero.emulators import Emulators
from speedyzero.envs import EnvError, describe
from speedyzero.evaluate import evaluate_network
from speedyzero.loop import Trainer, train

pytestmark = pytest.mark.gpu


def trainer_of(config: Config) -> Trainer:
    trainer = Trainer(config, describe(config.env), torch.device("cuda"))
    trainer.start()
    return trainer


def until(trainer: Trainer, iterations: int) -> dict[str, torch.Tensor]:
    while trainer.iterations < iterations and (phase := trainer.phase()) is not None:
        trainer.step(phase)
        trainer.state.turn.check()
    return {name: tensor.clone() for name, tensor in trainer.state.tensors().items()}


@pytest.mark.parametrize("refresh", ["sweep", "sampled"])
@pytest.mark.parametrize("search", ["puct", "gumbel"])
@pytest.mark.parametrize("env", ["Catch-v0", "Pong-v5"])
def test_captured_iterations_do_what_uncaptured_ones_do(tiny_config, tmp_path, env, search, refresh):
    sizes = {"ring_positions": 100, "start_transitions": 90, "env_steps": 400, "search": search, "refresh": refresh}
    runs = []
    for graph in ("off", "on", "split"):
        trainer = trainer_of(tiny_config(env=env, device="cuda", graph=graph, run_dir=tmp_path / graph, **sizes))
        runs.append(until(trainer, 70))
        assert trainer.updates >= 20
    for captured in runs[1:]:
        for name, plain in runs[0].items():
            torch.testing.assert_close(captured[name], plain, rtol=1e-3, atol=1e-3, msg=lambda text, n=name: f"{n}: {text}")
        assert torch.equal(runs[0]["ring.action"], captured["ring.action"])


@pytest.mark.parametrize("env", ["Catch-v0", "Pong-v5"])
def test_a_captured_evaluation_plays_the_games_of_an_uncaptured_one(tiny_config, env):
    sizes = {"ring_positions": 100, "start_transitions": 90, "eval_max_steps": 60}
    runs = [tiny_config(env=env, device="cuda", graph=graph, **sizes) for graph in ("off", "on")]
    network = trainer_of(runs[0]).state.learner.network
    off, on = (evaluate_network(network, config, describe(env), 0, 0) for config in runs)
    assert on == off


@pytest.mark.parametrize("graph", ["on", "split"])
def test_memory_is_the_same_after_many_iterations(tiny_config, graph):
    trainer = trainer_of(tiny_config(device="cuda", env_steps=4_000, graph=graph))
    until(trainer, 120)
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    until(trainer, 620)
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


@pytest.mark.parametrize("graph", ["on", "split"])
def test_an_emulators_error_comes_out_of_the_graph_and_the_run_goes_on_after_it(tiny_config, tmp_path, monkeypatch, graph):
    config = tiny_config(device="cuda", graph=graph, run_dir=tmp_path / "run")
    spec, calls = describe(config.env), []
    recv = Emulators.recv

    def fail_once(self):
        calls.append(1)
        if len(calls) == 33:
            raise RuntimeError("burst")
        return recv(self)

    monkeypatch.setattr("speedyzero.emulators.Emulators.recv", fail_once)
    with pytest.raises(EnvError, match=r"^burst; saved"):
        train(config, spec, torch.device("cuda"))
    resumed = tiny_config(device="cuda", run_dir=tmp_path / "run", resume=True)
    assert train(resumed, spec, torch.device("cuda")) is None
