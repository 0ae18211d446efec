"""Batched Monte Carlo tree search on tensors: one fixed-shape tree per root, all roots in lockstep.

Simulation i selects a leaf edge in every tree, the caller evaluates the model once for the whole batch, and
`expand_and_backup` writes the result as node i + 1 (node 0 is the root). Nothing depends on the data but the
numbers: no host synchronisation, no shape, no loop length, so a whole search can be captured in a CUDA graph.

    tree = allocate(roots=B, actions=A, simulations=S, discount=0.99, lstm_horizon=1)
    plant(tree, root_prior(logits), logits, value)
    for simulation in range(S):
        leaf = select_puct(tree, simulation)
        ... = model(states[leaf.parent], leaf.action)
        expand_and_backup(tree, simulation, leaf, value_prefix, logits, value)

In the shape descriptions, `B` denotes the roots, `A` the actions, `S` the simulations and `M = S + 1` the nodes.
Bytes moved by simulation i at the least: select reads `child_q`, `child_visits`, `child` and `prior` of the nodes there
are (32 B i A); expand_and_backup reads and writes their statistics and one row of `paths` (about 150 B i).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .root import gumbel_root_score


@dataclass(frozen=True)
class Tree:
    """The trees of `B` roots. Statistics are float64: which action wins must not hang on rounding.

    Attributes:
      discount: discount of one edge.
      lstm_horizon: nodes whose depth is a multiple of it restart the value prefix; 1 for plain rewards.
      visits: `[B, M]` float64, simulations through the node, its own evaluation included; 0 if not there yet.
      value_sum: `[B, M]` float64, sum of the returns seen from the node, its own value included.
      value: `[B, M]` float64, the network's value of the node.
      reward: `[B, M]` float64, reward of the edge into the node (0 for the root).
      prefix_base: `[B, M]` float64, what a child's value prefix counts from: the node's own prefix, 0 at a reset.
      depth: `[B, M]` int64, edges from the root.
      parent: `[B, M]` int64, 0 for the root.
      action_from_parent: `[B, M]` int64, 0 for the root.
      mean_divisor: `[B, M]` float64, visited children, plus one below the root.
      edge_from_parent: `[B, M]` int64, index into the edge views: action_from_parent x M + parent.
      child: `[B, M, A]` int64, node index, -1 unvisited.
      child_visits: `[B, M, A]` float64, `visits` of the child, 0 if unvisited.
      child_q: `[B, M, A]` float64, edge reward + discount x mean value of the child, 0 if unvisited.
      prior: `[B, M, A]` float64.
      logits: `[B, M, A]` float64.
      q_low, q_high: `[B, 1]` float64, least and greatest Q over all edges; both 0 while there is none.
      paths: `[B, M, 3, M]` float64. Row i, column j, for j on the path from the root to i (else 0, 0, 0): one,
        discount^(depth i - depth j), and the discounted rewards from j down to i. A leaf's row is all that its
        backup needs, and follows from its parent's row: no walk up.
      edge_child, edge_visits, edge_q: `[B, A x M]`, views of child, child_visits and child_q.
      roots: `[B]` int64, 0 to B - 1.
      nodes: `[M]` int64 in `[1, M]`, 0 to M - 1.
    """

    discount: float
    lstm_horizon: int
    visits: Tensor
    value_sum: Tensor
    value: Tensor
    reward: Tensor
    prefix_base: Tensor
    depth: Tensor
    parent: Tensor
    action_from_parent: Tensor
    edge_from_parent: Tensor
    mean_divisor: Tensor
    child: Tensor
    child_visits: Tensor
    child_q: Tensor
    prior: Tensor
    logits: Tensor
    q_low: Tensor
    q_high: Tensor
    paths: Tensor
    edge_child: Tensor
    edge_visits: Tensor
    edge_q: Tensor
    roots: Tensor
    nodes: Tensor

    @property
    def simulations(self) -> int:
        return self.visits.shape[1] - 1


class Selection(NamedTuple):
    """The edge each root wants expanded.

    Attributes:
      parent: `[B]` int64, node the edge leaves from.
      action: `[B]` int64.
      depth: `[B]` int64, depth of the node to come.
      reset: `[B]` bool, the node to come restarts the value prefix: store its recurrent state as zeros.
    """

    parent: Tensor
    action: Tensor
    depth: Tensor
    reset: Tensor


def allocate(
    *,
    roots: int,
    actions: int,
    simulations: int,
    discount: float,
    lstm_horizon: int,
    device: torch.device | str = "cpu",
) -> Tree:
    """Memory of the trees, to be given a root by `plant` (again for every search).

    Raises:
      ValueError: a size or lstm_horizon below 1, or discount outside [0, 1].
    """
    sizes = {"roots": roots, "actions": actions, "simulations": simulations, "lstm_horizon": lstm_horizon}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    if not 0.0 <= discount <= 1.0:
        raise ValueError(f"discount: expected a number in [0, 1], got {discount}")
    nodes = simulations + 1

    def field(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        # Memory has the root as the fastest dimension: the operations here then run over B x i contiguous numbers,
        # and sums over the few actions vectorise (three times the speed on CPU).
        order = tuple(reversed(range(len(shape))))
        return torch.empty(tuple(reversed(shape)), dtype=dtype, device=device).permute(order)

    def integers(*shape: int) -> Tensor:
        return field(*shape, dtype=torch.int64)

    def by_action(edges: Tensor) -> Tensor:
        return edges.unflatten(1, (actions, nodes)).transpose(1, 2)

    edge_child = integers(roots, actions * nodes)
    edge_visits = field(roots, actions * nodes)
    edge_q = field(roots, actions * nodes)
    return Tree(
        discount=discount,
        lstm_horizon=lstm_horizon,
        visits=field(roots, nodes),
        value_sum=field(roots, nodes),
        value=field(roots, nodes),
        reward=field(roots, nodes),
        prefix_base=field(roots, nodes),
        depth=integers(roots, nodes),
        parent=integers(roots, nodes),
        action_from_parent=integers(roots, nodes),
        mean_divisor=field(roots, nodes),
        edge_from_parent=integers(roots, nodes),
        child=by_action(edge_child),
        child_visits=by_action(edge_visits),
        child_q=by_action(edge_q),
        prior=field(roots, nodes, actions),
        logits=field(roots, nodes, actions),
        q_low=field(roots, 1),
        q_high=field(roots, 1),
        paths=field(roots, nodes, 3, nodes),
        edge_child=edge_child,
        edge_visits=edge_visits,
        edge_q=edge_q,
        roots=torch.arange(roots, device=device),
        nodes=torch.arange(nodes, device=device).unsqueeze(0),
    )


def plant(tree: Tree, prior: Tensor, logits: Tensor, value: Tensor) -> None:
    """Clear the trees and write their roots, each visited once with its network value.

    Args:
      tree: written.
      prior: `[B, A]`, of the root (`root.root_prior`).
      logits: `[B, A]`, any floating dtype.
      value: `[B]`, any floating dtype.

    Raises:
      ValueError: a shape does not fit the tree.
    """
    _check_shapes(tree, prior=(prior, 2), logits=(logits, 2), value=(value, 1))
    statistics = (tree.visits, tree.value_sum, tree.value, tree.reward, tree.prefix_base, tree.mean_divisor)
    links = (tree.depth, tree.parent, tree.action_from_parent, tree.edge_from_parent)
    edges = (tree.edge_visits, tree.edge_q, tree.prior, tree.logits, tree.q_low, tree.q_high)
    for field in (*statistics, *links, *edges, tree.paths):
        field.zero_()
    tree.child.fill_(-1)
    tree.mean_divisor[:, 1:].fill_(1.0)
    for part in (0, 1):
        tree.paths[:, :, part].diagonal(dim1=1, dim2=2).fill_(1.0)
    tree.visits[:, 0] = 1.0
    tree.value_sum[:, 0] = value
    tree.value[:, 0] = value
    tree.prior[:, 0] = prior
    tree.logits[:, 0] = logits


def mean_q(tree: Tree, nodes: int) -> Tensor:
    """Q that an unvisited child of each of the first `nodes` nodes takes: `[B, nodes]` float64.

    EfficientZero (NeurIPS 2021), appendix A: at the root the mean Q of the visited children (0 if none); below,
    (mean Q of the parent + sum over visited children) / (visited children + 1).

    The recursion mean = a x mean(parent) + b is affine, so composing each node's map with that of its 1st, 2nd, 4th,
    ... ancestor resolves it for all nodes in log2(nodes) rounds, whatever the depth.
    """
    divisor = tree.mean_divisor.narrow(1, 0, nodes).clamp_min(1.0)
    mean = tree.child_q.narrow(1, 0, nodes).sum(dim=2) / divisor
    share = divisor.reciprocal()
    share.narrow(1, 0, 1).zero_()
    ancestor = tree.parent.narrow(1, 0, nodes)
    for rounds_left in reversed(range((nodes - 1).bit_length())):
        mean = torch.addcmul(mean, share, mean.gather(1, ancestor))
        if rounds_left:
            share = share * share.gather(1, ancestor)
            ancestor = ancestor.gather(1, ancestor)
    return mean


def completed_q(tree: Tree, nodes: int, c_visit: float, c_scale: float) -> Tensor:
    """Q of every action of the first `nodes` nodes, rescaled to be added to logits: `[B, nodes, A]` float64.

    "Policy improvement by planning with Gumbel" (ICLR 2022), completed Q with the mixed value of appendix D: an
    unvisited action takes the average of the node's network value (once) and the prior-weighted Q of the visited
    actions (as often as they were visited). The node's own range of Q then becomes [0, 1], times
    (c_visit + most visits of an action) x c_scale.
    """
    visits = tree.child_visits.narrow(1, 0, nodes)
    q = tree.child_q.narrow(1, 0, nodes)
    node_visits = tree.visits.narrow(1, 0, nodes)
    visited = visits > 0
    # The floor keeps the mean finite where the policy of every visited action underflows.
    prior = tree.prior.narrow(1, 0, nodes).clamp_min(torch.finfo(torch.float64).tiny)
    mass = (prior * visited).sum(dim=2)
    # Unvisited actions have Q 0, and where all are unvisited the mean has no weight.
    mean = (prior * q).sum(dim=2).div_(torch.where(mass > 0, mass, 1.0))
    mixed = (node_visits - 1.0).mul_(mean).add_(tree.value.narrow(1, 0, nodes)).div_(node_visits)
    completed = torch.where(visited, q, mixed.unsqueeze(2))
    low, high = completed.amin(dim=2), completed.amax(dim=2)
    scale = visits.amax(dim=2).add_(c_visit).mul_(c_scale).div_((high - low).clamp_min_(1e-8))
    return completed.sub_(low.unsqueeze(2)).mul_(scale.unsqueeze(2))


def select_puct(
    tree: Tree,
    simulation: int,
    *,
    c_base: float = 19652.0,
    c_init: float = 1.25,
    value_delta_min: float = 0.01,
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
    """
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


