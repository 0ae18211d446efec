"""The latents and the recurrent states of a search's nodes (step 2 of the iteration): one `NodeStates` each.

In the shapes `B` denotes the roots and `S` the simulations.
"""

from __future__ import annotations

import torch
from torch import Tensor


class NodeStates:
    """A state of every node that may be expanded: `[S x B, ...]`, node-major, so that a step writes one block.

    The last node is never expanded: S states, not S + 1. In memory a state lies as the root's does (channels last, say).
    """

    def __init__(self, simulations: int, like: Tensor):
        """Memory for the states of `simulations` nodes of each root, unset. like: `[B, ...]`, the roots' states."""
        batch = like.shape[0]
        row = like.numel() // batch
        dense = torch.empty_like(like, device="meta")
        # A state is copied as one block: its batch must be the outermost dimension.
        self._strides = (dense if dense.stride(0) == row else dense.contiguous()).stride()
        self._shape = like.shape
        self._memory = like.new_empty(simulations * batch, row)
        self._nothing = like.new_zeros(())

    def _view(self, rows: Tensor) -> Tensor:
        return rows.as_strided(self._shape, self._strides, rows.storage_offset())

    def write(self, node: int, state: Tensor, zero: Tensor | None = None) -> None:
        """Keep what the model made of node `node` of every root; zeros where `zero` [B]."""
        batch = self._shape[0]
        kept = self._view(self._memory.narrow(0, node * batch, batch))
        if zero is None:
            kept.copy_(state)
        else:
            torch.where(zero.view(-1, *[1] * (state.ndim - 1)), self._nothing, state.to(kept.dtype), out=kept)

    def read(self, rows: Tensor) -> Tensor:
        """The states of rows `[B]` int64, node x B + root, shaped and strided as the root's."""
        return self._view(self._memory.index_select(0, rows))
