"""The trees on a CPU: the kernels' own walks, compiled by Numba, one root after another (step 2, search).

Same layout in memory, same float64 arithmetic and same order of ties as the Triton kernels of `tree`, `select` and
`backup`, whose public functions call these where the trees lie on a CPU. The first call on a machine compiles; the
result is kept beside this file or, where that folder is read-only, in the user's cache. All of it is in this one file,
since Numba compiles anew when the file of a function changes, but not when that of a function it calls does.

Here inputs have passed the checks of the public functions, but for the strides of floating tensors, which may be any.
Shapes as in `tree`: `B` roots, `A` actions, `M` nodes.
"""

import math
from typing import TYPE_CHECKING

import numba
import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from .tree import Selection, Tree

TINY = 2.2250738585072014e-308


def compiled(function):
    """Numba's form of a function that holds no Python object. No fast math: scores must round as the kernels' do."""
    try:
        return numba.njit(function, cache=True, nogil=True, error_model="numpy")
    except RuntimeError:  # no folder that a cache could be kept in
        return numba.njit(function, nogil=True, error_model="numpy")


@compiled
def _plant(visits, value_sum, values, reward, prefix_base, depth, parent, action_from_parent, child, child_visits, child_q, priors,
           all_logits, illegal, q_low, q_high, prior, logits, value, legal):  # fmt: skip
    roots, _, actions = child.shape
    masked = legal.shape[0] > 0
    for root in range(roots):
        visits[root] = 0
        value_sum[root] = 0.0
        values[root] = 0.0
        reward[root] = 0.0
        prefix_base[root] = 0.0
        depth[root] = 0
        parent[root] = 0
        action_from_parent[root] = 0
        visits[root, 0] = 1
        value_sum[root, 0] = value[root]
        values[root, 0] = value[root]
        q_low[root, 0] = 0.0
        q_high[root, 0] = 0.0
        for action in range(actions):
            barred = masked and not legal[root, action]
            illegal[root, action] = barred
            all_logits[root, 0, action] = -np.inf if barred else logits[root, action]
            priors[root, 0, action] = prior[root, action]
            child[root, 0, action] = -1
            child_visits[root, 0, action] = 0
            child_q[root, 0, action] = 0.0


@compiled
def _puct(child, child_visits, child_q, prior, visits, illegal, q_low, q_high, leaf_parent, leaf_action, leaf_depth,
          leaf_reset, simulation, c_base, c_init, delta_min, horizon):  # fmt: skip
    roots, _, actions = child.shape
    for root in range(roots):
        low = q_low[root, 0]
        span = q_high[root, 0] - low
        if not span > delta_min:
            span = delta_min
        node, depth, mean = 0, 0, 0.0
        while True:
            q_sum, count = 0.0, 0
            for action in range(actions):
                if child[root, node, action] >= 0:
                    q_sum += child_q[root, node, action]
                    count += 1
            mean = (mean + q_sum) / (max(count, 1) if depth == 0 else count + 1)
            unvisited_q = (mean - low) / span
            if unvisited_q < 0.0:
                unvisited_q = 0.0
            elif unvisited_q > 1.0:
                unvisited_q = 1.0
            total = float(visits[root, node])
            explore = (math.log((total + (c_base + 1.0)) / c_base) + c_init) * math.sqrt(total)
            best, greatest = 0, -np.inf
            for action in range(actions):
                q = unvisited_q
                if child[root, node, action] >= 0:
                    q = (child_q[root, node, action] - low) / span
                score = q + prior[root, node, action] / (child_visits[root, node, action] + 1.0) * explore
                if score != score:
                    score = np.inf
                if depth == 0 and illegal[root, action]:
                    score = -np.inf
                if score > greatest:
                    best, greatest = action, score
            depth += 1
            following = child[root, node, best]
            # A child's index exceeds its parent's: what is not a tree is not walked either.
            if not node < following <= simulation:
                break
            node = following
        leaf_parent[root] = node
        leaf_action[root] = best
        leaf_depth[root] = depth
        leaf_reset[root] = depth % horizon == 0


@compiled
def _complete(n, q, p, value, total, c_visit, c_scale, delta_min, out):
    """`select.completed_q` of one node, whose rows of `[A]` are given, into a row."""
    actions = n.shape[0]
    mass, weighted, most = 0.0, 0.0, 0
    for action in range(actions):
        if n[action] > 0:
            weight = max(p[action], TINY)
            mass += weight
            weighted += weight * q[action]
            most = max(most, n[action])
    mean = weighted / (mass if mass > 0.0 else 1.0)
    mixed = ((total - 1.0) * mean + value) / total
    low, high = np.inf, -np.inf
    for action in range(actions):
        completed = q[action] if n[action] > 0 else mixed
        out[action] = completed
        if completed < low:
            low = completed
        if completed > high:
            high = completed
    span = high - low
    if not span > delta_min:
        span = delta_min
    scale = (most + c_visit) * c_scale / span
    for action in range(actions):
        out[action] = (out[action] - low) * scale


