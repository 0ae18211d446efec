"""What can be said of a run at its checkpoint: one line each, with a verdict.

`ok` is as it must be, `BAD` cannot be in a run that works, `look` may be right and is what a run that does not learn looks like.
In the shapes `M` is the positions looked at, `K` the unroll, `A` the actions.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from speedyzero import learn
from speedyzero.batch import Batch
from speedyzero.diagnosis import collapsed, undecided
from speedyzero.nets import Network
from speedyzero.precision import mixed_precision
from speedyzero.ring import eligible
from speedyzero.snapshot import fold
from speedyzero.state import State
from speedyzero_kernels.support import to_scalar
from tools.inspect.loss_floors import Bounds, bounds

LOSSES = ("value_prefix_loss", "value_loss", "policy_loss", "consistency_loss")
PARTS = {"representation": ("representation",), "dynamics": ("dynamics",), "heads": ("prediction", "value", "policy")}
"""The parts of the network that a policy comes of, by how the names of their modules begin."""


class Finding(NamedTuple):
    """One line of the report."""

    verdict: str
    text: str

    def __str__(self) -> str:
        return f"{self.verdict:4s} {self.text}"


def judged(fine: bool, text: str, otherwise: str = "BAD") -> Finding:
    """`ok` if fine."""
    return Finding("ok" if fine else otherwise, text)


def quantiles(x: Tensor) -> str:
    """Least, 10, 50, 90 percent and greatest of `x`."""
    x = x[x.isfinite()].double().cpu().numpy()
    return " ".join(f"{value:.3g}" for value in np.quantile(x, (0, 0.1, 0.5, 0.9, 1))) if x.size else "none"


def ring_findings(state: State) -> list[Finding]:
    """Episodes, dead slots, rewards, eligibility, priorities, and what is not finite."""
    ring, config, head = state.ring, state.config, int(state.ring.head)
    filled = min(head, ring.slots)
    done, first, reward, raw = (tensor[:, :filled] for tensor in (ring.done, ring.first, ring.reward, ring.raw_reward))
    follows = torch.ones_like(first)
    follows[:, head % ring.slots if head > ring.slots else 0] = False  # the oldest: what came before it is gone
    odd = int(((first != done.roll(1, 1)) & follows).sum())
    late = int((reward[first] != 0).sum())
    kept = sum(int((getattr(ring, name)[:, :filled][done] != 0).sum()) for name in ("priority", "value", "root_value", "policy"))
    wrong = int((reward != (raw.sign() if config.clip_reward else raw)).sum())
    rule = "the sign of the raw ones" if config.clip_reward else "the raw ones"
    values, counts = reward.unique(return_counts=True)
    histogram = ", ".join(f"{value:g}: {count}" for value, count in zip(values.tolist()[:9], counts.tolist()[:9], strict=True))
    bad = {name: int((~tensor.isfinite()).sum()) for name, tensor in state.tensors().items() if tensor.is_floating_point()}
    not_finite = ", ".join(f"{name} {number}" for name, number in bad.items() if number)
    return [
        Finding("ok", f"{head} slots of {ring.lanes} lanes written, the ring holds {ring.slots}; dead {done.float().mean():.1%}"),
        judged(odd == 0, f"episodes: {int(first.sum())} begin; slots that begin one and follow no end, or the reverse: {odd}"),
        judged(late == 0, f"rewards on arriving at a first frame: {late}"),
        judged(kept == 0, f"dead slots with a priority, a value or a policy: {kept} numbers"),
        judged(wrong == 0, f"rewards that are not {rule}: {wrong}"),
        judged(bool((reward != 0).any()), f"rewards: {histogram}; raw {quantiles(raw)}", "look"),
        *_eligible_findings(state),
        judged(not not_finite, f"numbers that are not finite: {not_finite or 0}; updates skipped {int(state.learner.skipped)}"),
    ]


def _eligible_findings(state: State) -> list[Finding]:
    ring, config = state.ring, state.config
    allowed = eligible(ring, config)
    count = int(allowed.sum())
    if count == 0:
        return [judged(False, "eligible: 0")]
    age, priority, policy = (state.updates - ring.refreshed_at)[allowed], ring.priority[allowed], ring.policy[allowed].float()
    mass = priority.double() ** config.priority_alpha
    effective = float(mass.sum() ** 2 / (mass**2).sum() / count) if mass.sum() > 0 else 0.0
    entropy, most = torch.special.entr(policy).sum(1), math.log(state.spec.num_actions)
    middle, off = float(entropy.median()), int(((policy.sum(1) - 1).abs() > 2e-3).sum())
    return [
        Finding("ok", f"eligible: {count} of {allowed.numel()} slots"),
        judged(config.refresh == "sampled" or int(age.max()) <= int(state.updates),
               f"updates since the last search of the eligible: {quantiles(age)}"),
        judged(effective > 0.1, f"priorities of the eligible: {quantiles(priority)}; measured {ring.measured[allowed].float().mean():.0%}; "
                                f"sampling is as wide as {effective:.0%} of them drawn alike", "look"),
        judged(not (collapsed(middle, state.spec.num_actions) or undecided(middle, state.spec.num_actions)),
               f"entropy of the visits: {quantiles(entropy)}; uniform would be {most:.3g}", "look"),
        judged(off == 0, f"policies of the eligible that do not sum to 1: {off}"),
    ]  # fmt: skip


def stacked(batch: Batch, steps: int) -> Tensor:
    """[M, K + 1, planes, H, W] float32 on the host: the observations and their futures."""
    return torch.cat((batch.observation[:, None], batch.future.unflatten(0, (-1, steps))), 1).float().cpu()


@torch.no_grad()
def unrolled(network: Network, observation: Tensor, action: Tensor, horizon: int) -> tuple[Tensor, Tensor, Tensor]:
    """Value [M, K + 1], value-prefix logits [M, K, bins] and policy logits [M, K + 1, A] along actions [M, K], as a search sees them."""
    latent, hidden = network.represent(observation), network.initial_hidden(observation.shape[0])
    predictions, prefixes = [network.predict(latent)], []
    for k in range(action.shape[1]):
        start = torch.zeros_like(hidden) if k % horizon == 0 else hidden
        latent, hidden, prefix = network.step(latent, start, action[:, k].contiguous())
        predictions.append(network.predict(latent))
        prefixes.append(prefix)
    values = torch.stack([to_scalar(prediction.value) for prediction in predictions], 1)
    return values, torch.stack(prefixes, 1), torch.stack([prediction.policy for prediction in predictions], 1)


def copies(state: State) -> tuple[Network, Network, Network]:
    """The training network in training mode and in evaluation mode, and a snapshot folded from it now: copies, in fp32."""
    source = state.learner.network
    training, evaluation, folded = (Network(source.spec, folded=fresh).to(state.device) for fresh in (False, False, True))
    for copy in (training, evaluation):
        copy.load_state_dict(source.state_dict())
    fold(source, folded)
    return training.train(), evaluation.eval(), folded.requires_grad_(False).eval()


@torch.no_grad()
def loss_table(state: State, batch: Batch) -> dict[str, tuple[float, float, Bounds]]:
    """Each of LOSSES by the statistics of the batch and by the running ones, and its bounds; changes nothing."""
    with mixed_precision(state.config.amp, batch.weights):
        by_batch, running = (learn.losses(network, batch, state.config)[1] for network in copies(state)[:2])
    limits = bounds(batch.targets, state.config.support)
    return {name: (float(by_batch[name]), float(running[name]), limits[name]) for name in LOSSES}


def _furthest(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


def network_findings(state: State, batch: Batch, plain: Batch) -> list[Finding]:
    """The network against its targets, the snapshot against the network, and what the actions of the dynamics do."""
    config, goal = state.config, batch.targets
    _, evaluation, folded = copies(state)
    stored = Network(folded.spec, folded=True).to(state.device).requires_grad_(False).eval()
    stored.load_state_dict(state.snapshot.state_dict())
    (values, _, logits), (fresh, _, fresh_logits), (old, _, old_logits) = (
        unrolled(network, plain.observation, goal.action, config.lstm_horizon) for network in (evaluation, folded, stored)
    )
    off = max(_furthest(values, fresh), _furthest(logits, fresh_logits))
    since = int(state.updates) % config.snapshot_interval
    z, v = goal.value[:, 0], fresh[:, 0]
    explained = 1 - float((z - v).var() / z.var().clamp_min(1e-12))
    return [
        judged(off <= 1e-3 * max(1.0, float(logits.abs().max())), f"folding: the network in evaluation mode and folded differ: {off:.2g}"),
        judged(_furthest(fresh, old) < 1 or since == 0, f"the snapshot in use, about {since} updates old, and one folded now: logits "
               f"differ by {_furthest(fresh_logits, old_logits):.3g}, values by {_furthest(fresh, old):.3g}", "look"),
        *_loss_findings(state, batch),
        _statistics_finding(state, batch),
        judged(float(z.std()) > 1e-3, f"value targets: {quantiles(z)}", "look"),
        judged(explained > 0, f"values predicted for them: {quantiles(v)}; variance explained {explained:.0%}", "look"),
        _action_finding(folded, plain, goal.prefix[:, 0]),
    ]  # fmt: skip


def _loss_findings(state: State, batch: Batch) -> list[Finding]:
    found = []
    for name, (at, running, limit) in loss_table(state, batch).items():
        if name != "consistency_loss" or state.config.consistency_weight > 0:
            agree = abs(at - running) < max(0.25 * (limit.constant - limit.floor), 0.05 * abs(at), 1e-3)
            found.append(judged(
                limit.learned(at) > 0 and agree,
                f"{name}: {at:.4f} by the batch's statistics, {running:.4f} by the running ones; floor {limit.floor:.4f}, constant "
                f"{limit.constant:.4f}: {limit.learned(at):.0%} learned", "look",
            ))  # fmt: skip
    return found


@torch.no_grad()
def _statistics_finding(state: State, batch: Batch) -> Finding:
    """What the policy loss becomes if one part at a time uses its running statistics, as the snapshot must, and the rest the batch's."""

    def loss(part: tuple[str, ...]) -> float:
        network = copies(state)[0]  # a new one: in training mode, a forward pass moves the running statistics
        for name, module in network.named_children():
            if part and name.startswith(part):
                module.eval()
        return float(learn.losses(network, batch, state.config)[1]["policy_loss"])

    limit, base = bounds(batch.targets, state.config.support)["policy_loss"], loss(())
    more = {name: loss(part) - base for name, part in PARTS.items()}
    text = ", ".join(f"{name} {by:+.4f}" for name, by in more.items())
    return judged(max(map(abs, more.values())) < max(0.1 * (limit.constant - limit.floor), 1e-3),
                  f"policy loss with the running statistics in one part alone: {text}", "look")  # fmt: skip


@torch.no_grad()
def _action_finding(folded: Network, plain: Batch, reward: Tensor) -> Finding:
    """Whether the predicted reward depends on the action, where there is one to predict."""
    rows = reward.nonzero()[:, 0]
    where = f"{rows.shape[0]} positions whose next reward is not 0"
    if rows.shape[0] == 0:
        rows, where = torch.arange(reward.shape[0]), "all positions, none with a reward next,"
    latent, hidden = folded.represent(plain.observation[rows]), folded.initial_hidden(rows.shape[0])
    every = torch.stack([
        to_scalar(folded.step(latent, hidden, torch.full_like(rows, action)).prefix) for action in range(folded.spec.actions)
    ], 1)  # fmt: skip
    taken = every.gather(1, plain.targets.action[rows, :1])
    spread = float((every.amax(1) - every.amin(1)).mean())
    return judged(spread > 1e-6, f"reward predicted at {where}: after the action taken {float(taken.mean()):.3g}, mean over all actions "
                                 f"{float(every.mean()):.3g}, target {float(reward[rows].mean()):.3g}; the action moves it by {spread:.3g}",
                  "look")  # fmt: skip
