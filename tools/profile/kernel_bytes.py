"""Bytes that the library's kernels move, as kernels/README.md states them."""


def plant_bytes(roots: int, actions: int, nodes: int) -> float:
    return roots * (34 * actions + 48 * nodes)


def root_prior_bytes(roots: int, actions: int, logit: int, noise: int) -> float:
    return roots * actions * (logit + noise + 8)


def select_bytes(search: str, roots: int, actions: int, depth: float) -> float:
    return roots * (depth * (24 * actions + 4 if search == "puct" else 28 * actions + 12) + 25)


def backup_bytes(roots: int, actions: int, depth: float, simulation: int) -> float:
    return roots * (28 * (simulation + 1) + 24 * depth + 32 * actions + 36)


def to_scalar_bytes(rows: int, bins: int, logit: int) -> float:
    return rows * (bins * logit + 4)


def cross_entropy_bytes(rows: int, bins: int, logit: int, *, forward: bool) -> float:
    """Forward reads the logits, backward reads them again and writes their gradient."""
    return (1 if forward else 2) * logit * rows * bins


def observations_bytes(count: int, distinct: int, frame: int, frame_item: int, stack: int, out_item: int) -> float:
    """`count` stacks of frames of `frame` numbers, out of `distinct` frames of the ring."""
    return frame * (distinct * frame_item + count * stack * out_item)


def targets_bytes(batch: int, actions: int, unroll: int, n: int) -> float:
    read = 16 + 5 * (unroll + n + 1) + (unroll + 1) * (4 + 2 * actions) + 8 * unroll
    return batch * (read + (unroll + 1) * (4 * actions + 12) + 12 * unroll)


def optimizer_bytes(optimizer: str, parameters: int) -> float:
    return parameters * (24 if optimizer == "sgd" else 28)


def batch_norm_passes(*, residual: bool, relu: bool, backward: bool) -> int:
    """How often a tensor of the size of x is read or written: statistics and sums need one look at everything, the result a second.

    Of a residual behind ReLU the backward pass reads the result once, for its sign, and its gradient goes from one launch to the next.
    """
    if backward:
        return 7 if residual and relu else 5
    return 4 if residual else 3