@compiled
def _gumbel(child, child_visits, child_q, prior, logits, visits, values, illegal, leaf_parent, leaf_action,
            leaf_depth, leaf_reset, simulation, considered, gumbel, c_visit, c_scale, delta_min, horizon):  # fmt: skip
    roots, _, actions = child.shape
    score = np.empty(actions)
    for root in range(roots):
        wanted = considered[root if considered.shape[0] > 1 else 0]
        node, depth = 0, 0
        while True:
            n, x = child_visits[root, node], logits[root, node]
            total = float(visits[root, node])
            _complete(n, child_q[root, node], prior[root, node], values[root, node], total, c_visit, c_scale, delta_min, score)
            best, greatest = 0, -np.inf
            if depth == 0:
                top = -np.inf
                for action in range(actions):
                    if x[action] > top:
                        top = x[action]
                for action in range(actions):
                    s = x[action] - top + score[action]
                    if gumbel.shape[0] > 0:
                        s += gumbel[root, action]
                    if s < -1e9:
                        s = -1e9
                    if n[action] != wanted:
                        s = -2e9  # out of the running is not illegal
                    if s != s:
                        s = np.inf
                    if illegal[root, action]:
                        s = -np.inf
                    if s > greatest:
                        best, greatest = action, s
            else:
                top = -np.inf
                for action in range(actions):
                    score[action] += x[action]
                    if score[action] > top:
                        top = score[action]
                mass = 0.0
                for action in range(actions):
                    score[action] = math.exp(score[action] - top)
                    mass += score[action]
                for action in range(actions):
                    s = score[action] / mass - n[action] / total
                    if s != s:
                        s = np.inf
                    if s > greatest:
                        best, greatest = action, s
            depth += 1
            following = child[root, node, best]
            if not node < following <= simulation:
                break
            node = following
        leaf_parent[root] = node
        leaf_action[root] = best
        leaf_depth[root] = depth
        leaf_reset[root] = depth % horizon == 0


@compiled
def _completed_q(child_visits, child_q, prior, values, visits, c_visit, c_scale, delta_min, out):
    roots, nodes, _ = out.shape
    for root in range(roots):
        for node in range(nodes):
            _complete(
                child_visits[root, node], child_q[root, node], prior[root, node], values[root, node], float(visits[root, node]),
                c_visit, c_scale, delta_min, out[root, node],
            )  # fmt: skip


@compiled
def _backup(visits, value_sum, values, reward, prefix_base, depth, parent, action_from_parent, child, child_visits, child_q, prior,
            all_logits, q_low, q_high, leaf_parent, leaf_action, leaf_depth, leaf_reset, value_prefix, logits, value, new,
            discount, edge_discount, discounts):  # fmt: skip
    """Returns False, and writes nothing, if a selected edge is not one of its tree's."""
    roots, _, actions = child.shape
    for root in range(roots):
        if not (0 <= leaf_parent[root] < new and 0 <= leaf_action[root] < actions):
            return False
    per_edge = edge_discount.shape[0] > 0
    for root in range(roots):
        if per_edge:
            edge_discount[root, new] = discounts[root]
        above, taken, prefix, returns = leaf_parent[root], leaf_action[root], value_prefix[root], value[root]
        values[root, new] = returns
        reward[root, new] = prefix - prefix_base[root, above]
        prefix_base[root, new] = 0.0 if leaf_reset[root] else prefix
        depth[root, new] = leaf_depth[root]
        parent[root, new] = above
        action_from_parent[root, new] = taken
        child[root, above, taken] = new
        top, mass = -np.inf, 0.0
        for action in range(actions):
            if logits[root, action] > top:
                top = logits[root, action]
        for action in range(actions):
            weight = math.exp(logits[root, action] - top)
            mass += weight
            prior[root, new, action] = weight
        for action in range(actions):
            prior[root, new, action] /= mass
            all_logits[root, new, action] = logits[root, action]
            child[root, new, action] = -1
            child_visits[root, new, action] = 0
            child_q[root, new, action] = 0.0

        node = new
        while True:
            n, total = visits[root, node] + 1, value_sum[root, node] + returns
            visits[root, node] = n
            value_sum[root, node] = total
            if node == 0:
                break
            up, by = parent[root, node], action_from_parent[root, node]
            child_visits[root, up, by] = n
            gamma = edge_discount[root, node] if per_edge else discount
            child_q[root, up, by] = reward[root, node] + gamma * (total / n)
            returns = reward[root, node] + gamma * returns
            node = up

        # Each node stands for the edge into it. An old extreme may have moved, hence all of them.
        low, high = np.inf, -np.inf
        for node in range(1, new + 1):
            gamma = edge_discount[root, node] if per_edge else discount
            q = reward[root, node] + gamma * (value_sum[root, node] / visits[root, node])
            if q < low:
                low = q
            if q > high:
                high = q
        q_low[root, 0] = low
        q_high[root, 0] = high
    return True


