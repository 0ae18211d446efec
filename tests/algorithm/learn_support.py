"""A small config, a ring of random content and a new learner, for the tests of learning."""

import torch

from speedyzero.config import Config
from speedyzero.nets import Network
from speedyzero.optim import Learner, make_learner
from speedyzero.ring import Ring, allocate
from speedyzero.sizes import network_spec

CPU = torch.device("cpu")
TINY = Config(
    env_steps=100_000, lanes=2, ring_positions=80, frame_stack=2, augment=False, clip_reward=False, batch_size=16,
    unroll=3, n_step=2, discount=0.9, channels=4, stem_channels=4, head_channels=4, head_hidden=8, lstm=8, support=5,
    projection=16, lr=0.05, lr_warmup=0.0,
)  # fmt: skip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def filled_ring(
    config: Config, shape=(1, 3, 3), dtype=torch.float32, actions: int = 3, seed: int = 0, ends=0.06
) -> Ring:
    """A full ring of random content, consistent in its dead slots and first frames; slot 0 is the oldest."""
    random = generator(seed)
    ring = allocate(config.lanes, config.slots, shape, dtype, actions, CPU)
    ring.head.fill_(config.slots)
    size = ring.done.shape
    ring.frames.copy_(torch.rand(ring.frames.shape, generator=random) * (255 if dtype == torch.uint8 else 1))
    ring.done.copy_(torch.rand(size, generator=random) < ends)
    ring.first[:, 1:] = ring.done[:, :-1]
    ring.first[:, 0] = True
    ring.action.copy_(torch.randint(actions, size, generator=random))
    ring.reward.copy_(torch.randn(size, generator=random))
    policy = torch.rand(ring.policy.shape, generator=random)
    ring.policy.copy_(policy / policy.sum(2, keepdim=True) * ~ring.done[..., None])
    ring.value.copy_(torch.randn(size, generator=random) * ~ring.done)
    ring.priority.copy_(torch.rand(size, generator=random) * ~ring.done)
    ring.refreshed_at.zero_()
    return ring


def new_learner(config: Config, shape=(1, 3, 3), actions: int = 3, seed: int = 0) -> Learner:
    torch.manual_seed(seed)
    network = Network(network_spec(config, shape, actions)).train()
    return make_learner(network, config)


def drawn_positions() -> torch.Tensor:
    """Sixteen alive positions with duplicates, whose windows fit in lane 0 or 1 of `filled_ring(TINY)`."""
    ring = filled_ring(TINY)
    alive = (~ring.done).view(-1).nonzero().view(-1)
    alive = alive[(alive % 40 >= 3) & (alive % 40 < 30)]
    return alive[torch.tensor([0, 3, 3, 5, 8, 8, 8, 11, 13, 17, 21, 21, 25, 30, 33, 36])]
