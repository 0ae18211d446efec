"""One update of the network: gather, unroll, loss, optimiser, priorities (step 5, learn).

An update whose loss, gradient or running statistics are not finite is skipped: neither the weights nor the statistics change. It is
counted, for the host to judge (`run.health`).

Losses: EfficientZero (Ye et al., NeurIPS 2021), equation 5 and appendix A.1. In the shapes `B` is the batch, `K` the unroll, `A` actions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from speedyzero.batch import Batch, gather_batch
from speedyzero.config import Config
from speedyzero.layers import halve_gradient
from speedyzero.nets import Network
from speedyzero.optim import Learner
from speedyzero.precision import half_weights, mixed_precision
from speedyzero.ranks import ALONE, Ranks
from speedyzero.refresh import PRIORITY_FLOOR
from speedyzero.ring import Ring
from speedyzero.schedule import compared_steps, learning_rate
from speedyzero.stages import stage
from speedyzero_kernels import dispatch
from speedyzero_kernels.support import cross_entropy, to_scalar

LEARN_METRICS = (
    "losses/loss", "losses/value_prefix_loss", "losses/value_loss", "losses/policy_loss", "losses/consistency_loss",
    "train/grad_norm", "train/learning_rate", "train/priority", "train/value_target", "train/value_abs_max",
)
"""What an update reports."""


def losses(network: Network, batch: Batch, config: Config) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The loss of a batch [], its parts [] each (unweighted means), and the predicted root values [B].

    Only the dynamics and the LSTM go step by step. All else sees the steps of the unroll as one batch, step-major: then the statistics
    that BatchNorm takes in training are of all depths together, as those are that the snapshot is folded with. The dynamics' own BatchNorms
    still see one depth at a time.
    """
    goal, size, steps = batch.targets, batch.weights.shape[0], config.unroll
    latents = network.unroll(network.represent(batch.observation), goal.action, halve_gradient)
    # On CUDA one copy of the latents serves all: fewer launches, and sums of gradients in another order than on a CPU.
    every = torch.cat(latents) if dispatch.runs_kernel(batch.weights) else None
    later = torch.cat(latents[1:]) if every is None else every[size:]
    hidden = _remember(network, network.prefix_features(later), size, config.lstm_horizon)
    prediction = network.predict(torch.cat(latents) if every is None else every)

    def by_sample(per_step: Tensor, mask: Tensor) -> Tensor:
        """[steps x B] step-major -> [B], summed over the steps that `mask` [B, steps] keeps."""
        return (per_step.view(-1, size).t() * mask).sum(1)

    value = by_sample(cross_entropy(prediction.value, goal.value.t().flatten()), goal.mask)
    prefix = by_sample(cross_entropy(network.prefix(torch.cat(hidden)), goal.prefix.t().flatten()), goal.mask[:, 1:])
    policy_targets = goal.policy.transpose(0, 1).flatten(0, 1)
    policy = by_sample(-(policy_targets * F.log_softmax(prediction.policy, 1)).sum(1), goal.policy_mask)
    consistency = torch.zeros_like(value)
    if config.consistency_weight > 0:
        reached = torch.stack(latents[1:]) if every is None else later.unflatten(0, (steps, size))
        similarity, mask = _similarity(network, batch, reached)
        consistency = -by_sample(similarity, mask) * (steps / mask.shape[1])
    total = (
        config.prefix_weight * prefix + config.value_weight * value + config.policy_weight * policy
        + config.consistency_weight * consistency
    )  # fmt: skip
    loss = (batch.weights * total).mean() / steps
    parts = {"value_prefix_loss": prefix, "value_loss": value, "policy_loss": policy, "consistency_loss": consistency}
    means = (torch.stack(list(parts.values())).detach().mean(1) / steps).unbind()
    return loss, {"loss": loss.detach(), **dict(zip(parts, means, strict=True))}, to_scalar(prediction.value[:size].detach())


def _remember(network: Network, features: Tensor, size: int, horizon: int) -> list[Tensor]:
    """The LSTM over the features [steps x B, F], step-major, from zeros every `horizon` steps: K outputs or states, for `prefix`."""
    if dispatch.runs_kernel(features):
        return network.outputs(features, size, horizon)
    hidden = [network.initial_hidden(size)]
    for k, each in enumerate(features.split(size)):
        start = hidden[0] if k % horizon == 0 else hidden[-1]
        hidden.append(network.remember(each, start))
    return hidden[1:]


