"""The trees of a batched Monte Carlo tree search: one fixed-shape tree per root, all roots in lockstep (step 2, search).

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
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import checks, dispatch, native
from .root import MAX_ACTIONS

MAX_SIMULATIONS = 4095


@dataclass(frozen=True)
class Links:
    """What the reference keeps beside a tree, so that no operation of it loops over the depth.

    Attributes:
      edge_from_parent: `[B, M]` int64, index into the edge views: action_from_parent x M + parent.
      mean_divisor: `[B, M]` float64, visited children, plus one below the root.
      paths: `[B, M, 3, M]` float64. Row i, column j, for j on the path from the root to i (else 0, 0, 0): one,
        discount^(depth i - depth j), and the discounted rewards from j down to i. A leaf's row is all that its
        backup needs, and follows from its parent's row: no walk up.
      edge_child, edge_visits, edge_q: `[B, A x M]`, views of child, child_visits and child_q.
      roots: `[B]` int64, 0 to B - 1.
      nodes: `[M]` int64 in `[1, M]`, 0 to M - 1.
    """

    edge_from_parent: Tensor
    mean_divisor: Tensor
    paths: Tensor
    edge_child: Tensor
    edge_visits: Tensor
    edge_q: Tensor
    roots: Tensor
    nodes: Tensor


class Arrays(NamedTuple):
    """The fields of a Tree on a CPU as NumPy arrays over the same memory, for `native`."""

    visits: np.ndarray
    value_sum: np.ndarray
    value: np.ndarray
    reward: np.ndarray
    prefix_base: np.ndarray
    depth: np.ndarray
    parent: np.ndarray
    action_from_parent: np.ndarray
    child: np.ndarray
    child_visits: np.ndarray
    child_q: np.ndarray
    prior: np.ndarray
    logits: np.ndarray
    illegal: np.ndarray
    q_low: np.ndarray
    q_high: np.ndarray


@dataclass(frozen=True)
class Tree:
    """The trees of `B` roots. Statistics are float64: which action wins must not hang on rounding.

    In the layout of the kernels (`links` is None) tensors are contiguous, indices and counts are int32, and rows of
    nodes that are not there yet are not initialised. In that of the reference the root is the fastest dimension, indices
    are int64 and counts float64.

    Attributes:
      discount: discount of one edge, unless `edge_discount` has one for each.
      lstm_horizon: nodes whose depth is a multiple of it restart the value prefix; 1 for plain rewards.
      visits: `[B, M]` count, simulations through the node, its own evaluation included; 0 if not there yet.
      value_sum: `[B, M]` float64, sum of the returns seen from the node, its own value included.
      value: `[B, M]` float64, the network's value of the node.
      reward: `[B, M]` float64, reward of the edge into the node (0 for the root).
      prefix_base: `[B, M]` float64, what a child's value prefix counts from: the node's own prefix, 0 at a reset.
      depth: `[B, M]` index, edges from the root.
      parent: `[B, M]` index, 0 for the root.
      action_from_parent: `[B, M]` index, 0 for the root.
      child: `[B, M, A]` index of the node, -1 unvisited.
      child_visits: `[B, M, A]` count, `visits` of the child, 0 if unvisited.
      child_q: `[B, M, A]` float64, edge reward + discount x mean value of the child, 0 if unvisited.
      prior: `[B, M, A]` float64.
      logits: `[B, M, A]` float64; -inf for the illegal actions of the root.
      illegal: `[B, A]` bool, actions of the root that no search may take.
      q_low, q_high: `[B, 1]` float64, least and greatest Q over all edges; both 0 while there is none.
      links: what the reference needs besides; None in the layout of the kernels.
      edge_discount: `[B, M]` float64, discount of the edge into the node (the root's is never read); None without edge discounts.
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
    child: Tensor
    child_visits: Tensor
    child_q: Tensor
    prior: Tensor
    logits: Tensor
    illegal: Tensor
    q_low: Tensor
    q_high: Tensor
    links: Links | None
    edge_discount: Tensor | None = None

    @property
    def roots(self) -> int:
        return self.child.shape[0]

    @property
    def actions(self) -> int:
        return self.child.shape[2]

    @property
    def simulations(self) -> int:
        return self.visits.shape[1] - 1

    @property
    def device(self) -> torch.device:
        return self.child.device

    @property
    def form(self) -> Literal["reference", "kernel", "native"]:
        """Which form the operations on this tree take."""
        return dispatch.tree_form(self.child, "reference" if self.links else "kernel")

    @cached_property
    def arrays(self) -> Arrays:
        """Made once: sixteen views at every operation would take longer than the walks of a few roots."""
        return Arrays(*(getattr(self, name).numpy() for name in Arrays._fields))

    def __getstate__(self) -> dict:
        # A copy's arrays must be views of the copy's tensors.
        return {name: value for name, value in vars(self).items() if name != "arrays"}


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
    edge_discounts: bool = False,
    device: torch.device | str = "cpu",
    layout: Literal["kernel", "reference"] | None = None,
) -> Tree:
    """Memory of the trees, to be given a root by `plant` (again for every search).

    Args:
      edge_discounts: whether each edge has a discount of its own, given to `expand_and_backup`; `discount` is then without effect.
      layout: "kernel" for the Triton kernels and, on a CPU, `native`; "reference" for plain PyTorch, which is there to compare
        them with. None picks "kernel" on CUDA and on a CPU, "reference" elsewhere.

    Raises:
      ValueError: a size or lstm_horizon below 1, more than 1024 actions or 4095 simulations, or discount outside [0, 1].
    """
    sizes = {"roots": roots, "actions": actions, "simulations": simulations, "lstm_horizon": lstm_horizon}
    for name, size in sizes.items():
        checks.at_least(name, size, 1)
    checks.at_most("actions", actions, MAX_ACTIONS)
    checks.at_most("simulations", simulations, MAX_SIMULATIONS)
    if not 0.0 <= discount <= 1.0:
        raise ValueError(f"discount: expected a number in [0, 1], got {discount}")
    if layout not in (None, "kernel", "reference"):
        raise ValueError(f"layout: expected 'kernel', 'reference' or None, got {layout!r}")
    in_rows = (layout or dispatch.tree_layout(torch.empty(0, device=device))) == "kernel"
    nodes = simulations + 1

    def field(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        if in_rows:
            return torch.empty(shape, dtype=dtype, device=device)
        # Memory has the root as the fastest dimension: the reference then runs over B x i contiguous numbers,
        # and sums over the few actions vectorise (three times the speed on CPU).
        order = tuple(reversed(range(len(shape))))
        return torch.empty(tuple(reversed(shape)), dtype=dtype, device=device).permute(order)

    index, count = (torch.int32, torch.int32) if in_rows else (torch.int64, torch.float64)
    if in_rows:
        edges = [field(roots, nodes, actions, dtype=dtype) for dtype in (index, count, torch.float64)]
        links = None
    else:
        flat = [field(roots, actions * nodes, dtype=dtype) for dtype in (index, count, torch.float64)]
        edges = [edge.unflatten(1, (actions, nodes)).transpose(1, 2) for edge in flat]
        links = Links(
            edge_from_parent=field(roots, nodes, dtype=index),
            mean_divisor=field(roots, nodes),
            paths=field(roots, nodes, 3, nodes),
            edge_child=flat[0],
            edge_visits=flat[1],
            edge_q=flat[2],
            roots=torch.arange(roots, device=device),
            nodes=torch.arange(nodes, device=device).unsqueeze(0),
        )
    return Tree(
        discount=discount,
        lstm_horizon=lstm_horizon,
        visits=field(roots, nodes, dtype=count),
        value_sum=field(roots, nodes),
        value=field(roots, nodes),
        reward=field(roots, nodes),
        prefix_base=field(roots, nodes),
        depth=field(roots, nodes, dtype=index),
        parent=field(roots, nodes, dtype=index),
        action_from_parent=field(roots, nodes, dtype=index),
        child=edges[0],
        child_visits=edges[1],
        child_q=edges[2],
        prior=field(roots, nodes, actions),
        logits=field(roots, nodes, actions),
        illegal=field(roots, actions, dtype=torch.bool),
        q_low=field(roots, 1),
        q_high=field(roots, 1),
        links=links,
        edge_discount=field(roots, nodes) if edge_discounts else None,
    )


def plant_reference(tree: Tree, prior: Tensor, logits: Tensor, value: Tensor, legal: Tensor | None = None) -> None:
    """`plant` in plain PyTorch, for trees in the layout of the reference. It clears the whole tree."""
    links = tree.links
    statistics = (tree.visits, tree.value_sum, tree.value, tree.reward, tree.prefix_base, links.mean_divisor)
    indices = (tree.depth, tree.parent, tree.action_from_parent, links.edge_from_parent)
    edges = (links.edge_visits, links.edge_q, tree.prior, tree.logits, tree.q_low, tree.q_high)
    for field in (*statistics, *indices, *edges, links.paths):
        field.zero_()
    tree.child.fill_(-1)
    links.mean_divisor[:, 1:].fill_(1.0)
    for part in (0, 1):
        links.paths[:, :, part].diagonal(dim1=1, dim2=2).fill_(1.0)
    tree.visits[:, 0] = 1.0
    tree.value_sum[:, 0] = value
    tree.value[:, 0] = value
    tree.prior[:, 0] = prior
    tree.logits[:, 0] = logits
    if legal is None:
        tree.illegal.zero_()
    else:
        torch.logical_not(legal, out=tree.illegal)
        tree.logits[:, 0].masked_fill_(tree.illegal, -torch.inf)


@triton.jit
def _plant_kernel(
    visits, value_sum, values, reward, prefix_base, depth, parent, action_from_parent, child, child_visits, child_q, priors, all_logits,
    illegal, q_low, q_high, prior, logits, value, legal,
    HAS_LEGAL: tl.constexpr, A: tl.constexpr, M: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    root = tl.program_id(0).to(tl.int64)
    node = tl.arange(0, BLOCK_M)
    at, ours = root * M + node, node < M
    v = tl.load(value + root).to(tl.float32) if value.dtype.element_ty == tl.bfloat16 else tl.load(value + root)
    v = v.to(tl.float64)
    zero = tl.zeros([BLOCK_M], tl.float64)
    none = tl.zeros([BLOCK_M], tl.int32)
    first = node == 0
    tl.store(visits + at, tl.where(first, 1, none), mask=ours)
    tl.store(value_sum + at, tl.where(first, v, zero), mask=ours)
    tl.store(values + at, tl.where(first, v, zero), mask=ours)
    tl.store(reward + at, zero, mask=ours)
    tl.store(prefix_base + at, zero, mask=ours)
    tl.store(depth + at, none, mask=ours)
    tl.store(parent + at, none, mask=ours)
    tl.store(action_from_parent + at, none, mask=ours)
    tl.store(q_low + root, 0.0)
    tl.store(q_high + root, 0.0)

    action = tl.arange(0, BLOCK_A)
    some = action < A
    given, edge = root * A + action, root * M * A + action
    x = tl.load(logits + given, mask=some, other=0.0)
    if logits.dtype.element_ty == tl.bfloat16:
        x = x.to(tl.float32)
    x = x.to(tl.float64)
    out = tl.zeros([BLOCK_A], tl.int1)
    if HAS_LEGAL:
        out = tl.load(legal + given, mask=some, other=1) == 0
        x = tl.where(out, float("-inf"), x)
    tl.store(illegal + given, out, mask=some)
    tl.store(all_logits + edge, x, mask=some)
    tl.store(priors + edge, tl.load(prior + given, mask=some, other=0.0).to(tl.float64), mask=some)
    tl.store(child + edge, tl.full([BLOCK_A], -1, tl.int32), mask=some)
    tl.store(child_visits + edge, tl.zeros([BLOCK_A], tl.int32), mask=some)
    tl.store(child_q + edge, tl.zeros([BLOCK_A], tl.float64), mask=some)


def plant_kernel(tree: Tree, prior: Tensor, logits: Tensor, value: Tensor, legal: Tensor | None = None) -> None:
    """`plant` as one launch, a program per root, for trees in the layout of the kernels."""
    nodes = triton.next_power_of_2(tree.simulations + 1)
    _plant_kernel[(tree.roots,)](
        tree.visits, tree.value_sum, tree.value, tree.reward, tree.prefix_base, tree.depth, tree.parent, tree.action_from_parent,
        tree.child, tree.child_visits, tree.child_q, tree.prior, tree.logits, tree.illegal, tree.q_low, tree.q_high,
        prior, logits, value, tree.illegal if legal is None else legal,
        HAS_LEGAL=legal is not None, A=tree.actions, M=tree.simulations + 1, BLOCK_A=triton.next_power_of_2(tree.actions), BLOCK_M=nodes,
        num_warps=warps(nodes),
    )  # fmt: skip


def plant(tree: Tree, prior: Tensor, logits: Tensor, value: Tensor, legal: Tensor | None = None) -> None:
    """Clear the trees and write their roots, each visited once with its network value.

    Args:
      tree: written.
      prior: `[B, A]` float64, of the root (`root.root_prior`, with the same `legal`). This and the rest with any strides.
      logits: `[B, A]`, any floating dtype.
      value: `[B]`, any floating dtype.
      legal: `[B, A]` bool, which actions the root allows, at least one of them; None allows all. A root that allows none
        is searched as if it allowed its action 0.

    Bytes moved: the root's rows (34 A a root) and 48 M a root of node fields written.

    Raises:
      ValueError: a shape does not fit the tree, or a wrong dtype or device.
    """
    both, each = (tree.roots, tree.actions), (tree.roots,)
    checks.tensor("prior", prior, both, torch.float64, tree.device, any_strides=True)
    checks.tensor("logits", logits, both, checks.FLOATING, tree.device, any_strides=True)
    checks.tensor("value", value, each, checks.FLOATING, tree.device, any_strides=True)
    if legal is not None:
        checks.tensor("legal", legal, both, torch.bool, tree.device, any_strides=True)
    if tree.form == "native":
        native.plant(tree, prior, logits, value, legal)
        return
    run = plant_reference if tree.form == "reference" else plant_kernel
    run(tree, prior.contiguous(), logits.contiguous(), value.contiguous(), None if legal is None else legal.contiguous())


def warps(block: int) -> int:
    """Warps of a program whose widest vector has `block` elements: up to four a thread, then more warps."""
    return max(1, min(16, block // 128))
