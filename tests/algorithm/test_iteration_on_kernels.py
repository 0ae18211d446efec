"""The trainer on the kernels: what it does there is what it does on the references, phase by phase."""

import pytest
import torch

from speedyzero.iteration import iteration
from speedyzero_kernels import dispatch
from tests.algorithm.test_iteration import make, step_until


def run(config):
    """The state after each phase."""
    trainer = make(config)
    network = trainer.state.learner.network
    # The heads start at zero: all that their outputs differ by then is rounding, and a search would make much of it.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for head in (network.value_head, network.policy_head, network.prefix_head):
            head.last.weight.copy_(torch.randn(head.last.weight.shape, generator=generator))
    trainer.state.refold()
    for phase in ("collect", "sweep", "train", "learn") if config.refresh == "sweep" else ("train", "learn"):
        if phase != "learn":
            step_until(trainer, phase)
            trainer.step(phase)
        else:
            iteration(trainer.state, phase, trainer.roots())
        yield phase, {name: tensor.clone() for name, tensor in trainer.state.tensors().items()}


@pytest.mark.parametrize(
    ("env", "changes"),
    [
        ("CartPole-v1", {"search": "puct", "refresh": "sweep", "optimizer": "clipped-lars"}),
        ("CartPole-v1", {"search": "gumbel", "refresh": "sampled", "optimizer": "sgd"}),
        ("Catch-v0", {"search": "puct", "refresh": "sampled", "augment": True, "shift": 1, "batch_size": 2, "simulations": 2}),
    ],
)
@pytest.mark.slow
def test_the_trainer_does_the_same_on_kernels_as_on_references(tiny_config, tmp_path, monkeypatch, env, changes):
    sizes = {
        "env_steps": 40, "lanes": 2, "start_transitions": 20, "ring_positions": 40, "refresh_roots": 8, "simulations": 4,
        "updates_per_iteration": 1, "batch_size": 3,
    }  # fmt: skip
    config = tiny_config(env=env, run_dir=tmp_path, **sizes | changes)
    expected = dict(run(config))
    monkeypatch.setattr(dispatch, "runs_kernel", lambda x: x.device.type != "meta")
    for phase, state in run(config):
        for name, tensor in expected[phase].items():
            # What was decided is the same; what was computed differs by rounding, and a policy is kept in f16.
            bound = 2e-3 if name == "ring.policy" else 2e-4
            torch.testing.assert_close(state[name], tensor, rtol=bound, atol=bound, msg=lambda text, at=f"{phase}: {name}": f"{at}: {text}")
