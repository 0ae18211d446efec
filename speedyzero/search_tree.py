"""The tree of one search as plain arrays, to look at or to draw."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from speedyzero_kernels.tree import Tree


@dataclass(frozen=True)
class SearchTree:
    """The nodes of a tree in the order they were made; node 0 is the root. `M` is the simulations + 1, `A` the actions."""

    discount: float
    """Discount of one edge."""
    parent: np.ndarray
    """[M] int64, -1 for the root."""
    action: np.ndarray
    """[M] int64, of the edge into the node; -1 for the root."""
    depth: np.ndarray
    """[M] int64."""
    visits: np.ndarray
    """[M] int64, simulations through the node."""
    value: np.ndarray
    """[M] float64, mean return from the node on."""
    network_value: np.ndarray
    """[M] float64, the network's value of the node."""
    reward: np.ndarray
    """[M] float64, predicted reward of the edge into the node; 0 for the root."""
    prior: np.ndarray
    """[M] float64, the policy's share of the edge into the node; 1 for the root."""
    policy: np.ndarray
    """[M, A] float64, the network's policy at each node."""

    def __len__(self) -> int:
        return len(self.parent)

    def children(self, node: int) -> list[int]:
        """The visited children of a node, by action."""
        return sorted(np.flatnonzero(self.parent == node).tolist(), key=lambda child: self.action[child])

    def favourite(self, action: int) -> list[int]:
        """The nodes of the line of play that begins with `action`: from the root along the most visited; the first of those alike."""
        line, children = [0], [child for child in self.children(0) if self.action[child] == action]
        while children:
            line.append(max(children, key=lambda child: self.visits[child]))
            children = self.children(line[-1])
        return line


def tree_of(trees: Tree, lane: int) -> SearchTree:
    """The finished tree of root `lane`, copied to the host."""
    names = ("parent", "action_from_parent", "depth", "visits", "value_sum", "value", "reward")
    parent, action, depth, visits, total, value, reward = (getattr(trees, name)[lane].cpu().numpy() for name in names)
    policy = trees.prior[lane].cpu().numpy().copy()
    visits = visits.astype(np.int64)
    prior = policy[parent.astype(np.int64), action.astype(np.int64)]
    prior[0] = 1.0
    parent, action = parent.astype(np.int64), action.astype(np.int64)
    parent[0] = action[0] = -1
    mean = total / visits
    return SearchTree(trees.discount, parent, action, depth.astype(np.int64), visits, mean, value.copy(), reward.copy(), prior, policy)
