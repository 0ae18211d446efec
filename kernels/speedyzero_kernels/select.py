"""Selection: the walk of every tree from its root to the edge to expand, by pUCT or by Gumbel search (step 2, search).

The reference scores all nodes at once and follows the best children by pointer doubling; the kernel walks, one program per
root, the actions side by side; on a CPU `native` walks, one root after another.
Shapes as in `tree`: `B` roots, `A` actions, `S` simulations, `M = S + 1` nodes.

A root whose network outputs are not finite is searched in some way that stays within its tree, and no other root notices.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import checks, native
from .root import gumbel_root_score
from .tree import Selection, Tree


def mean_q(tree: Tree, nodes: int) -> Tensor:
    """Q that an unvisited child of each of the first `nodes` nodes takes: `[B, nodes]` float64. Plain PyTorch, on any tree.

    EfficientZero (NeurIPS 2021), appendix A: at the root the mean Q of the visited children (0 if none); below,
    (mean Q of the parent + sum over visited children) / (visited children + 1).

    The recursion mean = a x mean(parent) + b is affine, so composing each node's map with that of its 1st, 2nd, 4th,
    ... ancestor resolves it for all nodes in log2(nodes) rounds, whatever the depth.
    """
    if tree.links:
        divisor = tree.links.mean_divisor.narrow(1, 0, nodes).clamp_min(1.0)
    else:
        divisor = (tree.child[:, :nodes] >= 0).sum(dim=2).double()
        divisor[:, 1:] += 1.0
        divisor.clamp_min_(1.0)
    mean = tree.child_q.narrow(1, 0, nodes).sum(dim=2) / divisor
    share = divisor.reciprocal()
    share.narrow(1, 0, 1).zero_()
    ancestor = tree.parent.narrow(1, 0, nodes).long()
    for rounds_left in reversed(range((nodes - 1).bit_length())):
        mean = torch.addcmul(mean, share, mean.gather(1, ancestor))
        if rounds_left:
            share = share * share.gather(1, ancestor)
            ancestor = ancestor.gather(1, ancestor)
    return mean


def completed_q(tree: Tree, nodes: int, c_visit: float, c_scale: float, value_delta_min: float = 1e-8) -> Tensor:
    """Q of every action of the first `nodes` nodes, rescaled to be added to logits: `[B, nodes, A]` float64.

    "Policy improvement by planning with Gumbel" (ICLR 2022), completed Q with the mixed value of appendix D: an
    unvisited action takes the average of the node's network value (once) and the prior-weighted Q of the visited
    actions (as often as they were visited). The node's own range of Q then becomes [0, 1], times
    (c_visit + most visits of an action) x c_scale. A range under value_delta_min counts as value_delta_min; the default is
    mctx's, which makes [0, 1] of any difference at all. Plain PyTorch but on a CPU: a search needs it once, of its roots.
    """
    if tree.form == "native":
        return native.completed_q(tree, nodes, c_visit, c_scale, value_delta_min)
    visits = tree.child_visits.narrow(1, 0, nodes).double()
    q = tree.child_q.narrow(1, 0, nodes)
    node_visits = tree.visits.narrow(1, 0, nodes).double()
    visited = visits > 0
    # The floor keeps the mean finite where the policy of every visited action underflows.
    prior = tree.prior.narrow(1, 0, nodes).clamp_min(torch.finfo(torch.float64).tiny)
    mass = (prior * visited).sum(dim=2)
    # Unvisited actions have Q 0, and where all are unvisited the mean has no weight.
    mean = (prior * q).sum(dim=2).div_(torch.where(mass > 0, mass, 1.0))
    mixed = (node_visits - 1.0).mul_(mean).add_(tree.value.narrow(1, 0, nodes)).div_(node_visits)
    completed = torch.where(visited, q, mixed.unsqueeze(2))
    low, high = completed.amin(dim=2), completed.amax(dim=2)
    scale = visits.amax(dim=2).add_(c_visit).mul_(c_scale).div_((high - low).clamp_min_(value_delta_min))
    return completed.sub_(low.unsqueeze(2)).mul_(scale.unsqueeze(2))


def select_puct_reference(
    tree: Tree, simulation: int, *, c_base: float = 19652.0, c_init: float = 1.25, value_delta_min: float = 0.01
) -> Selection:
    """`select_puct` in plain PyTorch, for trees in the layout of the reference."""
    nodes = simulation + 1
    visits = tree.visits.narrow(1, 0, nodes)
    child_visits = tree.child_visits.narrow(1, 0, nodes)
    child = tree.child.narrow(1, 0, nodes)
    explore = (visits + (c_base + 1.0)).div_(c_base).log_().add_(c_init).mul_(visits.sqrt()).unsqueeze(2)
    prior = tree.prior.narrow(1, 0, nodes) / (child_visits + 1.0)
    if not simulation:
        return _descend(tree, prior * explore, child)
    span = (tree.q_high - tree.q_low).clamp_min_(value_delta_min)
    # Only the mean can leave [0, 1], by rounding: visited children are what the range is taken over.
    unvisited_q = mean_q(tree, nodes).sub_(tree.q_low).div_(span).clamp_(0.0, 1.0)
    visited_q = (tree.child_q.narrow(1, 0, nodes) - tree.q_low.unsqueeze(2)).div_(span.unsqueeze(2))
    score = torch.where(child < 0, unvisited_q.unsqueeze(2), visited_q).addcmul_(prior, explore)
    return _descend(tree, score, child)


def select_gumbel_reference(
    tree: Tree, simulation: int, considered_visit: int | Tensor, gumbel: Tensor | None = None, *, c_visit: float = 50.0,
    c_scale: float = 0.1, value_delta_min: float = 1e-8,
) -> Selection:  # fmt: skip
    """`select_gumbel` in plain PyTorch, for trees in the layout of the reference."""
    nodes = simulation + 1
    visits = tree.child_visits.narrow(1, 0, nodes)
    logits = tree.logits.narrow(1, 0, nodes)
    q = completed_q(tree, nodes, c_visit, c_scale, value_delta_min)
    # Written out, as torch.softmax over so short a dimension takes three times as long.
    improved = logits + q
    improved = improved.sub_(improved.amax(dim=2, keepdim=True)).exp_()
    improved.div_(improved.sum(dim=2, keepdim=True))
    score = improved.sub_(visits / tree.visits.narrow(1, 0, nodes).unsqueeze(2))
    # Out of the running is not illegal: where the table leaves no legal action, the lowest of them is taken.
    score[:, 0] = gumbel_root_score(logits[:, 0], gumbel, q[:, 0], visits[:, 0], considered_visit).clamp_min_(-2e9)
    return _descend(tree, score, tree.child.narrow(1, 0, nodes))


def _descend(tree: Tree, score: Tensor, child: Tensor) -> Selection:
    """Follow the best action of each node (`[B, i + 1, A]` scores) from the root to an edge without a node."""
    nodes = score.shape[1]
    score[:, 0].masked_fill_(tree.illegal, -torch.inf)
    # torch.max promises the first of equal maxima: the lowest action. argmax does too, but is slow on this layout.
    action = score.max(dim=2).indices
    step = child.gather(2, action.unsqueeze(2)).squeeze(2)
    # A child's index exceeds its parent's, and unvisited is -1: the greater is where the walk goes, or stays.
    node = torch.maximum(step, tree.links.nodes.narrow(1, 0, nodes))
    # Doubling: after r rounds `node` is 2^r steps down, and no walk is longer than nodes - 1.
    for _ in range(max(nodes - 2, 0).bit_length()):
        node = node.gather(1, node)
    leaf = node.narrow(1, 0, 1)
    depth = tree.depth.gather(1, leaf).squeeze(1) + 1
    return Selection(
        parent=leaf.squeeze(1),
        action=action.gather(1, leaf).squeeze(1),
        depth=depth,
        reset=depth % tree.lstm_horizon == 0,
    )


@triton.jit
def _best(score, some):
    """Lowest action of the greatest score. NaN counts as the greatest: what `max` makes of it differs between devices."""
    score = tl.where(score != score, float("inf"), score)
    return tl.argmax(tl.where(some, score, float("-inf")), 0, tie_break_left=True)


@triton.jit
def _write_selection(parent, action, depth, reset, root, node, best, new_depth, HORIZON: tl.constexpr):
    tl.store(parent + root, node.to(tl.int64))
    tl.store(action + root, best.to(tl.int64))
    tl.store(depth + root, new_depth.to(tl.int64))
    tl.store(reset + root, new_depth % HORIZON == 0)


@triton.jit
def _puct_kernel(
    child, child_visits, child_q, prior, visits, illegal, q_low, q_high, out_parent, out_action, out_depth, out_reset,
    C_BASE: tl.constexpr, C_INIT: tl.constexpr, DELTA_MIN: tl.constexpr, HORIZON: tl.constexpr,
    A: tl.constexpr, M: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    root = tl.program_id(0).to(tl.int64)
    action = tl.arange(0, BLOCK_A)
    some = action < A
    low = tl.load(q_low + root)
    span = tl.load(q_high + root) - low
    span = tl.where(span > DELTA_MIN, span, tl.full([], DELTA_MIN, tl.float64))
    barred = tl.load(illegal + root * A + action, mask=some, other=1) != 0

    node = tl.zeros([], tl.int32)
    depth = tl.zeros([], tl.int32)
    best = tl.zeros([], tl.int32)
    following = tl.zeros([], tl.int32)
    mean = tl.zeros([], tl.float64)
    while following >= 0:
        node = following
        row = (root * M + node) * A
        to = tl.load(child + row + action, mask=some, other=-1)
        n = tl.load(child_visits + row + action, mask=some, other=0)
        q = tl.load(child_q + row + action, mask=some, other=0.0)
        p = tl.load(prior + row + action, mask=some, other=0.0)
        total = tl.load(visits + root * M + node).to(tl.float64)
        visited = to >= 0
        q_sum = tl.sum(tl.where(visited, q, 0.0), 0)
        count = tl.sum(visited.to(tl.int32), 0).to(tl.float64)
        at_root = depth == 0
        mean = tl.where(at_root, 0.0, mean) + q_sum
        mean = mean / tl.where(at_root, tl.maximum(count, 1.0), count + 1.0)
        unvisited_q = (mean - low) / span
        unvisited_q = tl.where(unvisited_q < 0.0, 0.0, tl.where(unvisited_q > 1.0, 1.0, unvisited_q))
        explore = (tl.log((total + (C_BASE + 1.0)) / C_BASE) + C_INIT) * tl.sqrt(total)
        score = tl.where(visited, (q - low) / span, unvisited_q) + p / (n.to(tl.float64) + 1.0) * explore
        score = tl.where(barred & at_root, float("-inf"), score)
        best = _best(score, some)
        following = tl.load(child + row + best)
        depth += 1
    _write_selection(out_parent, out_action, out_depth, out_reset, root, node, best, depth, HORIZON)


@triton.jit
def _complete(n, q, p, value, total, some, C_VISIT: tl.constexpr, C_SCALE: tl.constexpr, DELTA_MIN: tl.constexpr):
    """`completed_q` of one node."""
    visited = n > 0
    p = tl.maximum(p, 2.2250738585072014e-308)
    mass = tl.sum(tl.where(visited, p, 0.0), 0)
    mean = tl.sum(tl.where(visited, p * q, 0.0), 0) / tl.where(mass > 0, mass, 1.0)
    mixed = ((total - 1.0) * mean + value) / total
    completed = tl.where(visited, q, mixed)
    low = tl.min(tl.where(some, completed, float("inf")), 0)
    high = tl.max(tl.where(some, completed, float("-inf")), 0)
    most = tl.max(n, 0).to(tl.float64)
    span = tl.maximum(high - low, tl.full([], DELTA_MIN, tl.float64))  # a bare number would be a float32
    return (completed - low) * ((most + C_VISIT) * C_SCALE / span)


@triton.jit(do_not_specialize=["considered"])
def _gumbel_kernel(
    child, child_visits, child_q, prior, logits, visits, values, illegal, gumbel, considered, out_parent, out_action, out_depth, out_reset,
    HAS_GUMBEL: tl.constexpr, PER_ROOT: tl.constexpr, C_VISIT: tl.constexpr, C_SCALE: tl.constexpr, DELTA_MIN: tl.constexpr,
    HORIZON: tl.constexpr, A: tl.constexpr, M: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    root = tl.program_id(0).to(tl.int64)
    action = tl.arange(0, BLOCK_A)
    some = action < A

    node = tl.zeros([], tl.int32)
    row = root * M * A
    n = tl.load(child_visits + row + action, mask=some, other=0)
    q = tl.load(child_q + row + action, mask=some, other=0.0)
    p = tl.load(prior + row + action, mask=some, other=0.0)
    x = tl.load(logits + row + action, mask=some, other=float("-inf"))
    total = tl.load(visits + root * M).to(tl.float64)
    completed = _complete(n, q, p, tl.load(values + root * M), total, some, C_VISIT, C_SCALE, DELTA_MIN)
    score = x - tl.max(x, 0) + completed
    if HAS_GUMBEL:
        draw = tl.load(gumbel + root * A + action, mask=some, other=0.0)
        if gumbel.dtype.element_ty == tl.bfloat16:
            draw = draw.to(tl.float32)
        score += draw.to(tl.float64)
    score = tl.where(score < -1e9, -1e9, score)
    wanted = tl.load(considered + root) if PER_ROOT else considered
    barred = tl.load(illegal + root * A + action, mask=some, other=1) != 0
    score = tl.where(n == wanted, score, -2e9)  # out of the running is not illegal
    best = _best(tl.where(barred, float("-inf"), score), some)
    following = tl.load(child + row + best)
    depth = tl.full([], 1, tl.int32)
    while following >= 0:
        node = following
        row = (root * M + node) * A
        n = tl.load(child_visits + row + action, mask=some, other=0)
        q = tl.load(child_q + row + action, mask=some, other=0.0)
        p = tl.load(prior + row + action, mask=some, other=0.0)
        x = tl.load(logits + row + action, mask=some, other=float("-inf"))
        total = tl.load(visits + root * M + node).to(tl.float64)
        x += _complete(n, q, p, tl.load(values + root * M + node), total, some, C_VISIT, C_SCALE, DELTA_MIN)
        improved = tl.where(some, tl.exp(x - tl.max(x, 0)), 0.0)
        score = improved / tl.sum(improved, 0) - n.to(tl.float64) / total
        best = _best(score, some)
        following = tl.load(child + row + best)
        depth += 1
    _write_selection(out_parent, out_action, out_depth, out_reset, root, node, best, depth, HORIZON)


def _empty_selection(tree: Tree) -> Selection:
    parent, action, depth = torch.empty((3, tree.roots), dtype=torch.int64, device=tree.device)
    return Selection(parent, action, depth, torch.empty(tree.roots, dtype=torch.bool, device=tree.device))


# No fused multiply-add: scores must round as those of the reference, or ties would break elsewhere. The warps of one
# program have only A numbers to work on, so one warp it is, until a row outgrows four numbers a thread.
def select_puct_kernel(
    tree: Tree, simulation: int, *, c_base: float = 19652.0, c_init: float = 1.25, value_delta_min: float = 0.01
) -> Selection:
    """`select_puct` as one launch, for trees in the layout of the kernels."""
    leaf = _empty_selection(tree)
    block = triton.next_power_of_2(tree.actions)
    _puct_kernel[(tree.roots,)](
        tree.child, tree.child_visits, tree.child_q, tree.prior, tree.visits, tree.illegal, tree.q_low, tree.q_high, *leaf,
        C_BASE=c_base, C_INIT=c_init, DELTA_MIN=value_delta_min, HORIZON=tree.lstm_horizon,
        A=tree.actions, M=tree.simulations + 1, BLOCK_A=block, num_warps=max(1, block // 128), enable_fp_fusion=False,
    )  # fmt: skip
    return leaf


def select_gumbel_kernel(
    tree: Tree, simulation: int, considered_visit: int | Tensor, gumbel: Tensor | None = None, *, c_visit: float = 50.0,
    c_scale: float = 0.1, value_delta_min: float = 1e-8,
) -> Selection:  # fmt: skip
    """`select_gumbel` as one launch, for trees in the layout of the kernels."""
    leaf = _empty_selection(tree)
    block = triton.next_power_of_2(tree.actions)
    _gumbel_kernel[(tree.roots,)](
        tree.child, tree.child_visits, tree.child_q, tree.prior, tree.logits, tree.visits, tree.value, tree.illegal,
        tree.logits if gumbel is None else gumbel, considered_visit, *leaf,
        HAS_GUMBEL=gumbel is not None, PER_ROOT=isinstance(considered_visit, Tensor), C_VISIT=c_visit, C_SCALE=c_scale,
        DELTA_MIN=value_delta_min, HORIZON=tree.lstm_horizon, A=tree.actions, M=tree.simulations + 1, BLOCK_A=block,
        num_warps=max(1, block // 128), enable_fp_fusion=False,
    )  # fmt: skip
    return leaf


def select_puct(
    tree: Tree, simulation: int, *, c_base: float = 19652.0, c_init: float = 1.25, value_delta_min: float = 0.01
) -> Selection:
    """Walk every tree from its root to the edge to expand, by the pUCT score.

    MuZero (Nature 2020), appendix B, equation 2: Q + P (log((N + c_base + 1) / c_base) + c_init) sqrt(N) / (1 + n),
    with N the visits of the node, its own evaluation included. Q is normalised by the least and greatest Q of the tree
    (EfficientZero, appendix A), a range under value_delta_min counting as value_delta_min, and clipped to [0, 1];
    unvisited children take `mean_q`. While the tree has no edge Q is 0. Ties go to the lowest action.

    Args:
      tree: with nodes 0 to `simulation`.
      simulation: which simulation this is, from 0.

    Returns:
      A Selection of `[B]` tensors.

    Bytes moved: a root reads 24 A + 4 at every node on its way, and writes 25.

    Raises:
      ValueError: simulation is not one of the tree's.
    """
    _check_simulation(tree, simulation)
    options = {"c_base": c_base, "c_init": c_init, "value_delta_min": value_delta_min}
    if tree.form == "native":
        return Selection(*native.select_puct(tree, simulation, **options))
    select = select_puct_reference if tree.form == "reference" else select_puct_kernel
    return select(tree, simulation, **options)


def select_gumbel(
    tree: Tree, simulation: int, considered_visit: int | Tensor, gumbel: Tensor | None = None, *, c_visit: float = 50.0,
    c_scale: float = 0.1, value_delta_min: float = 1e-8,
) -> Selection:  # fmt: skip
    """Walk every tree from its root to the edge to expand, by Gumbel search.

    "Policy improvement by planning with Gumbel" (ICLR 2022): sequential halving at the root (Algorithm 2); below, the
    action whose share of the visits lags most behind the improved policy softmax(logits + completed Q). Q are rescaled by
    their range at the node (`completed_q`), a range under value_delta_min counting as value_delta_min.
    Ties go to the lowest action.

    Args:
      tree: with nodes 0 to `simulation`.
      simulation: which simulation this is, from 0.
      considered_visit: entry `simulation` of `root.considered_visits`, or `[B]` int64, one a root, where the roots allow
        different numbers of actions (`root.considered_visit_of`).
      gumbel: `[B, A]`, any floating dtype and strides, the Gumbel draw of this search; None plans without noise.

    Returns:
      A Selection of `[B]` tensors.

    Bytes moved: a root reads 28 A + 12 at every node on its way, and writes 25.

    Raises:
      ValueError: simulation is not one of the tree's, or a wrong shape, dtype, device or layout in memory.
    """
    _check_simulation(tree, simulation)
    if isinstance(considered_visit, Tensor):
        checks.tensor("considered_visit", considered_visit, (tree.roots,), torch.int64, tree.device)
    if gumbel is not None:
        checks.tensor("gumbel", gumbel, (tree.roots, tree.actions), checks.FLOATING, tree.device, any_strides=True)
    options = {"c_visit": c_visit, "c_scale": c_scale, "value_delta_min": value_delta_min}
    if tree.form == "native":
        return Selection(*native.select_gumbel(tree, simulation, considered_visit, gumbel, **options))
    select = select_gumbel_reference if tree.form == "reference" else select_gumbel_kernel
    return select(tree, simulation, considered_visit, None if gumbel is None else gumbel.contiguous(), **options)


def _check_simulation(tree: Tree, simulation: int) -> None:
    checks.at_least("simulation", simulation, 0)
    checks.at_most("simulation", simulation, tree.simulations - 1)