def select_gumbel(
    tree: Tree,
    simulation: int,
    considered_visit: int,
    gumbel: Tensor | None = None,
    *,
    c_visit: float = 50.0,
    c_scale: float = 0.1,
) -> Selection:
    """Walk every tree from its root to the edge to expand, by Gumbel search.

    "Policy improvement by planning with Gumbel" (ICLR 2022): sequential halving at the root (Algorithm 2); below, the
    action whose share of the visits lags most behind the improved policy softmax(logits + completed Q).
    Ties go to the lowest action.

    Args:
      tree: with nodes 0 to `simulation`.
      simulation: which simulation this is, from 0.
      considered_visit: entry `simulation` of `root.considered_visits`.
      gumbel: `[B, A]`, the Gumbel draw of this search; None plans without noise.

    Returns:
      A Selection of `[B]` tensors.
    """
    nodes = simulation + 1
    visits = tree.child_visits.narrow(1, 0, nodes)
    logits = tree.logits.narrow(1, 0, nodes)
    q = completed_q(tree, nodes, c_visit, c_scale)
    # Written out, as torch.softmax over so short a dimension takes three times as long.
    improved = logits + q
    improved = improved.sub_(improved.amax(dim=2, keepdim=True)).exp_()
    improved.div_(improved.sum(dim=2, keepdim=True))
    score = improved.sub_(visits / tree.visits.narrow(1, 0, nodes).unsqueeze(2))
    score[:, 0] = gumbel_root_score(logits[:, 0], gumbel, q[:, 0], visits[:, 0], considered_visit)
    return _descend(tree, score, tree.child.narrow(1, 0, nodes))


