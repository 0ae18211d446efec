"""Learning targets out of the ring: n-step values, value prefixes, policies and masks of K + 1 positions (step 5).

Value z_t = sum of n discounted rewards + discount^n v(s_{t+n}) (MuZero, Schrittwieser et al. 2020, section 3; n chosen
per sample as EfficientZero's off-policy correction, Ye et al. 2021, section 4.3); the prefix is the undiscounted
running sum of rewards, restarted every `horizon` steps (EfficientZero, section 4.2).

The ring: slot t of a lane holds frame t; reward[t] came ON ARRIVING at frame t; done[t] says that frame t is terminal
(a dead slot; the next one is the reset frame, with reward 0); action[t] and policy[t] were chosen at frame t; value[t]
is its bootstrap value. `L` lanes, `T` slots, `M` samples, `K` unroll steps, `A` actions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, eq=False)
class Targets:
    """What the loss compares with. Entries that a mask leaves out are 0.

    value: [M, K + 1] f32, z at positions t..t+K; 0 at a terminal one.
    prefix: [M, K] f32, entry k - 1 for step k: rewards since the last multiple of `horizon` below k.
    policy: [M, K + 1, A] f32, search policy.
    action: [M, K] int64, entry k leads from position k to k + 1; 0 where position k is terminal or left out.
    mask: [M, K + 1] f32, 1 iff no done lies in t..t+k-1: value k and prefix k count (the terminal position included).
    policy_mask: [M, K + 1] f32, the mask, and position k itself is not terminal.
    """

    value: Tensor
    prefix: Tensor
    policy: Tensor
    action: Tensor
    mask: Tensor
    policy_mask: Tensor


def targets(
    reward: Tensor,
    done: Tensor,
    value: Tensor,
    policy: Tensor,
    action: Tensor,
    index: Tensor,
    n: Tensor,
    unroll: int,
    n_max: int,
    discount: float,
    horizon: int,
) -> Targets:
    """Gather the targets of M windows, wrapping modulo T.

    reward, value: [L, T] f32. done: [L, T] bool. policy: [L, T, A] f16 or f32. action: [L, T] int64. All contiguous.
    index: [M] int64, flat (lane * T + slot). n: [M] int64 in 1..n_max, bootstrap steps of each sample.
    unroll: K >= 0. n_max: bound of n. discount: per step. horizon: steps between restarts of the prefix.

    The window is slots t..t+K+n_max; a sane caller has T > K + n_max and no window across the ring's head. Entries past
    a done or past n are not read into any sum, so they may hold anything, NaN included.

    Raises ValueError for a wrong shape, dtype or device, a ring tensor that is not contiguous, unroll < 0, n_max < 1 or
    horizon < 1. Bytes moved: per sample 9 (K + n_max + 1) of ring, (K + 1) policy rows and K actions read, the targets
    written.
    """
    _check(reward, done, value, policy, action, index, n)
    for name, number, least in (("unroll", unroll, 0), ("n_max", n_max, 1), ("horizon", horizon, 1)):
        if number < least:
            raise ValueError(f"{name}: must be at least {least}, got {number}")
    slots, positions, window = reward.shape[1], unroll + 1, unroll + n_max + 1
    count = index.shape[0]

    offset = torch.arange(window, device=index.device)
    slot = index.remainder(slots)[:, None]
    flat = (index[:, None] - slot) + (slot + offset).remainder_(slots)  # [M, window]
    alive = done.view(-1)[flat].cumsum(1) == 0  # no done up to and including this slot: it bootstraps and has a policy
    arrived = functional.pad(alive[:, :-1], (1, 0), value=True)  # no done before this slot: its reward is real
    rewards = torch.where(arrived, reward.view(-1)[flat], 0)
    values = torch.where(alive, value.view(-1)[flat], 0)

    steps = offset[:n_max]
    decay = torch.where(steps < n[:, None], torch.pow(discount, steps), 0)  # [M, n_max]
    returns = (torch.where(decay[:, None] != 0, rewards[:, 1:].unfold(1, n_max, 1), 0) * decay[:, None]).sum(2)
    bootstrap = values.gather(1, n[:, None] + offset[:positions]) * torch.pow(discount, n)[:, None]

    block = min(horizon, max(unroll, 1))
    spare = -unroll % block
    prefix = functional.pad(rewards[:, 1:positions], (0, spare)).view(count, (unroll + spare) // block, block)
    prefix = prefix.cumsum(2).view(count, unroll + spare)[:, :unroll]

    mask, live = arrived[:, :positions], alive[:, :positions]
    here = flat[:, :positions]
    return Targets(
        value=returns + bootstrap,  # past a done every term is 0 already
        prefix=torch.where(mask[:, 1:], prefix, 0),
        policy=torch.where(live[:, :, None], policy.view(-1, policy.shape[2])[here].float(), 0),
        action=torch.where(live[:, :unroll], action.view(-1)[here[:, :unroll]], 0),
        mask=mask.float(),
        policy_mask=live.float(),
    )


def _check(reward, done, value, policy, action, index, n) -> None:
    for name, x, dims, dtypes in (
        ("reward", reward, 2, (torch.float32,)),
        ("done", done, 2, (torch.bool,)),
        ("value", value, 2, (torch.float32,)),
        ("policy", policy, 3, (torch.float16, torch.float32)),
        ("action", action, 2, (torch.int64,)),
    ):
        if x.ndim != dims or x.dtype not in dtypes or x.shape[:2] != reward.shape:
            want = f"[L, T{', A' if dims == 3 else ''}] {' or '.join(map(str, dtypes))} as reward {tuple(reward.shape)}"
            raise ValueError(f"{name}: got {x.dtype} {tuple(x.shape)}, expected {want}")
        if not x.is_contiguous():
            raise ValueError(f"{name}: must be contiguous")
    for name, x in (("index", index), ("n", n)):
        if x.ndim != 1 or x.dtype != torch.int64 or x.shape != index.shape:
            raise ValueError(f"{name}: must be int64 [M], got {x.dtype} {tuple(x.shape)}")
    for name, x in dict(done=done, value=value, policy=policy, action=action, index=index, n=n).items():
        if x.device != reward.device:
            raise ValueError(f"{name}: on {x.device}, but reward is on {reward.device}")
