"""The root of a search: its prior, and which of its actions Gumbel search may visit.

The first piece of step 2 (search) of an iteration. Shapes: `B` roots, `A` actions, `S` simulations.
"""

import math

import torch
from torch import Tensor


def root_prior(logits: Tensor, noise: Tensor | None = None, noise_fraction: float = 0.25) -> Tensor:
    """Prior of the root's actions: the policy mixed with exploration noise.

    AlphaZero, "Mastering Chess and Shogi by Self-Play" (2017), Methods: (1 - fraction) P + fraction Dirichlet.

    Args:
      logits: `[B, A]`, any floating dtype.
      noise: `[B, A]`, a draw from the Dirichlet distribution; None mixes nothing in.
      noise_fraction: share of the noise.

    Returns:
      `[B, A]` float64, each row a distribution. Bytes: both inputs read once, the output written once.

    Raises:
      ValueError: logits is not `[B, A]`, or noise has another shape.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits: expected [B, A], got shape {list(logits.shape)}")
    prior = torch.softmax(logits, dim=1, dtype=torch.float64)
    if noise is None:
        return prior
    if noise.shape != logits.shape:
        raise ValueError(f"noise: expected shape {list(logits.shape)}, got {list(noise.shape)}")
    return (1.0 - noise_fraction) * prior + noise_fraction * noise.to(torch.float64)


def considered_visits(considered: int, simulations: int) -> list[int]:
    """Visit count an action of the root must have to be chosen at each simulation: sequential halving.

    "Policy improvement by planning with Gumbel" (ICLR 2022), Algorithm 2. The actions with that count are the
    ones still in the running; the least promising half drops out when every one has had its share of the phase.
    The table holds for every root alike, hence it lives on the host: simulation i needs `table[i]`.

    Args:
      considered: actions in the first phase, at least 1.
      simulations: length of the table.

    Returns:
      `S` integers.
    """
    if considered == 1:
        return list(range(simulations))
    phases = math.ceil(math.log2(considered))
    table: list[int] = []
    visits = 0
    remaining = considered
    while len(table) < simulations:
        for _ in range(max(1, int(simulations / (phases * remaining)))):
            table += [visits] * remaining
            visits += 1
        remaining = max(2, remaining // 2)
    return table[:simulations]


def gumbel_root_score(
    logits: Tensor, gumbel: Tensor | None, completed_q: Tensor, visits: Tensor, considered_visit: int
) -> Tensor:
    """Score whose argmax is the root action of Gumbel search: gumbel + logits + sigma(Q) of those in the running.

    "Policy improvement by planning with Gumbel" (ICLR 2022), Algorithm 2.

    Args:
      logits: `[B, A]`.
      gumbel: `[B, A]`, the one draw of this search; None plans without noise.
      completed_q: `[B, A]`, rescaled Q (`tree.completed_q`).
      visits: `[B, A]`, visits of the root's children.
      considered_visit: the count of those in the running (`considered_visits`).

    Returns:
      `[B, A]`, -inf where the visit count differs.
    """
    score = logits - logits.amax(dim=1, keepdim=True) + completed_q
    if gumbel is not None:
        score = score + gumbel
    # The floor keeps an action in the running above those that are out, however unlikely the policy finds it.
    return score.clamp_min(-1e9).masked_fill(visits != considered_visit, -torch.inf)
