"""One update of the network: sample, gather, unroll, loss, optimiser, priorities (step 5, learn).

An update whose loss, gradient or running statistics are not finite is skipped: neither the weights nor the statistics change. It is
counted, and which batch it was is kept for the host to look into (`health`).

Losses: EfficientZero (Ye et al., NeurIPS 2021), equation 5 and appendix A.1. In the shapes `B` is the batch, `K` the unroll, `A` actions.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from speedyzero.config import Config
from speedyzero.nets import Network
from speedyzero.optim import SGD, ClippedLARS, RunningStatistics
from speedyzero.refresh import PRIORITY_FLOOR, bootstrap, n_steps
from speedyzero.ring import Ring
from speedyzero.stages import stage
from speedyzero_kernels import dispatch
from speedyzero_kernels.gather import observations
from speedyzero_kernels.nstep import Targets, targets
from speedyzero_kernels.sample import proportional
from speedyzero_kernels.support import cross_entropy, to_scalar

__all__ = [
    "LEARN_METRICS", "SGD", "Augmentation", "Batch", "ClippedLARS", "Evidence", "Learner", "draw", "gather_batch", "losses",
    "make_learner", "make_optimizer", "observe", "update",
]  # fmt: skip

LEARN_METRICS = (
    "losses/loss", "losses/value_prefix_loss", "losses/value_loss", "losses/policy_loss", "losses/consistency_loss",
    "train/grad_norm", "train/learning_rate", "train/priority", "train/value_target", "train/value_abs_max",
)
"""What an update reports."""

NOT_NORMALISED: Mapping[str, Tensor] = MappingProxyType({})
"""The `normalisation` of a network that takes pixels as they are."""


@dataclass
class Augmentation:
    """The random draws of a batch; [0] is for the observations, [1] for the futures of the same sample."""

    shift: Tensor
    """[2, B, 2] int64, where the window begins in the padded frame: y, x."""
    intensity: Tensor
    """[2, B] float32."""


@dataclass
class Batch:
    """What an update learns from."""

    observation: Tensor
    """[B, stack x C, H, W] float32 (bfloat16 with `amp`), augmented."""
    future: Tensor
    """[B x M, stack x C, H, W] of the same dtype, the observations that follow, M = K, sample-major, augmented by draws of their own."""
    targets: Targets
    weights: Tensor
    """[B] float32 importance weights, at most 1."""
    augmentation: Augmentation | None = None
    """Without: the frames as they are."""
    compared: Tensor | None = None
    """[M] int64 in 1..K, which steps `future` holds, for the consistency loss to compare; without: all K."""


class Evidence:
    """The last update that was skipped: which batch it was, with what targets and draws, and what came of it.

    All in one buffer of 32-bit words, so that an update need not launch two kernels for each of its fields.
    """

    def __init__(self, config: Config, actions: int, device: torch.device):
        size, steps = config.batch_size, config.unroll
        whole, real = torch.int64, torch.float32
        self._fields: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "update": ((), whole), "head": ((), whole), "loss": ((), real), "grad_norm": ((), real),
            "index": ((size,), whole), "weights": ((size,), real),
            "targets.value": ((size, steps + 1), real), "targets.prefix": ((size, steps), real),
            "targets.policy": ((size, steps + 1, actions), real), "targets.action": ((size, steps), whole),
            "targets.mask": ((size, steps + 1), real), "targets.policy_mask": ((size, steps + 1), real),
        }  # fmt: skip
        if config.augment:
            self._fields |= {"augmentation.shift": ((2, size, 2), whole), "augmentation.intensity": ((2, size), real)}
        self.words = torch.zeros(sum(self._sizes()), dtype=torch.int32, device=device)

    def _sizes(self) -> list[int]:
        """Words of each field."""
        return [prod(shape) * dtype.itemsize // 4 for shape, dtype in self._fields.values()]

    def keep(self, wanted: Tensor, fields: dict[str, Tensor]) -> None:
        """Take in all fields if `wanted` [] bool; else keep what is there."""
        words = torch.cat([fields[name].reshape(-1).view(torch.int32) for name in self._fields])
        torch.where(wanted, words, self.words, out=self.words)

    def read(self) -> dict[str, Tensor]:
        """Copies of all fields by name, on the device; zeros if nothing was skipped yet.

        `update` [] counts from 1; `head` [] is the ring's then; `loss` []; `grad_norm` [] as the optimiser saw it, so NaN wherever the
        loss or a statistic was not finite; `index` [B] flat; `weights` [B]; `targets.X` for the fields of `Targets`; `augmentation.X`
        for those of `Augmentation`, if the config augments.
        """
        rows = self.words.split(self._sizes())
        return {name: row.clone().view(dtype).view(shape) for row, (name, (shape, dtype)) in zip(rows, self._fields.items(), strict=True)}


@dataclass
class Learner:
    """The network in training, its optimiser, and how it fares."""

    network: Network
    optimizer: SGD | ClippedLARS
    statistics: RunningStatistics
    """Of the network's BatchNorms."""
    skipped: Tensor
    """[] int64, updates skipped because their loss, gradient or running statistics were not finite."""
    skipped_in_a_row: Tensor
    """[] int64, those since the last one that was not."""
    reported: Tensor
    """[M] float32, LEARN_METRICS of the last update that was not skipped; zeros before the first."""
    evidence: Evidence


