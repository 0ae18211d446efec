"""What can be said of a whole run at its checkpoint: one line each, with a verdict.

`ok` is as it must be, `BAD` cannot be in a run that works, `look` may be right and is what a run that does not learn looks like.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from speedyzero import learn
from speedyzero.batch import Batch
from speedyzero.config import Config
from speedyzero.diagnosis import collapsed, undecided
from speedyzero.nets import Network, fold
from speedyzero.ring import eligible
from speedyzero.state import State
from speedyzero_kernels.support import to_scalar
from tools.inspect.loss_floors import bounds
from tools.inspect.reference_targets import Raw, augmented, normalised

LOSSES = ("value_prefix_loss", "value_loss", "policy_loss", "consistency_loss")
PARTS = {"representation": ("representation",), "dynamics": ("dynamics",), "heads": ("prediction", "value", "policy")}
"""The parts of the network that a policy comes of, by how the names of their modules begin."""
TOLERANCE = 1e-4
"""Of numbers that are the same but for their rounding in fp32, relative to the greatest of them or 1."""


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
    x = x[x.isfinite()].double()
    if x.numel() == 0:
        return "none"
    return " ".join(f"{np.quantile(x.cpu().numpy(), q):.3g}" for q in (0, 0.1, 0.5, 0.9, 1))


def written(state: State) -> Tensor:
    """Which slots [T] were ever written."""
    return torch.arange(state.ring.slots, device=state.device) < state.ring.head


def ring_findings(state: State) -> list[Finding]:
    """Episodes, dead slots, rewards, eligibility, priorities, and what is not finite."""
    ring, config = state.ring, state.config
    done, first, some = ring.done[:, written(state)], ring.first[:, written(state)], written(state)
    dead, slots, head = int(done.sum()), ring.slots, int(ring.head)
    found = [Finding("ok", f"{head} slots of {ring.lanes} lanes written, the ring holds {slots}; dead {dead / done.numel():.1%} "
                           f"({dead} of {done.numel()})")]  # fmt: skip
    before = done.roll(1, 1)  # of the slot before; over the lap's end only once the ring is full
    follows = torch.ones_like(first)
    follows[:, head % slots if head > slots else 0] = False  # the oldest: what came before it is gone
    odd = int(((first != before) & follows).sum())
    found.append(judged(odd == 0, f"episodes: {int(first.sum())} begin; slots that begin one and follow no end, or the reverse: {odd}"))
    late = int((ring.reward[:, some][first] != 0).sum())
    found.append(judged(late == 0, f"rewards on arriving at a first frame: {late}"))
    kept = sum(int((getattr(ring, name)[:, some][done] != 0).sum()) for name in ("priority", "value", "root_value", "policy"))
    found.append(judged(kept == 0, f"dead slots with a priority, a value or a policy: {kept} numbers"))
    raw, reward = ring.raw_reward[:, some], ring.reward[:, some]
    wrong = int((reward != (raw.sign() if config.clip_reward else raw)).sum())
    rule = "the sign of the raw ones" if config.clip_reward else "the raw ones"
    found.append(judged(wrong == 0, f"rewards that are not {rule}: {wrong}"))
    values, counts = reward.unique(return_counts=True)
    histogram = ", ".join(f"{value:g}: {count}" for value, count in zip(values.tolist()[:9], counts.tolist()[:9], strict=True))
    found.append(judged(bool((reward != 0).any()), f"rewards: {histogram}; raw {quantiles(raw)}", "look"))

    allowed = eligible(ring, config)
    count = int(allowed.sum())
    found.append(judged(count > 0, f"eligible: {count} ({count / done.numel():.1%} of what is written)"))
    if count:
        age = (state.updates - ring.refreshed_at)[allowed]
        found.append(judged(config.refresh == "sampled" or int(age.max()) <= int(state.updates),
                            f"updates since the last search of the eligible: {quantiles(age)}"))  # fmt: skip
        priority = ring.priority[allowed]
        mass = priority.double() ** config.priority_alpha
        effective = float(mass.sum() ** 2 / (mass**2).sum() / count) if mass.sum() > 0 else 0.0
        measured = float(ring.measured[allowed].float().mean())
        found.append(judged(effective > 0.1, f"priorities of the eligible: {quantiles(priority)}; measured {measured:.0%}; sampling is as "
                                             f"wide as {effective:.0%} of them drawn alike", "look"))  # fmt: skip
        policy = ring.policy[allowed].float()
        entropy = torch.special.entr(policy).sum(1)
        most = float(np.log(state.spec.num_actions))
        middle = float(entropy.median())
        found.append(judged(not collapsed(middle, state.spec.num_actions) and not undecided(middle, state.spec.num_actions),
                            f"entropy of the visits: {quantiles(entropy)}; uniform would be {most:.3g}", "look"))  # fmt: skip
        off = int(((policy.sum(1) - 1).abs() > 2e-3).sum())
        found.append(judged(off == 0, f"policies of the eligible that do not sum to 1: {off}"))
    tensors = {name: tensor for name, tensor in state.tensors().items() if tensor.is_floating_point()}
    bad = {name: int((~tensor.isfinite()).sum()) for name, tensor in tensors.items()}
    odd_names = ", ".join(f"{name} {number}" for name, number in bad.items() if number)
    found.append(judged(not odd_names, f"numbers that are not finite: {odd_names or 0}; updates skipped {int(state.learner.skipped)}"))
    return found


def target_findings(state: State, index: Tensor, batch: Batch, plain: Batch) -> list[Finding]:
    """The tensors of an update against plain loops over the raw ring. `batch`: of `index` [M], augmented; `plain`: not."""
    raw, config = Raw(state.ring, state.config), state.config
    goal = {name: tensor.cpu().numpy() for name, tensor in vars(batch.targets).items()}
    wrong = dict.fromkeys(("value", "prefix", "mask", "policy mask", "observation", "augmentation"), 0)
    action, policy = state.ring.action.cpu().numpy(), state.ring.policy.float().cpu().numpy()
    wrong |= {"action": 0, "policy": 0}
    future = {name: one.future.unflatten(0, (-1, config.unroll)).float().cpu().numpy() for name, one in
              (("plain", plain), ("augmented", batch))}  # fmt: skip
    now = {name: one.observation.float().cpu().numpy() for name, one in (("plain", plain), ("augmented", batch))}
    pixels = {name: tensor.double().cpu().numpy() for name, tensor in state.learner.network.normalisation.items()}
    close = 1e-2 if config.amp else 1e-5
    for row, flat in enumerate(index.tolist()):
        lane, slot = divmod(flat, raw.slots)
        steps = raw.window(lane, slot)
        for k, step in enumerate(steps):
            wrong["value"] += abs(goal["value"][row, k] - step.value) > TOLERANCE * max(1, abs(step.value))
            wrong["mask"] += goal["mask"][row, k] != step.counts
            wrong["policy mask"] += goal["policy_mask"][row, k] != step.acts
            wrong["policy"] += bool((goal["policy"][row, k] != policy[lane, step.slot] * step.acts).any())
            if k < config.unroll:
                wrong["action"] += goal["action"][row, k] != action[lane, step.slot] * step.acts
            if k > 0:
                wrong["prefix"] += abs(goal["prefix"][row, k - 1] - step.prefix) > TOLERANCE * max(1, abs(step.prefix))
            dim = seen = raw.stack(lane, step.slot)
            seen = normalised(seen, **pixels) if pixels else seen
            mine = {name: now[name][row] if k == 0 else future[name][row, k - 1] for name in now}
            wrong["observation"] += np.abs(mine["plain"] - seen).max() > close * max(1, np.abs(seen).max())
            if batch.augmentation is not None:
                shift, intensity = (drawn[min(k, 1)][row].tolist() for drawn in (batch.augmentation.shift, batch.augmentation.intensity))
                dim = dim * intensity
                seen = augmented(normalised(dim, **pixels) if pixels else dim, shift, config.shift, 1.0)
            wrong["augmentation"] += np.abs(mine["augmented"] - seen).max() > close * max(1, np.abs(seen).max())
    text = ", ".join(f"{name} {int(count)}" for name, count in wrong.items())
    return [judged(not any(wrong.values()), f"worked out by hand, {index.shape[0]} windows of {config.unroll + 1}: differing {text}")]


@torch.no_grad()
def unrolled(network: Network, observation: Tensor, action: Tensor, horizon: int) -> tuple[Tensor, Tensor, Tensor]:
    """Value [M, K + 1], value prefix [M, K] and policy logits [M, K + 1, A] along the actions [M, K], as the search would see them."""
    latent, hidden = network.represent(observation), network.initial_hidden(observation.shape[0])
    predictions, prefixes = [network.predict(latent)], []
    for k in range(action.shape[1]):
        start = torch.zeros_like(hidden) if k % horizon == 0 else hidden
        latent, hidden, prefix = network.step(latent, start, action[:, k].contiguous())
        predictions.append(network.predict(latent))
        prefixes.append(to_scalar(prefix))
    values = torch.stack([to_scalar(prediction.value) for prediction in predictions], 1)
    return values, torch.stack(prefixes, 1), torch.stack([prediction.policy for prediction in predictions], 1)


def copies(state: State) -> tuple[Network, Network, Network]:
    """The training network in training mode and in evaluation mode, and a snapshot folded from it now: copies, in fp32."""
    source, spec = state.learner.network, state.learner.network.spec
    training, evaluation, folded = (Network(spec, folded=fresh).to(state.device) for fresh in (False, False, True))
    for copy in (training, evaluation):
        copy.load_state_dict(source.state_dict())
    fold(source, folded)
    return training.train(), evaluation.eval(), folded.requires_grad_(False).eval()


def _furthest(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


def network_findings(state: State, batch: Batch, plain: Batch) -> list[Finding]:
    """The network against its targets, the snapshot against the network, and what the actions of the dynamics do."""
    config, goal = replace(state.config, amp=False), batch.targets
    training, evaluation, folded = copies(state)
    stored = Network(folded.spec, folded=True).to(state.device).requires_grad_(False).eval()
    stored.load_state_dict(state.snapshot.state_dict())
    values, _, logits = unrolled(evaluation, plain.observation, goal.action, config.lstm_horizon)
    fresh, old = (unrolled(network, plain.observation, goal.action, config.lstm_horizon) for network in (folded, stored))
    scale = max(1.0, float(logits.abs().max()))
    off = max(_furthest(values, fresh[0]), _furthest(logits, fresh[2]))
    lag = f"{_furthest(fresh[2], old[2]):.3g}, values {_furthest(fresh[0], old[0]):.3g}"
    since = int(state.updates) % config.snapshot_interval
    found = [
        judged(off <= 1e-3 * scale, f"folding: the network in evaluation mode and folded anew differ by at most {off:.2g}"),
        judged(_furthest(fresh[0], old[0]) < 1 or since == 0,
               f"the snapshot in use, about {since} updates old, and one folded now: logits differ by {lag}", "look"),
    ]  # fmt: skip
    found += _loss_findings(batch, config, training, evaluation, stored)
    found.append(_statistics_finding(state, batch, config))
    z, v = goal.value[:, 0], fresh[0][:, 0]
    explained = 1 - float((z - v).var() / z.var().clamp_min(1e-12))
    found.append(judged(float(z.std()) > 1e-3, f"value targets: {quantiles(z)}", "look"))
    found.append(judged(explained > 0, f"values predicted for them: {quantiles(v)}; variance explained {explained:.0%}", "look"))
    found.append(_action_finding(folded, plain, goal.prefix[:, 0]))
    return found


def _loss_findings(batch: Batch, config: Config, training: Network, evaluation: Network, stored: Network) -> list[Finding]:
    limits = bounds(batch.targets, config.support)
    with torch.no_grad():
        train, evaluate = (learn.losses(network, batch, config)[1] for network in (training, evaluation))
        # The convolutions of a snapshot want the actions of a step in a row.
        by_step = replace(batch, targets=replace(batch.targets, action=batch.targets.action.t().contiguous().t()))
        used = learn.losses(stored, by_step, replace(config, consistency_weight=0.0))[1]
    found = []
    for name in LOSSES:
        limit, at, running = limits[name], float(train[name]), float(evaluate[name])
        if name == "consistency_loss" and config.consistency_weight == 0:
            continue
        span = max(limit.constant - limit.floor, 1e-6)
        snapshot = "" if name == "consistency_loss" else f", snapshot in use {float(used[name]):.4f}"
        agree = abs(at - running) < max(0.25 * span, 0.05 * abs(at), 1e-3)
        found.append(judged(
            limit.learned(at) > 0 and agree,
            f"{name}: {at:.4f} by the batch's statistics, {running:.4f} by the running ones{snapshot}; floor {limit.floor:.4f}, constant "
            f"{limit.constant:.4f}: {limit.learned(at):.0%} learned", "look",
        ))  # fmt: skip
    return found


@torch.no_grad()
def _statistics_finding(state: State, batch: Batch, config: Config) -> Finding:
    """What the policy loss becomes if one part at a time uses its running statistics, as the snapshot must, and the rest the batch's."""

    def loss(part: tuple[str, ...]) -> float:
        network = copies(state)[0]  # a new one: in training mode, a forward pass moves the running statistics
        for name, module in network.named_children():
            if part and name.startswith(part):
                module.eval()
        return float(learn.losses(network, batch, config)[1]["policy_loss"])

    limit, base = bounds(batch.targets, config.support)["policy_loss"], loss(())
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
    latent, actions = folded.represent(plain.observation[rows]), folded.spec.actions
    hidden = folded.initial_hidden(rows.shape[0])
    every = torch.stack([
        to_scalar(folded.step(latent, hidden, torch.full_like(rows, action)).prefix) for action in range(actions)
    ], 1)  # fmt: skip
    taken = every.gather(1, plain.targets.action[rows, :1])[:, 0]
    spread = float((every.amax(1) - every.amin(1)).mean())
    return judged(spread > 1e-6, f"reward predicted at {where}: after the action taken {float(taken.mean()):.3g}, mean over all actions "
                                 f"{float(every.mean()):.3g}, target {float(reward[rows].mean()):.3g}; the action moves it by {spread:.3g}",
                  "look")  # fmt: skip
