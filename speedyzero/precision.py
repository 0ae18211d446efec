"""Mixed precision of an update: autocast, and bf16 copies of the weights (step 5.3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from speedyzero.layers import Head
from speedyzero.nets import Network
from speedyzero.optim import Learner


def mixed_precision(amp: bool, like: Tensor) -> AbstractContextManager:
    """Autocast to bf16 on the device of `like`, with `amp`. bf16 has fp32's range: no loss scaling."""
    return torch.autocast(like.device.type, torch.bfloat16) if amp else nullcontext()


@contextmanager
def half_weights(learner: Learner, wanted: bool) -> Iterator[list[Tensor]]:
    """Within the block, if `wanted`, the network has bf16 copies of the weights that autocast would cast one by one.

    Gives what to differentiate by, in the order of the parameters: the copies, and the parameters that have none.
    """
    network = learner.network
    own = dict(network.named_parameters())
    halves = learner.optimizer.flat.halves(in_half(network)) if wanted else {}
    _set_parameters(network, halves)
    try:
        yield [halves.get(name, parameter) for name, parameter in own.items()]
    finally:
        _set_parameters(network, {name: own[name] for name in halves})


def _set_parameters(network: Network, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        module, _, key = name.rpartition(".")
        network.get_submodule(module)._parameters[key] = value


def in_half(network: Network) -> set[str]:
    """Names of the parameters that are bf16 in mixed precision: all but those of BatchNorm and of the last layer of every head."""
    modules = dict(network.named_modules())
    full = {id(p) for m in modules.values() if isinstance(m, nn.modules.batchnorm._BatchNorm) for p in m.parameters()}
    full |= {id(p) for m in modules.values() if isinstance(m, Head) for p in m.last.parameters()}
    return {name for name, parameter in network.named_parameters() if id(parameter) not in full}