def make_optimizer(network: Network, config: Config, lr: Tensor) -> SGD | ClippedLARS:
    """The optimiser that the config names; `lr` [] is read at every step."""
    if config.optimizer == "sgd":
        return SGD(network, lr, config.momentum, config.weight_decay, config.max_grad_norm)
    return ClippedLARS(
        network, lr, config.momentum, config.weight_decay, config.trust_coefficient, config.trust_clip, config.max_grad_norm
    )


def make_learner(network: Network, config: Config) -> Learner:
    """A learner of `network`, whose parameters and running statistics become views of flat buffers."""
    device = next(network.parameters()).device

    def zero() -> Tensor:
        return torch.zeros((), dtype=torch.int64, device=device)

    return Learner(
        network=network,
        optimizer=make_optimizer(network, config, torch.zeros((), device=device)),
        statistics=RunningStatistics(network),
        skipped=zero(),
        skipped_in_a_row=zero(),
        reported=torch.zeros(len(LEARN_METRICS), device=device),
        evidence=Evidence(config, network.spec.actions, device),
    )


def learning_rate(config: Config, updates: Tensor) -> Tensor:
    """Learning rate [] float32 of the update after `updates` [] int64: linear warm-up, constant, times lr_decay past the planned ones."""
    warmup = max(1.0, config.lr_warmup * config.planned_updates)
    rate = config.lr * ((updates + 1) / warmup).clamp(max=1.0)
    return torch.where(updates < config.planned_updates, rate, rate * config.lr_decay).to(torch.float32)


def importance_exponent(config: Config, updates: Tensor) -> Tensor:
    """Beta [] float32: from priority_beta to 1, linearly over the planned updates."""
    progress = (updates / config.planned_updates).clamp(max=1.0)
    return config.priority_beta + (1 - config.priority_beta) * progress


