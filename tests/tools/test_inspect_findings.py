"""tools/inspect/findings.py: nothing is BAD in a run that is well, and what was broken on purpose is BAD or looked at, and named."""

import pytest
import torch

from speedyzero import learn
from tests.tools.conftest import bad, batch_of
from tools.inspect import findings


def test_nothing_is_bad_in_a_run_that_is_well_and_looking_leaves_it(state):
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    _, batch, plain = batch_of(state)
    assert bad(findings.ring_findings(state) + findings.network_findings(state, batch, plain)) == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.tensors().items())


def reward_a_reset(state):
    state.ring.reward[state.ring.first] = state.ring.raw_reward[state.ring.first] = 1.0


BROKEN_RUNS = {
    "follow no end": lambda state: state.ring.first.copy_(state.ring.first.roll(1, 1)),
    "first frame: ": reward_a_reset,
    "dead slots with a priority": lambda state: state.ring.priority.masked_fill_(state.ring.done, 0.5),
    "rewards that are not": lambda state: state.ring.reward.add_(0.5 * ~state.ring.first),
    "eligible: 0": lambda state: state.ring.refreshed_at.fill_(-1),
    "sum to 1": lambda state: state.ring.policy.mul_(0.5),
    "value_head.last.weight 1": lambda state: state.learner.network.value_head.last.weight[0, 0].fill_(torch.nan),
}


@pytest.mark.parametrize("said", BROKEN_RUNS)
def test_what_cannot_be_in_a_run_is_bad(state, said):
    with torch.no_grad():
        BROKEN_RUNS[said](state)
    (text,) = bad(findings.ring_findings(state))
    assert said in text


def test_a_fold_that_forgets_a_shift_is_bad(state, monkeypatch):
    def forgetful(source, snapshot, fold=findings.fold):
        fold(source, snapshot)
        with torch.no_grad():
            snapshot.policy_head.last.bias.add_(1)

    monkeypatch.setattr(findings, "fold", forgetful)
    (text,) = bad(findings.network_findings(state, *batch_of(state)[1:]))
    assert text.startswith("folding: ")


def test_a_loss_above_that_of_a_constant_is_looked_at(state):
    """Whatever the statistics are: without weights, the policy is a bias that favours one action."""
    head = state.learner.network.policy_head.last
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([0.0, 0.0, 9.0]))
    found = findings.network_findings(state, *batch_of(state)[1:])
    assert [one.verdict for one in found if one.text.startswith("policy_loss")] == ["look"]
    by_batch, running, _ = findings.loss_table(state, batch_of(state)[1])["policy_loss"]
    assert by_batch == running


@pytest.mark.parametrize(
    ("module", "part"), [("dynamics_block", "dynamics"), ("policy_head", "heads"), ("representation", "representation")]
)
def test_the_part_whose_statistics_lag_is_named(state, module, part):
    """A network whose running statistics are those of one batch, before and after those of one module are moved."""
    network, generator = state.learner.network, torch.Generator().manual_seed(0)
    norms = torch.nn.modules.batchnorm._BatchNorm
    _, batch, plain = batch_of(state, 40)

    def found():
        (one,) = (one for one in findings.network_findings(state, batch, plain) if one.text.startswith("policy loss with the running"))
        by_part = dict(text.split() for text in one.text.partition("alone: ")[2].split(", "))
        return one.verdict, {name: abs(float(more)) for name, more in by_part.items()}

    with torch.no_grad():
        for norm in network.modules():
            if isinstance(norm, norms):
                norm.weight.fill_(1)
                norm.bias.zero_()
        network.policy_head.last.weight.normal_(generator=generator)
        for _ in range(60):
            learn.losses(network, batch, state.config)
        settled = found()[1]
        for norm in network.get_submodule(module).modules():
            if isinstance(norm, norms):
                norm.running_mean.add_(norm.running_var.sqrt() * 10 * torch.randn(norm.running_mean.shape, generator=generator))
    verdict, moved = found()
    assert verdict == "look"
    assert moved[part] > max(0.05, 1.1 * settled[part])
    assert all(moved[name] == settled[name] for name in moved if name != part)


def test_predictions_of_the_snapshot_are_those_of_the_search(state):
    """`unrolled` is what `model_step` gives, along a path within one horizon; past a horizon the LSTM starts from zero."""
    network = findings.copies(state)[2]
    _, _, plain = batch_of(state)
    action = plain.targets.action
    values, logits, policies = findings.unrolled(network, plain.observation, action, state.config.lstm_horizon)
    prefixes = findings.to_scalar(logits)
    latent, hidden = network.represent(plain.observation), network.initial_hidden(len(action))
    for k in range(action.shape[1]):
        latent, hidden, prefix, policy, value = network.model_step(latent, hidden, action[:, k].contiguous())
        assert torch.equal(prefixes[:, k], prefix)
        assert torch.equal(values[:, k + 1], value)
        assert torch.equal(policies[:, k + 1], policy)
    again = findings.to_scalar(findings.unrolled(network, plain.observation, action, 1)[1])
    second = network.advance(network.represent(plain.observation), action[:, 0].contiguous())
    assert torch.equal(again[:, 1], network.model_step(second, 0 * hidden, action[:, 1].contiguous())[2])
    assert not torch.equal(again[:, 1], prefixes[:, 1])
