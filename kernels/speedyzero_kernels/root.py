"""The root of a search: its prior, and which of its actions Gumbel search may visit.

The first piece of step 2 (search) of an iteration. Shapes: `B` roots, `A` actions, `S` simulations.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import checks, dispatch

MAX_ACTIONS = 1024


def root_prior_reference(
    logits: Tensor, noise: Tensor | None = None, noise_fraction: float = 0.25, legal: Tensor | None = None
) -> Tensor:
    """`root_prior` in plain PyTorch."""
    logits = logits.to(torch.float64)
    if legal is not None:
        logits = logits.masked_fill(~legal, -torch.inf)
    prior = torch.softmax(logits, dim=1)
    if noise is None:
        return prior
    noise = noise.to(torch.float64)
    if legal is not None:
        noise = noise.masked_fill(~legal, 0.0)
        noise = noise / noise.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return (1.0 - noise_fraction) * prior + noise_fraction * noise


@triton.jit
def _root_prior_kernel(
    logits, noise, legal, prior, HAS_NOISE: tl.constexpr, HAS_LEGAL: tl.constexpr, FRACTION: tl.constexpr, A: tl.constexpr,
    BLOCK_A: tl.constexpr,
):  # fmt: skip
    action = tl.arange(0, BLOCK_A)
    some = action < A
    at = tl.program_id(0).to(tl.int64) * A + action
    x = tl.load(logits + at, mask=some, other=float("-inf"))
    if logits.dtype.element_ty == tl.bfloat16:
        x = x.to(tl.float32)
    x = x.to(tl.float64)
    allowed = some
    if HAS_LEGAL:
        allowed = tl.load(legal + at, mask=some, other=0) != 0
        x = tl.where(allowed, x, float("-inf"))
    e = tl.where(some, tl.exp(x - tl.max(x, 0)), 0.0)
    p = e / tl.sum(e, 0)
    if HAS_NOISE:
        y = tl.load(noise + at, mask=some, other=0.0)
        if noise.dtype.element_ty == tl.bfloat16:
            y = y.to(tl.float32)
        y = tl.where(allowed, y.to(tl.float64), 0.0)
        if HAS_LEGAL:
            y = y / tl.maximum(tl.sum(y, 0), 2.2250738585072014e-308)
        p = (1.0 - FRACTION) * p + FRACTION * y
    tl.store(prior + at, p, mask=some)


def root_prior_kernel(
    logits: Tensor, noise: Tensor | None = None, noise_fraction: float = 0.25, legal: Tensor | None = None
) -> Tensor:
    """`root_prior` as one launch, a program per root."""
    roots, actions = logits.shape
    prior = torch.empty(roots, actions, dtype=torch.float64, device=logits.device)
    block = triton.next_power_of_2(actions)
    _root_prior_kernel[(roots,)](
        logits, logits if noise is None else noise, logits if legal is None else legal, prior, HAS_NOISE=noise is not None,
        HAS_LEGAL=legal is not None, FRACTION=noise_fraction, A=actions, BLOCK_A=block, num_warps=max(1, block // 128),
        enable_fp_fusion=False,
    )  # fmt: skip
    return prior


def root_prior(logits: Tensor, noise: Tensor | None = None, noise_fraction: float = 0.25, legal: Tensor | None = None) -> Tensor:
    """Prior of the root's actions: the policy mixed with exploration noise, over the legal actions.

    AlphaZero, "Mastering Chess and Shogi by Self-Play" (2017), Methods: (1 - fraction) P + fraction Dirichlet. A Dirichlet draw
    over all actions, cut down to the legal ones and made to add up to 1 again, is a Dirichlet draw over those.

    Args:
      logits: `[B, A]`, any floating dtype; this and the rest with any strides.
      noise: `[B, A]`, any floating dtype, a draw from the Dirichlet distribution; None mixes nothing in.
      noise_fraction: share of the noise.
      legal: `[B, A]` bool, the actions that may be taken; None allows all. A row that allows none becomes NaN.

    Returns:
      `[B, A]` float64, each row a distribution; 0 for illegal actions. Bytes: all inputs read once, the output written once.

    Raises:
      ValueError: a wrong shape, dtype or device, or more than 1024 actions.
    """
    checks.tensor("logits", logits, ("B", "A"), checks.FLOATING, any_strides=True)
    checks.at_least("logits", logits.shape[1], 1)
    checks.at_most("logits", logits.shape[1], MAX_ACTIONS)
    if noise is not None:
        checks.tensor("noise", noise, tuple(logits.shape), checks.FLOATING, logits.device, any_strides=True)
        noise = noise.contiguous()
    if legal is not None:
        checks.tensor("legal", legal, tuple(logits.shape), torch.bool, logits.device, any_strides=True)
        legal = legal.contiguous()
    run = root_prior_kernel if dispatch.runs_kernel(logits) else root_prior_reference
    return run(logits.contiguous(), noise, noise_fraction, legal)


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


def considered_visit_of(legal: Tensor, considered: int, simulations: int, simulation: int) -> Tensor:
    """Entry `simulation` of each root's own table, where the roots allow different numbers of actions.

    A root that allows fewer actions than `considered` starts with those it allows. The tables are on the host, so that a
    capture holds no copy from there: one comparison for each number of actions there may be.

    Args:
      legal: `[B, A]` bool.
      considered, simulations: as in `considered_visits`.
      simulation: from 0.

    Returns:
      `[B]` int64.
    """
    allowed = legal.sum(dim=1).clamp_(1, considered)
    visit = torch.zeros_like(allowed)
    for number in range(1, min(considered, legal.shape[1]) + 1):
        visit = torch.where(allowed == number, considered_visits(number, simulations)[simulation], visit)
    return visit


def gumbel_root_score(
    logits: Tensor, gumbel: Tensor | None, completed_q: Tensor, visits: Tensor, considered_visit: int | Tensor
) -> Tensor:
    """Score whose argmax is the root action of Gumbel search: gumbel + logits + sigma(Q) of those in the running.

    "Policy improvement by planning with Gumbel" (ICLR 2022), Algorithm 2. Plain PyTorch: the kernel of `select_gumbel` has it
    within its walk.

    Args:
      logits: `[B, A]`.
      gumbel: `[B, A]`, the one draw of this search; None plans without noise.
      completed_q: `[B, A]`, rescaled Q (`select.completed_q`).
      visits: `[B, A]`, visits of the root's children.
      considered_visit: the count of those in the running (`considered_visits`), or `[B]` of them.

    Returns:
      `[B, A]`, -inf where the visit count differs.
    """
    if isinstance(considered_visit, Tensor):
        considered_visit = considered_visit.unsqueeze(1)
    score = logits - logits.amax(dim=1, keepdim=True) + completed_q
    if gumbel is not None:
        score = score + gumbel
    # The floor keeps an action in the running above those that are out, however unlikely the policy finds it.
    return score.clamp_min(-1e9).masked_fill(visits != considered_visit, -torch.inf)
