"""The snapshot: a copy of the network with every BatchNorm folded into the layer before it. It searches, acts, and bootstraps targets."""

from __future__ import annotations

import torch

from speedyzero.layers import Head
from speedyzero.nets import Network
from speedyzero.pixels import Pixels
from speedyzero.sizes import NetworkSpec
from speedyzero_kernels import dispatch


@torch.no_grad()
def fold(source: Network, snapshot: Network) -> None:
    """Copy the training network into its snapshot, every BatchNorm folded with its running statistics.

    Copies in place: the addresses of the snapshot do not change. Casts to the snapshot's dtype.
    """
    sources = dict(source.named_modules())
    for name, module in snapshot.named_modules():
        if hasattr(module, "fold_from"):
            module.fold_from(sources[name])
        elif not any(module.children()):
            for mine, theirs in zip(module.parameters(recurse=False), sources[name].parameters(recurse=False), strict=True):
                mine.copy_(theirs)


def make_snapshot(spec: NetworkSpec, device: torch.device, amp: bool | None = False) -> Network:
    """An empty snapshot: bf16 on CUDA and, with `amp`, on a CPU, else fp32; no gradients.

    The last layer of every head and `Pixels` are always fp32.
    """
    dtype = torch.bfloat16 if amp or device.type == "cuda" else torch.float32
    snapshot = Network(spec, folded=True).to(device=device, dtype=dtype)
    for module in snapshot.modules():
        if isinstance(module, Head):
            module.last.float()
        elif isinstance(module, Pixels):
            module.float()
    snapshot = snapshot.to(memory_format=dispatch.board_format(next(snapshot.parameters())))
    return snapshot.requires_grad_(False).eval()
