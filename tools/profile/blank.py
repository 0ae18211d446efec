"""The trainer's state as on CUDA, but of tensors without memory: what counts launches and what compiles them runs the trainer on it."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from speedyzero import ring as replay
from speedyzero import state
from speedyzero.config import Config
from speedyzero.envs import EnvSpec
from speedyzero.nets import Network, make_snapshot
from speedyzero.optim import make_learner
from speedyzero.ranks import ALONE, Ranks
from speedyzero.sizes import network_spec
from speedyzero.stages import stage

CPU, META = torch.device("cpu"), torch.device("meta")


class MetaGenerator(torch.Generator):
    """A generator that says it is on `meta`; no real one can be."""

    device = META


def blank_state(config: Config, spec: EnvSpec, fake: FakeTensorMode | None = None, ranks: Ranks = ALONE) -> state.State:
    """The trainer's state as on CUDA, the snapshot in bf16, but without memory and without emulators: of `meta` tensors, or fake ones.

    ranks: who shares the work; nothing is sent while the state is made.
    """
    sizes = network_spec(config, spec.frame_shape, spec.num_actions)
    with META:
        network, snapshot = state.make_network(sizes, 0, META), make_snapshot(sizes, META, amp=True)
    ranks.join_batch_norms(network)
    if fake is None:
        return _state_around(network, snapshot, config, spec, META, MetaGenerator(), ranks)
    with fake:
        for module in (*network.modules(), *snapshot.modules()):
            for name, like in module.named_parameters(recurse=False):
                value = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
                module._parameters[name] = nn.Parameter(value, like.requires_grad)
            for name, like in module.named_buffers(recurse=False):
                module._buffers[name] = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
        return _state_around(network, snapshot, config, spec, CPU, torch.Generator(), ranks)


def _state_around(
    network: Network, snapshot: Network, config: Config, spec: EnvSpec, device: torch.device, generator: torch.Generator, ranks: Ranks
) -> state.State:
    lanes, dtype = config.lanes, torch.uint8 if spec.image else torch.float32

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def inbox() -> dict[str, Tensor]:
        flags = {name: zeros(lanes, dtype=torch.bool) for name in ("done", "first")}
        return {"frames": zeros(lanes, *spec.frame_shape, dtype=dtype), "reward": zeros(lanes), **flags}

    return state.State(
        config=config,
        spec=spec,
        emulators=SimpleNamespace(**inbox(), actions=zeros(lanes, dtype=torch.int64), send=lambda: None, recv=lambda: None),
        inbox=replay.Inbox(**inbox()),
        ring=replay.allocate(config.lanes, config.slots, spec.frame_shape, dtype, spec.num_actions, device),
        learner=make_learner(network, config),
        snapshot=snapshot,
        generator=generator,
        updates=zeros(dtype=torch.int64),
        search_averages=state.Averages(state.SEARCH_METRICS, device),
        learn_averages=state.Averages(state.LEARN_METRICS, device),
        turn=SimpleNamespace(begin=lambda: None, end=lambda: None),
        progress=SimpleNamespace(enter=stage),
        ranks=ranks,
    )