NO_ROWS, NO_MASK, NONE = np.empty((0, 1)), np.empty((0, 1), dtype=np.bool_), np.empty(0)


def _doubles(x: Tensor) -> np.ndarray:
    """Any floating tensor as contiguous float64; no copy if it is that already. NumPy's cast: PyTorch's takes three times as long."""
    if x.requires_grad:
        x = x.detach()
    if x.dtype == torch.bfloat16:  # NumPy has none
        x = x.float()
    return np.ascontiguousarray(x.numpy(), dtype=np.float64)


def plant(tree: "Tree", prior: Tensor, logits: Tensor, value: Tensor, legal: Tensor | None = None) -> None:
    """`tree.plant` on a CPU."""
    _plant(*tree.arrays, _doubles(prior), _doubles(logits), _doubles(value), NO_MASK if legal is None else legal.contiguous().numpy())


def _selection(roots: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    parent, action, depth = (np.empty(roots, dtype=np.int64) for _ in range(3))
    return parent, action, depth, np.empty(roots, dtype=np.bool_)


def select_puct(
    tree: "Tree", simulation: int, *, c_base: float, c_init: float, value_delta_min: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`select.select_puct` on a CPU. Returns the fields of a Selection."""
    at, leaf = tree.arrays, _selection(tree.roots)
    _puct(
        at.child, at.child_visits, at.child_q, at.prior, at.visits, at.illegal, at.q_low, at.q_high, *leaf,
        simulation, float(c_base), float(c_init), float(value_delta_min), tree.lstm_horizon,
    )  # fmt: skip
    return tuple(map(torch.from_numpy, leaf))


def select_gumbel(
    tree: "Tree", simulation: int, considered_visit: int | Tensor, gumbel: Tensor | None, *, c_visit: float, c_scale: float,
    value_delta_min: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`select.select_gumbel` on a CPU. Returns the fields of a Selection."""
    at, leaf = tree.arrays, _selection(tree.roots)
    considered = considered_visit.numpy() if isinstance(considered_visit, Tensor) else np.array([considered_visit], dtype=np.int64)
    _gumbel(
        at.child, at.child_visits, at.child_q, at.prior, at.logits, at.visits, at.value, at.illegal, *leaf,
        simulation, considered, NO_ROWS if gumbel is None else _doubles(gumbel), float(c_visit), float(c_scale), float(value_delta_min),
        tree.lstm_horizon,
    )  # fmt: skip
    return tuple(map(torch.from_numpy, leaf))


def completed_q(tree: "Tree", nodes: int, c_visit: float, c_scale: float, value_delta_min: float) -> Tensor:
    """`select.completed_q` on a CPU."""
    at, out = tree.arrays, torch.empty((tree.roots, nodes, tree.actions), dtype=torch.float64)
    _completed_q(
        at.child_visits, at.child_q, at.prior, at.value, at.visits, float(c_visit), float(c_scale), float(value_delta_min), out.numpy()
    )
    return out


def expand_and_backup(
    tree: "Tree", simulation: int, selection: "Selection", value_prefix: Tensor, logits: Tensor, value: Tensor, discount: Tensor | None
) -> None:
    """`backup.expand_and_backup` on a CPU.

    Raises:
      ValueError: an edge of the selection is not one of its tree's.
    """
    at, leaf = tree.arrays, [field.numpy() for field in selection]
    known = _backup(
        at.visits, at.value_sum, at.value, at.reward, at.prefix_base, at.depth, at.parent, at.action_from_parent, at.child,
        at.child_visits, at.child_q, at.prior, at.logits, at.q_low, at.q_high, *leaf, _doubles(value_prefix), _doubles(logits),
        _doubles(value), simulation + 1, float(tree.discount),
        *((NO_ROWS, NONE) if discount is None else (tree.edge_discount.numpy(), _doubles(discount))),
    )  # fmt: skip
    if not known:
        raise ValueError(f"selection: expected edges of nodes 0 to {simulation}, actions 0 to {tree.actions - 1}")