def _similarity(network: Network, batch: Batch, reached: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine of the imagined latents `reached` [K, B, ...] and those of the frames that followed [M x B], step-major, and the mask [B, M]
    of the M steps compared."""
    size = batch.weights.shape[0]
    with torch.no_grad():
        real = network.projection(network.represent(batch.future).flatten(1))
    real = real.view(size, -1, real.shape[1]).transpose(0, 1).flatten(0, 1)
    mask = batch.targets.mask[:, 1:]
    if batch.compared is not None:
        reached, mask = reached.index_select(0, batch.compared - 1), mask.index_select(1, batch.compared - 1)
    imagined = network.predictor(network.projection(reached.flatten(0, 1).flatten(1)))
    return F.cosine_similarity(imagined, real, dim=1), mask


def update(
    learner: Learner, ring: Ring, index: Tensor, weights: Tensor, updates: Tensor, config: Config, generator: torch.Generator,
    ranks: Ranks = ALONE,
) -> dict[str, Tensor]:
    """Learn once from the positions `index` [B] and write their priorities |v - z|; counts itself in `updates` [] int64.

    If the loss, the gradient or a running statistic is not finite the update is skipped, though counted: weights, momentum and
    statistics stay as they were, bit for bit. No priority is made of a value that is not finite.

    ranks: each unrolls its share of the batch; all else is done by all, alike.

    Returns LEARN_METRICS, [] float32 each; all NaN if the update was skipped.
    """
    network, optimizer, statistics = learner.network, learner.optimizer, learner.statistics
    with stage("5.2 gather"):
        compared, mine = compared_steps(config, updates), ranks.share(index.shape[0])
        batch = gather_batch(ring, index, weights, config, generator, compared, network.normalisation, mine)
    optimizer.lr.copy_(learning_rate(config, updates))
    statistics.keep()
    gathers = dispatch.runs_kernel(weights)
    if not gathers:
        optimizer.zero_grad()
    with stage("5.3 losses"), mixed_precision(config.amp, weights), half_weights(learner, config.amp and gathers) as leaves:
        loss, metrics, value = losses(network, batch, config)
    with stage("5.4 backward"):
        if gathers:  # one launch for all, where adding each to the buffer is a launch a parameter
            optimizer.flat.take(torch.autograd.grad(loss, leaves, allow_unused=True))
        else:
            loss.backward()
        ranks.average(optimizer.flat.grads)
        metrics = ranks.average_metrics(metrics)
        value, target = ranks.gather(value, batch.targets.value[:, 0])
    with stage("5.5 optimizer"):
        # An infinite variance, which BatchNorm divides by, leaves both loss and gradient finite: so the statistics are looked at too.
        # `abs() < inf` is `isfinite` in half the launches.
        greatest = statistics.values.abs().amax()
        norm, skipped = optimizer.step(ok=(metrics["loss"].abs() < torch.inf) & (greatest < torch.inf))
        statistics.restore(skipped)
        updates += 1
        learner.skipped += skipped
        learner.skipped_in_a_row.add_(1).mul_(skipped)
    with stage("5.6 priorities"):
        fresh = (value - target).abs() + PRIORITY_FLOOR
        priority = torch.where(fresh < torch.inf, fresh, ring.priority.view(-1)[index])
        # A position drawn twice keeps the greater priority: the order of the writes must not matter.
        ring.priority.view(-1).index_fill_(0, index, 0.0).scatter_reduce_(0, index, priority, "amax")
        ring.measured.view(-1).index_fill_(0, index, True)
    reported = {f"losses/{name}": part for name, part in metrics.items()} | {
        "train/grad_norm": norm,
        "train/learning_rate": optimizer.lr,
        "train/priority": priority.mean(),
        "train/value_target": target.mean(),
        "train/value_abs_max": value.abs().max(),
    }
    row = torch.stack([reported[name].float() for name in LEARN_METRICS])
    return dict(zip(LEARN_METRICS, torch.where(skipped, torch.nan, row).unbind(), strict=True))
