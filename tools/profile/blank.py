"""The trainer's state as on CUDA, but of tensors without memory: what counts launches and what compiles them runs the trainer on it."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from speedyzero import ring as replay
from speedyzero import state
from speedyzero.config import Config
from speedyzero.envs import EnvSpec
from speedyzero.norm_over_ranks import normalise_over_ranks
from speedyzero.optim import make_learner
from speedyzero.ranks import ALONE, Ranks
from speedyzero.sizes import network_spec
from speedyzero.snapshot import make_snapshot
from speedyzero.stages import stage

CPU, META = torch.device("cpu"), torch.device("meta")


def blank_state(config: Config, spec: EnvSpec, fake: FakeTensorMode, ranks: Ranks = ALONE) -> state.State:
    """The trainer's state as on CUDA, the snapshot in bf16, but of `fake` tensors and without emulators.

    ranks: who shares the work.
    """
    sizes, lanes = network_spec(config, spec.frame_shape, spec.num_actions), config.lanes
    dtype = torch.uint8 if spec.image else torch.float32
    with META:
        network, snapshot = state.make_network(sizes, 0, META), make_snapshot(sizes, META, amp=True)
    normalise_over_ranks(network, ranks)

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def inbox() -> dict[str, Tensor]:
        flags = {name: zeros(lanes, dtype=torch.bool) for name in ("done", "first")}
        return {"frames": zeros(lanes, *spec.frame_shape, dtype=dtype), "reward": zeros(lanes), **flags}

    with fake:
        for module in (*network.modules(), *snapshot.modules()):
            for name, like in module.named_parameters(recurse=False):
                value = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
                module._parameters[name] = nn.Parameter(value, like.requires_grad)
            for name, like in module.named_buffers(recurse=False):
                module._buffers[name] = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
        return state.State(
            config=config,
            spec=spec,
            emulators=SimpleNamespace(**inbox(), actions=zeros(lanes, dtype=torch.int64), send=lambda: None, recv=lambda: None),
            inbox=replay.Inbox(**inbox()),
            ring=replay.allocate(lanes, config.slots, spec.frame_shape, dtype, spec.num_actions, CPU),
            learner=make_learner(network, config),
            snapshot=snapshot,
            generator=torch.Generator(),
            updates=zeros(dtype=torch.int64),
            search_averages=state.Averages(state.SEARCH_METRICS, CPU),
            learn_averages=state.Averages(state.LEARN_METRICS, CPU),
            turn=SimpleNamespace(begin=lambda: None, end=lambda: None),
            progress=SimpleNamespace(enter=stage),
            ranks=ranks,
        )
