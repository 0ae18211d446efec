"""Expansion and backup: the evaluated leaf becomes a node, and its return reaches all its ancestors (step 2, search).

The reference adds one row of path returns; the kernel holds all nodes of a root in registers and walks up, one program per
root, as does `native` on a CPU. Shapes as in `tree`: `B` roots, `A` actions, `S` simulations, `M = S + 1` nodes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import checks, native
from .tree import Selection, Tree, warps


def expand_and_backup_reference(
    tree: Tree, simulation: int, selection: Selection, value_prefix: Tensor, logits: Tensor, value: Tensor, discount: Tensor | None = None
) -> None:
    """`expand_and_backup` in plain PyTorch, for trees in the layout of the reference."""
    links, new = tree.links, simulation + 1
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
    edge = links.edge_from_parent.narrow(1, new, 1)
    torch.add(parent, selection.action.unsqueeze(1), alpha=tree.simulations + 1, out=edge)
    links.edge_child.scatter_(1, edge, new)

    above = links.paths[links.roots, selection.parent].narrow(2, 0, new)
    row = links.paths.select(1, new)
    row.narrow(2, 0, new).copy_(above)
    edge_discount = tree.discount if discount is None else tree.edge_discount.narrow(1, new, 1).copy_(discount.unsqueeze(1))
    row.select(1, 1).narrow(1, 0, new).mul_(edge_discount)
    row.select(1, 2).narrow(1, 0, new).addcmul_(above.select(1, 1), reward)
    on_path, decay, rewards = row.narrow(2, 0, new + 1).unbind(1)
    visits = tree.visits.narrow(1, 0, new + 1)
    value_sum = tree.value_sum.narrow(1, 0, new + 1)
    visits.add_(on_path)
    value_sum.addcmul_(decay, value).add_(rewards)

    visits = visits.narrow(1, 1, new)
    reward, value_sum = tree.reward.narrow(1, 1, new), value_sum.narrow(1, 1, new)
    if discount is None:
        q = torch.addcdiv(reward, value_sum, visits, value=tree.discount)
    else:
        q = torch.addcmul(reward, tree.edge_discount.narrow(1, 1, new), value_sum / visits)
    torch.aminmax(q, dim=1, keepdim=True, out=(tree.q_low, tree.q_high))
    edges = links.edge_from_parent.narrow(1, 1, new)
    links.edge_q.scatter_(1, edges, q)
    links.edge_visits.scatter_(1, edges, visits)
    # The new node's visits: a column of ones.
    links.mean_divisor.scatter_add_(1, parent, visits.narrow(1, new - 1, 1))


@triton.jit(do_not_specialize=["new"])
def _backup_kernel(
    visits, value_sum, values, reward, prefix_base, depth, parent, action_from_parent, child, child_visits, child_q, prior, all_logits,
    q_low, q_high, leaf_parent, leaf_action, leaf_depth, leaf_reset, value_prefix, logits, value, edge_discount, discount, new,
    DISCOUNT: tl.constexpr, EDGE_DISCOUNTS: tl.constexpr, A: tl.constexpr, M: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    root = tl.program_id(0).to(tl.int64)
    at = root * M
    above = tl.load(leaf_parent + root).to(tl.int32)
    taken = tl.load(leaf_action + root).to(tl.int32)
    prefix = tl.load(value_prefix + root)
    returns = tl.load(value + root)
    action = tl.arange(0, BLOCK_A)
    some = action < A
    x = tl.load(logits + root * A + action, mask=some, other=float("-inf"))
    if value_prefix.dtype.element_ty == tl.bfloat16:
        prefix = prefix.to(tl.float32)
    if value.dtype.element_ty == tl.bfloat16:
        returns = returns.to(tl.float32)
    if logits.dtype.element_ty == tl.bfloat16:
        x = x.to(tl.float32)
    prefix = prefix.to(tl.float64)
    returns = returns.to(tl.float64)
    x = x.to(tl.float64)

    # The new node.
    edge_reward = prefix - tl.load(prefix_base + at + above)
    tl.store(values + at + new, returns)
    tl.store(reward + at + new, edge_reward)
    tl.store(prefix_base + at + new, tl.where(tl.load(leaf_reset + root) != 0, 0.0, prefix))
    tl.store(depth + at + new, tl.load(leaf_depth + root).to(tl.int32))
    tl.store(parent + at + new, above)
    tl.store(action_from_parent + at + new, taken)
    tl.store(child + (at + above) * A + taken, new)
    e = tl.where(some, tl.exp(x - tl.max(x, 0)), 0.0)
    row = (at + new) * A + action
    tl.store(prior + row, e / tl.sum(e, 0), mask=some)
    tl.store(all_logits + row, x, mask=some)
    tl.store(child + row, tl.full([BLOCK_A], -1, tl.int32), mask=some)
    tl.store(child_visits + row, tl.zeros([BLOCK_A], tl.int32), mask=some)
    tl.store(child_q + row, tl.zeros([BLOCK_A], tl.float64), mask=some)

    # The walk up, in registers: what memory holds of the new node is not read back.
    node = tl.arange(0, BLOCK_M)
    old, fresh = node < new, node == new
    n = tl.load(visits + at + node, mask=old, other=0)
    total = tl.load(value_sum + at + node, mask=old, other=0.0)
    r = tl.where(fresh, edge_reward, tl.load(reward + at + node, mask=old, other=0.0))
    up = tl.where(fresh, above, tl.load(parent + at + node, mask=old, other=0))
    by = tl.where(fresh, taken, tl.load(action_from_parent + at + node, mask=old, other=0))
    if EDGE_DISCOUNTS:
        own = tl.load(discount + root)
        if discount.dtype.element_ty == tl.bfloat16:
            own = own.to(tl.float32)
        own = own.to(tl.float64)
        tl.store(edge_discount + at + new, own)
        g = tl.where(fresh, own, tl.load(edge_discount + at + node, mask=old, other=0.0))
    on_path = tl.zeros([BLOCK_M], tl.int32)
    here = tl.zeros([], tl.int32) + new
    while here >= 0:
        this = node == here
        on_path = tl.where(this, 1, on_path)
        n = tl.where(this, n + 1, n)
        total = tl.where(this, total + returns, total)
        if EDGE_DISCOUNTS:
            returns = tl.sum(tl.where(this, r, 0.0), 0) + tl.sum(tl.where(this, g, 0.0), 0) * returns
        else:
            returns = tl.sum(tl.where(this, r, 0.0), 0) + DISCOUNT * returns
        here = tl.where(here == 0, -1, tl.sum(tl.where(this, up, 0), 0))
    touched = on_path != 0
    tl.store(visits + at + node, n, mask=touched)
    tl.store(value_sum + at + node, total, mask=touched)

    # Q of every edge, each node standing for the edge into it; only those on the path have changed.
    is_edge = (node > 0) & (node <= new)
    if EDGE_DISCOUNTS:
        q = r + g * (total / tl.where(is_edge, n, 1).to(tl.float64))
    else:
        q = r + DISCOUNT * (total / tl.where(is_edge, n, 1).to(tl.float64))
    tl.store(q_low + root, tl.min(tl.where(is_edge, q, float("inf")), 0))
    tl.store(q_high + root, tl.max(tl.where(is_edge, q, float("-inf")), 0))
    edge = (at + up) * A + by
    tl.store(child_q + edge, q, mask=touched & is_edge)
    tl.store(child_visits + edge, n, mask=touched & is_edge)


def expand_and_backup_kernel(
    tree: Tree, simulation: int, selection: Selection, value_prefix: Tensor, logits: Tensor, value: Tensor, discount: Tensor | None = None
) -> None:
    """`expand_and_backup` as one launch, for trees in the layout of the kernels."""
    nodes = triton.next_power_of_2(tree.simulations + 1)
    discounts = (tree.reward, tree.reward) if discount is None else (tree.edge_discount, discount)
    _backup_kernel[(tree.roots,)](
        tree.visits, tree.value_sum, tree.value, tree.reward, tree.prefix_base, tree.depth, tree.parent, tree.action_from_parent,
        tree.child, tree.child_visits, tree.child_q, tree.prior, tree.logits, tree.q_low, tree.q_high, *selection,
        value_prefix, logits, value, *discounts, simulation + 1,
        DISCOUNT=tree.discount, EDGE_DISCOUNTS=discount is not None, A=tree.actions, M=tree.simulations + 1,
        BLOCK_A=triton.next_power_of_2(tree.actions), BLOCK_M=nodes,
        num_warps=warps(max(nodes, tree.actions)), enable_fp_fusion=False,
    )  # fmt: skip


def expand_and_backup(
    tree: Tree, simulation: int, selection: Selection, value_prefix: Tensor, logits: Tensor, value: Tensor, discount: Tensor | None = None
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
      value: `[B]`, the network's value of the new node.
      discount: `[B]` in [0, 1], of the new edge, for trees with edge discounts and for those alone; 0 where the episode ends
        on the way: nothing beyond counts. All four in any floating dtype, with any strides.

    Bytes moved by simulation i: a root reads 28 (i + 1) of its nodes' statistics, and writes 12 for each node on the path,
    12 for each edge on it, and the new node's 32 A + 36.

    Raises:
      ValueError: simulation is not one of the tree's, or a wrong shape, dtype or device, or a selection that is not contiguous
        or, on a CPU, not of edges of its tree.
    """
    checks.at_least("simulation", simulation, 0)
    checks.at_most("simulation", simulation, tree.simulations - 1)
    each = (tree.roots,)
    for name, index in zip(Selection._fields[:3], selection[:3], strict=True):
        checks.tensor(f"selection.{name}", index, each, torch.int64, tree.device, any_strides=tree.links is not None)
    checks.tensor("selection.reset", selection.reset, each, torch.bool, tree.device)
    checks.tensor("value_prefix", value_prefix, each, checks.FLOATING, tree.device, any_strides=True)
    checks.tensor("logits", logits, (tree.roots, tree.actions), checks.FLOATING, tree.device, any_strides=True)
    checks.tensor("value", value, each, checks.FLOATING, tree.device, any_strides=True)
    if (discount is None) != (tree.edge_discount is None):
        raise ValueError(f"discount: {'goes with' if discount is not None else 'is missing, for'} trees allocated with edge_discounts")
    if discount is not None:
        checks.tensor("discount", discount, each, checks.FLOATING, tree.device, any_strides=True)
    if tree.form == "native":
        native.expand_and_backup(tree, simulation, selection, value_prefix, logits, value, discount)
        return
    run = expand_and_backup_reference if tree.form == "reference" else expand_and_backup_kernel
    discount = None if discount is None else discount.contiguous()
    run(tree, simulation, selection, value_prefix.contiguous(), logits.contiguous(), value.contiguous(), discount)