def _descend(tree: Tree, score: Tensor, child: Tensor) -> Selection:
    """Follow the best action of each node (`[B, i + 1, A]` scores) from the root to an edge without a node."""
    nodes = score.shape[1]
    # torch.max promises the first of equal maxima: the lowest action. argmax does too, but is slow on this layout.
    action = score.max(dim=2).indices
    step = child.gather(2, action.unsqueeze(2)).squeeze(2)
    # A child's index exceeds its parent's, and unvisited is -1: the greater is where the walk goes, or stays.
    node = torch.maximum(step, tree.nodes.narrow(1, 0, nodes))
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


def expand_and_backup(
    tree: Tree, simulation: int, selection: Selection, value_prefix: Tensor, logits: Tensor, value: Tensor
) -> None:
    """Write the selected edges' children as node `simulation + 1` and add their returns to all their ancestors.

    EfficientZero (NeurIPS 2021), section 4.2 and appendix A: the edge reward is the child's value prefix less its
    parent's, or the prefix itself if the parent restarted it. The range of Q is taken anew over all edges.

    Args:
      tree: written.
      simulation: which simulation this is, from 0.
      selection: what select returned for it.
      value_prefix: `[B]`, of the new node; the edge reward if `lstm_horizon` is 1.
      logits: `[B, A]`, of the new node.
      value: `[B]`, the network's value of the new node. All three in any floating dtype.

    Raises:
      ValueError: a shape does not fit the tree.
    """
    _check_shapes(tree, value_prefix=(value_prefix, 1), logits=(logits, 2), value=(value, 1))
    new = simulation + 1
    parent = selection.parent.unsqueeze(1)
    value = tree.value.narrow(1, new, 1).copy_(value.unsqueeze(1))
    base = tree.prefix_base.narrow(1, new, 1).copy_(value_prefix.unsqueeze(1))
    reward = torch.sub(base, tree.prefix_base.gather(1, parent), out=tree.reward.narrow(1, new, 1))
    base.masked_fill_(selection.reset.unsqueeze(1), 0.0)
    tree.depth.select(1, new).copy_(selection.depth)
    tree.parent.select(1, new).copy_(selection.parent)
    tree.action_from_parent.select(1, new).copy_(selection.action)
    tree.prior.select(1, new).copy_(torch.softmax(logits, dim=1, dtype=torch.float64))
    tree.logits.select(1, new).copy_(logits)
    edge = tree.edge_from_parent.narrow(1, new, 1)
    torch.add(parent, selection.action.unsqueeze(1), alpha=tree.simulations + 1, out=edge)
    tree.edge_child.scatter_(1, edge, new)

    above = tree.paths[tree.roots, selection.parent].narrow(2, 0, new)
    row = tree.paths.select(1, new)
    row.narrow(2, 0, new).copy_(above)
    row.select(1, 1).narrow(1, 0, new).mul_(tree.discount)
    row.select(1, 2).narrow(1, 0, new).addcmul_(above.select(1, 1), reward)
    on_path, discount, rewards = row.narrow(2, 0, new + 1).unbind(1)
    visits = tree.visits.narrow(1, 0, new + 1)
    value_sum = tree.value_sum.narrow(1, 0, new + 1)
    visits.add_(on_path)
    value_sum.addcmul_(discount, value).add_(rewards)

    visits = visits.narrow(1, 1, new)
    q = torch.addcdiv(tree.reward.narrow(1, 1, new), value_sum.narrow(1, 1, new), visits, value=tree.discount)
    torch.aminmax(q, dim=1, keepdim=True, out=(tree.q_low, tree.q_high))
    edges = tree.edge_from_parent.narrow(1, 1, new)
    tree.edge_q.scatter_(1, edges, q)
    tree.edge_visits.scatter_(1, edges, visits)
    # The new node's visits: a column of ones.
    tree.mean_divisor.scatter_add_(1, parent, visits.narrow(1, new - 1, 1))


def _check_shapes(tree: Tree, **arguments: tuple[Tensor, int]) -> None:
    batch_and_actions = tree.child.shape[0], tree.child.shape[2]
    for name, (tensor, ndim) in arguments.items():
        expected = batch_and_actions[:ndim]
        if tensor.shape != expected:
            raise ValueError(f"{name}: expected shape {list(expected)}, got {list(tensor.shape)}")
