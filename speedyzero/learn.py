"""One update of the network: sample, gather, unroll, loss, optimiser, priorities (step 5, learn).

Losses: EfficientZero (Ye et al., NeurIPS 2021), equation 5 and appendix A.1. In the shapes `B` is the batch, `K` the unroll, `A` actions.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from speedyzero.config import Config
from speedyzero.nets import Network
from speedyzero.optim import SGD, ClippedLARS
from speedyzero.refresh import PRIORITY_FLOOR, bootstrap, n_steps
from speedyzero.ring import Ring
from speedyzero.stages import stage
from speedyzero_kernels import dispatch
from speedyzero_kernels.gather import observations
from speedyzero_kernels.nstep import Targets, targets
from speedyzero_kernels.sample import proportional
from speedyzero_kernels.support import cross_entropy, to_scalar

__all__ = ["SGD", "Batch", "ClippedLARS", "Learner", "draw", "gather_batch", "losses", "make_optimizer", "update"]


@dataclass
class Learner:
    """The network in training and its optimiser."""

    network: Network
    optimizer: SGD | ClippedLARS
    skipped: Tensor
    """[] int64, steps left out because their gradient was not finite."""


@dataclass
class Batch:
    """What an update learns from."""

    observation: Tensor
    """[B, stack x C, H, W] float32 (bfloat16 with `amp`), augmented."""
    future: Tensor
    """[B x K, stack x C, H, W] of the same dtype, the observations that follow, sample-major, augmented by draws of their own."""
    targets: Targets
    weights: Tensor
    """[B] float32 importance weights, at most 1."""


def make_optimizer(network: Network, config: Config, lr: Tensor) -> SGD | ClippedLARS:
    """The optimiser that the config names; `lr` [] is read at every step."""
    if config.optimizer == "sgd":
        return SGD(network, lr, config.momentum, config.weight_decay, config.max_grad_norm)
    return ClippedLARS(
        network, lr, config.momentum, config.weight_decay, config.trust_coefficient, config.trust_clip, config.max_grad_norm
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


def _augmentation(config: Config, batch: int, generator: torch.Generator) -> dict[str, Tensor | int]:
    """Shift and intensity of the observations and, by draws of their own, of the futures: one draw a sample and branch."""
    if not config.augment:
        return {}
    device = generator.device
    shifts, intensities = [], []
    for repeat in (1, config.unroll):
        shift = torch.randint(2 * config.shift + 1, (batch, 2), generator=generator, device=device)
        noise = torch.randn(batch, generator=generator, device=device).clamp(-2.0, 2.0)
        shifts.append(shift.repeat_interleave(repeat, 0))
        intensities.append((1.0 + config.intensity * noise).repeat_interleave(repeat, 0))
    return {"shift": torch.cat(shifts), "pad": config.shift, "intensity": torch.cat(intensities)}


def gather_batch(ring: Ring, index: Tensor, weights: Tensor, config: Config, generator: torch.Generator) -> Batch:
    """Observations and targets of the positions `index` [B] flat."""
    lane, slot = index // ring.slots, index % ring.slots
    following = torch.arange(1, config.unroll + 1, device=index.device)
    future = (lane[:, None] * ring.slots + (slot[:, None] + following) % ring.slots).flatten()
    batch = index.shape[0]
    frames = observations(
        ring.frames, ring.first, torch.cat((index, future)), config.frame_stack, **_augmentation(config, batch, generator),
        dtype=torch.bfloat16 if config.amp else torch.float32, memory_format=dispatch.board_format(ring.frames),
    )
    return Batch(
        observation=frames[:batch],
        future=frames[batch:],
        targets=targets(
            ring.reward, ring.done, bootstrap(ring, config), ring.policy, ring.action, index, n_steps(ring, index, config),
            unroll=config.unroll, n_max=config.n_step, discount=config.discount, horizon=config.lstm_horizon,
        ),
        weights=weights,
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
    latents = [network.represent(batch.observation)]
    for k in range(steps):
        latents.append(halve_gradient(network.advance(latents[-1], goal.action[:, k])))
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
        real = real.view(size, steps, -1).transpose(0, 1).flatten(0, 1)
        imagined = network.predictor(network.projection(torch.cat(latents[1:]).flatten(1)))
        consistency = by_sample(-F.cosine_similarity(imagined, real, dim=1), goal.mask[:, 1:])
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

    Returns metrics, [] float32 each.
    """
    with stage("5.2 gather"):
        batch = gather_batch(ring, index, weights, config, generator)
    optimizer = learner.optimizer
    optimizer.lr.copy_(learning_rate(config, updates))
    optimizer.zero_grad()
    with stage("5.3 losses"), mixed_precision(config, weights):
        loss, metrics, value = losses(learner.network, batch, config)
    with stage("5.4 backward"):
        loss.backward()
    with stage("5.5 optimizer"):
        norm, skipped = optimizer.step()
        learner.skipped += skipped
        updates += 1
    with stage("5.6 priorities"):
        fresh = (value - batch.targets.value[:, 0]).abs() + PRIORITY_FLOOR
        priority = torch.where(fresh.isfinite(), fresh, ring.priority.view(-1)[index])
        # A position drawn twice keeps the greater priority: the order of the writes must not matter.
        ring.priority.view(-1).index_fill_(0, index, 0.0).scatter_reduce_(0, index, priority, "amax")
        ring.measured.view(-1).index_fill_(0, index, True)
    return {f"losses/{name}": value for name, value in metrics.items()} | {
        "train/grad_norm": norm,
        "train/learning_rate": optimizer.lr.clone(),
        "train/priority": priority.mean(),
        "train/value_target": batch.targets.value[:, 0].mean(),
        "train/value_abs_max": value.abs().max(),
    }