def draw(ring: Ring, allowed: Tensor, config: Config, updates: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw positions by priority among the `allowed` [L, T] ones: flat indices [B] int64 and importance weights [B]."""
    priorities = torch.where(allowed, ring.priority, 0.0).view(-1)
    beta = importance_exponent(config, updates)
    return proportional(priorities, config.batch_size, config.priority_alpha, beta, generator)


def _augmentation(config: Config, batch: int, generator: torch.Generator) -> Augmentation:
    """Shift and intensity of the observations and, by draws of their own, of the futures: one draw a sample and branch."""
    device = generator.device
    shifts, noises = [], []
    for _ in range(2):
        shifts.append(torch.randint(2 * config.shift + 1, (batch, 2), generator=generator, device=device))
        noises.append(torch.randn(batch, generator=generator, device=device))
    return Augmentation(torch.stack(shifts), 1.0 + config.intensity * torch.stack(noises).clamp(-2.0, 2.0))


def compared_steps(config: Config, updates: Tensor) -> Tensor | None:
    """The steps of the unroll [M] that the consistency loss of the update after `updates` [] int64 compares: all take their turn."""
    count = config.consistency_steps or config.unroll
    if count >= config.unroll:
        return None
    return (updates * count + torch.arange(count, device=updates.device)) % config.unroll + 1


def observe(
    ring: Ring, index: Tensor, config: Config, augmentation: Augmentation | None, compared: Tensor | None = None,
    normalisation: Mapping[str, Tensor] = NOT_NORMALISED,
) -> tuple[Tensor, Tensor]:
    """The observations of the positions `index` [B] flat and of those `compared` [M] steps later, as `Batch` holds them.

    normalisation: the network's own.

    Raises:
        ValueError: the config wants frames normalised and `normalisation` is empty.
    """
    if config.normalize_frames and not normalisation:
        raise ValueError("normalisation: is missing, though --normalize-frames is on; give the network's")
    lane, slot = index // ring.slots, index % ring.slots
    if compared is None:
        compared = torch.arange(1, config.unroll + 1, device=index.device)
    future = (lane[:, None] * ring.slots + (slot[:, None] + compared) % ring.slots).flatten()
    drawn: dict[str, Tensor | int] = {}
    if augmentation is not None:
        both = augmentation.shift, augmentation.intensity
        shift, intensity = (torch.cat((draws[0], draws[1].repeat_interleave(compared.shape[0], 0))) for draws in both)
        drawn = {"shift": shift, "pad": config.shift, "intensity": intensity}
    frames = observations(
        ring.frames, ring.first, torch.cat((index, future)), config.frame_stack, **drawn, **normalisation,
        dtype=torch.bfloat16 if config.amp else torch.float32, memory_format=dispatch.board_format(ring.frames),
    )
    return frames[: index.shape[0]], frames[index.shape[0] :]


def gather_batch(
    ring: Ring, index: Tensor, weights: Tensor, config: Config, generator: torch.Generator, compared: Tensor | None = None,
    normalisation: Mapping[str, Tensor] = NOT_NORMALISED,
) -> Batch:
    """Observations and targets of the positions `index` [B] flat; `compared` as in `Batch`, `normalisation` as in `observe`."""
    augmentation = _augmentation(config, index.shape[0], generator) if config.augment else None
    observation, future = observe(ring, index, config, augmentation, compared, normalisation)
    return Batch(
        observation=observation,
        future=future,
        targets=targets(
            ring.reward, ring.done, bootstrap(ring, config), ring.policy, ring.action, index, n_steps(ring, index, config),
            unroll=config.unroll, n_max=config.n_step, discount=config.discount, horizon=config.lstm_horizon,
        ),
        weights=weights,
        augmentation=augmentation,
        compared=compared,
    )


def mixed_precision(config: Config, like: Tensor) -> AbstractContextManager:
    """Autocast to bf16 on the device of `like`, if the config wants it. bf16 has fp32's range: no loss scaling."""
    return torch.autocast(like.device.type, torch.bfloat16) if config.amp else nullcontext()


def halve_gradient(x: Tensor) -> Tensor:
    """The same values, half the gradient (MuZero, appendix G)."""
    return 0.5 * x + 0.5 * x.detach()


def losses(network: Network, batch: Batch, config: Config) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The loss of a batch [], its parts [] each (unweighted means), and the predicted root values [B].

    Only the dynamics and the LSTM go step by step. All else sees the steps of the unroll as one batch, step-major: then the statistics
    that BatchNorm takes in training are of all depths together, as those are that the snapshot is folded with. The dynamics' own BatchNorms
    still see one depth at a time.
    """
    goal, size, steps = batch.targets, batch.weights.shape[0], config.unroll
    latents = network.unroll(network.represent(batch.observation), goal.action, halve_gradient)
    hidden = [network.initial_hidden(size)]
    for k, features in enumerate(network.prefix_features(torch.cat(latents[1:])).split(size)):
        start = hidden[0] if k % config.lstm_horizon == 0 else hidden[-1]
        hidden.append(network.remember(features, start))
    prediction = network.predict(torch.cat(latents))

    def by_sample(per_step: Tensor, mask: Tensor) -> Tensor:
        """[steps x B] step-major -> [B], summed over the steps that `mask` [B, steps] keeps."""
        return (per_step.view(-1, size).t() * mask).sum(1)

    value = by_sample(cross_entropy(prediction.value, goal.value.t().flatten()), goal.mask)
    prefix = by_sample(cross_entropy(network.prefix(torch.cat(hidden[1:])), goal.prefix.t().flatten()), goal.mask[:, 1:])
    policy_targets = goal.policy.transpose(0, 1).flatten(0, 1)
    policy = by_sample(-(policy_targets * F.log_softmax(prediction.policy, 1)).sum(1), goal.policy_mask)
    total = config.prefix_weight * prefix + config.value_weight * value + config.policy_weight * policy
    parts = {"value_prefix_loss": prefix, "value_loss": value, "policy_loss": policy}
    if config.consistency_weight > 0:
        with torch.no_grad():
            real = network.projection(network.represent(batch.future).flatten(1))
        count = batch.future.shape[0] // size
        real = real.view(size, count, -1).transpose(0, 1).flatten(0, 1)
        reached, mask = torch.stack(latents[1:]), goal.mask[:, 1:]
        if batch.compared is not None:
            reached, mask = reached.index_select(0, batch.compared - 1), mask.index_select(1, batch.compared - 1)
        imagined = network.predictor(network.projection(reached.flatten(0, 1).flatten(1)))
        consistency = by_sample(-F.cosine_similarity(imagined, real, dim=1), mask) * (steps / count)
        total = total + config.consistency_weight * consistency
    else:
        consistency = torch.zeros_like(total)
    parts["consistency_loss"] = consistency
    loss = (batch.weights * total).mean() / steps
    metrics = {name: part.detach().mean() / steps for name, part in parts.items()}
    return loss, {"loss": loss.detach(), **metrics}, to_scalar(prediction.value[:size].detach())


def update(
    learner: Learner, ring: Ring, index: Tensor, weights: Tensor, updates: Tensor, config: Config, generator: torch.Generator
) -> dict[str, Tensor]:
    """Learn once from the positions `index` [B] and write their priorities |v - z|; counts itself in `updates` [] int64.

    If the loss, the gradient or a running statistic is not finite the update is skipped, though counted: weights, momentum and
    statistics stay as they were, bit for bit. No priority is made of a value that is not finite.

    Returns LEARN_METRICS, [] float32 each: see `_report`.
    """
    with stage("5.2 gather"):
        batch = gather_batch(ring, index, weights, config, generator, compared_steps(config, updates), learner.network.normalisation)
    optimizer = learner.optimizer
    optimizer.lr.copy_(learning_rate(config, updates))
    optimizer.zero_grad()
    learner.statistics.keep()
    with stage("5.3 losses"), mixed_precision(config, weights):
        loss, metrics, value = losses(learner.network, batch, config)
    with stage("5.4 backward"):
        loss.backward()
    with stage("5.5 optimizer"):
        # The optimiser judges by the gradient alone: a loss or a statistic that is not finite makes it NaN. (An infinite variance, which
        # BatchNorm divides by, leaves both loss and gradient finite.) While all is finite this is 0.0, and takes nothing away.
        seen = learner.statistics.values
        optimizer.flat.grads[:1].sub_((metrics["loss"] - metrics["loss"]) + (seen - seen).sum())
        norm, skipped = optimizer.step()
        learner.statistics.restore(skipped)
        updates += 1
        learner.skipped += skipped
        learner.skipped_in_a_row.add_(1).mul_(skipped)
        evidence = {"update": updates, "head": ring.head, "loss": metrics["loss"], "grad_norm": norm, "index": index, "weights": weights}
        for name in ("targets", "augmentation") if config.augment else ("targets",):
            evidence |= {f"{name}.{field}": tensor for field, tensor in vars(getattr(batch, name)).items()}
        learner.evidence.keep(skipped, evidence)
    with stage("5.6 priorities"):
        fresh = (value - batch.targets.value[:, 0]).abs() + PRIORITY_FLOOR
        priority = torch.where(fresh.isfinite(), fresh, ring.priority.view(-1)[index])
        # A position drawn twice keeps the greater priority: the order of the writes must not matter.
        ring.priority.view(-1).index_fill_(0, index, 0.0).scatter_reduce_(0, index, priority, "amax")
        ring.measured.view(-1).index_fill_(0, index, True)
    reported = {f"losses/{name}": value for name, value in metrics.items()} | {
        "train/grad_norm": norm,
        "train/learning_rate": optimizer.lr,
        "train/priority": priority.mean(),
        "train/value_target": batch.targets.value[:, 0].mean(),
        "train/value_abs_max": value.abs().max(),
    }
    return _report(learner, reported, skipped, config)


def _report(learner: Learner, metrics: dict[str, Tensor], skipped: Tensor, config: Config) -> dict[str, Tensor]:
    """`metrics` as they come into the averages: where the update was skipped, or a number is not finite, what was reported last.

    One NaN would make a whole log interval's mean NaN. So a mean is one of updates that were learned from, and the one before a skipped
    one counts once more. NaN after a log interval in which all were skipped: nothing is known of it.
    """
    row = torch.stack([metrics[name].to(torch.float32) for name in LEARN_METRICS])
    # x - x is 0 or NaN: equal to `skipped` where x is finite and the update was not skipped.
    torch.where((row - row) == skipped, row, learner.reported, out=learner.reported)
    known = learner.skipped_in_a_row < config.log_interval * config.updates_per_iteration
    return dict(zip(LEARN_METRICS, torch.where(known, learner.reported, torch.nan).unbind(), strict=True))
