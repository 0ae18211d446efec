"""The replay ring, on the device: every frame once, with the search results and priorities cached beside it (step 1, ingest).

In the shapes `L` is lanes, `T` slots of a lane, `A` actions. Every lane writes slot `head % T` in lockstep. A slot holds a frame and
what came with it: `reward` is the one received on arriving at the frame, `done` says that the frame is terminal (a dead slot: it is
never acted from), `first` that it opens an episode. `action`, `policy`, the values and the priority belong to the decision made there.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from speedyzero.config import Config


@dataclass
class Ring:
    """The tensors of the ring; all are written in place."""

    frames: Tensor
    """[L, T, C, H, W] uint8 pixels or float32."""
    action: Tensor
    """[L, T] int64."""
    reward: Tensor
    """[L, T] float32, clipped if the config says so."""
    raw_reward: Tensor
    """[L, T] float32."""
    done: Tensor
    """[L, T] bool."""
    first: Tensor
    """[L, T] bool."""
    policy: Tensor
    """[L, T, A] float16, of the last search; zero before."""
    value: Tensor
    """[L, T] float32, the snapshot's; zero in dead slots."""
    root_value: Tensor
    """[L, T] float32, the search's; zero in dead slots."""
    priority: Tensor
    """[L, T] float32; zero in dead slots."""
    measured: Tensor
    """[L, T] bool, whether the priority is an error that was measured; new slots only inherit one."""
    refreshed_at: Tensor
    """[L, T] int32, updates done at the last search of the slot; -1: never searched."""
    head: Tensor
    """[] int64, slots written so far in each lane."""
    cursor: Tensor
    """[] int64, the next position of the sweep of searches, counted as step x L + lane."""
    value_cursor: Tensor
    """[] int64, the same of the sweep of values."""

    @property
    def lanes(self) -> int:
        return self.frames.shape[0]

    @property
    def slots(self) -> int:
        return self.frames.shape[1]

    def newest(self) -> Tensor:
        """Flat indices [L] of the newest slot of every lane."""
        lanes = torch.arange(self.lanes, device=self.head.device)
        return lanes * self.slots + (self.head - 1) % self.slots

    def age(self) -> Tensor:
        """Age of each slot in steps [T] int64, 0 for the newest; meaningless for slots never written."""
        return (self.head - 1 - torch.arange(self.slots, device=self.head.device)) % self.slots


def ring_bytes(lanes: int, slots: int, frame_shape: tuple[int, ...], frame_dtype: torch.dtype, num_actions: int) -> int:
    """Bytes that `allocate` will take."""
    one = tensors(allocate(1, 1, frame_shape, frame_dtype, num_actions, torch.device("meta"))).values()
    return sum(tensor.nbytes * (lanes * slots if tensor.dim() else 1) for tensor in one)


def allocate(
    lanes: int, slots: int, frame_shape: tuple[int, ...], frame_dtype: torch.dtype, num_actions: int, device: torch.device
) -> Ring:
    """An empty ring."""

    def zeros(dtype: torch.dtype, *more: int) -> Tensor:
        return torch.zeros(lanes, slots, *more, dtype=dtype, device=device)

    counts = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(3)]
    return Ring(
        frames=zeros(frame_dtype, *frame_shape), action=zeros(torch.int64),
        reward=zeros(torch.float32), raw_reward=zeros(torch.float32), done=zeros(torch.bool), first=zeros(torch.bool),
        policy=zeros(torch.float16, num_actions), value=zeros(torch.float32), root_value=zeros(torch.float32),
        priority=zeros(torch.float32), measured=zeros(torch.bool),
        refreshed_at=torch.full((lanes, slots), -1, dtype=torch.int32, device=device),
        head=counts[0], cursor=counts[1], value_cursor=counts[2],
    )  # fmt: skip


@dataclass
class Inbox:
    """What the emulators said last, on the device; filled from their pinned buffers."""

    frames: Tensor
    """[L, C, H, W], the ring's dtype."""
    reward: Tensor
    """[L] float32, raw."""
    done: Tensor
    """[L] bool."""
    first: Tensor
    """[L] bool."""


def ingest(ring: Ring, inbox: Inbox, clip_reward: bool) -> None:
    """Step 1: write the inbox into the next slot of every lane.

    A new slot gets the greatest priority measured in the buffer as it stands (1 while there is none), a dead one 0. What the slot's last
    lap had cached is cleared.
    """
    slot = (ring.head % ring.slots).view(1)
    greatest = torch.where(ring.measured, ring.priority, 0.0).max()
    priority = torch.where(greatest > 0, greatest, 1.0).expand_as(inbox.reward)
    reward = torch.sign(inbox.reward) if clip_reward else inbox.reward
    zero = torch.zeros_like(reward)
    written = {
        "frames": inbox.frames,
        "action": torch.zeros_like(inbox.done, dtype=torch.int64),
        "reward": reward,
        "raw_reward": inbox.reward,
        "done": inbox.done,
        "first": inbox.first,
        "policy": torch.zeros_like(ring.policy[:, 0]),
        "value": zero,
        "root_value": zero,
        "priority": torch.where(inbox.done, zero, priority),
        "measured": torch.zeros_like(inbox.done),
        "refreshed_at": torch.full_like(inbox.done, -1, dtype=torch.int32),
    }
    for name, value in written.items():
        getattr(ring, name).index_copy_(1, slot, value.unsqueeze(1))
    ring.head += 1


def eligible(ring: Ring, config: Config) -> Tensor:
    """Which positions may be sampled: [L, T] bool.

    A position is eligible once its K unroll and n bootstrap slots exist and every one of them, itself included, has been searched or
    is dead; under `sampled` refresh existing is enough, since the whole window is searched before it is learned from. Dead slots and
    slots whose stacked frames were overwritten are not eligible.
    """
    age = ring.age()
    oldest = torch.where(ring.head > ring.slots, ring.slots - config.frame_stack + 1, ring.head)
    exists = (age >= config.window - 1) & (age < oldest)
    allowed = exists & ~ring.done
    if config.refresh == "sampled":
        return allowed
    missing = ((ring.refreshed_at < 0) & ~ring.done).to(torch.int32)
    around = torch.cat((missing, missing[:, : config.window]), dim=1).cumsum(1)
    before = around[:, : ring.slots] - missing
    return allowed & (around[:, config.window - 1 : config.window - 1 + ring.slots] == before)


def tensors(ring: Ring) -> dict[str, Tensor]:
    """Every tensor of the ring by name."""
    return {field.name: getattr(ring, field.name) for field in dataclasses.fields(ring)}
