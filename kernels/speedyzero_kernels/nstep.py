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
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from . import checks, dispatch


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


def targets_reference(
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
    """`targets` in plain PyTorch: every window is gathered, then summed."""
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


@triton.jit(do_not_specialize=["samples", "slots", "unroll", "n_max", "horizon", "actions"])
def _targets_kernel(
    reward, done, value, policy, action, index, n,
    value_out, prefix_out, policy_out, action_out, mask_out, policy_mask_out,
    samples, slots, unroll, n_max, discount, horizon, actions,
    SAMPLES: tl.constexpr, WINDOW: tl.constexpr, POSITIONS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """SAMPLES samples a program; the tiles are [SAMPLES, window slots], [SAMPLES, positions] and [SAMPLES, policy entries]."""
    sample = tl.program_id(0) * SAMPLES + tl.arange(0, SAMPLES)[:, None]
    real = sample < samples
    at = tl.load(index + sample, mask=real, other=0)
    slot = (at % slots).to(tl.int32)
    lane = at - slot  # int64, the flat index of the lane's first slot
    steps = tl.load(n + sample, mask=real, other=1).to(tl.int32)
    steps = tl.minimum(tl.maximum(steps, 0), n_max)  # whatever it holds, no read is outside the lane

    # Value and action are read before it is known where the episode ends, which saves a wait for memory.
    k = tl.arange(0, POSITIONS)[None, :]
    inside = real & (k <= unroll)
    later = k + steps
    bootstrap = tl.load(value + lane + (slot + later) % slots, mask=inside, other=0.0)
    chosen = tl.load(action + lane + (slot + k) % slots, mask=inside & (k < unroll), other=0)
    window = tl.arange(0, WINDOW)[None, :]
    over = tl.load(done + lane + (slot + window) % slots, mask=real & (window <= unroll + n_max), other=0) != 0
    end = tl.min(tl.where(over, window, WINDOW), 1)[:, None]  # of the window, where the episode ends: no reward is later, no value at it

    power = tl.full([SAMPLES, 1], 1.0, tl.float64)
    returns = tl.zeros([SAMPLES, POSITIONS], tl.float32)
    for i in range(1, n_max + 1):
        decay = power.to(tl.float32)
        counts = inside & (i <= steps) & (k + i <= end) & (decay != 0)
        returns += decay * tl.load(reward + lane + (slot + k + i) % slots, mask=counts, other=0.0)
        power = tl.where(i <= steps, power * discount, power)
    prefix = tl.zeros([SAMPLES, POSITIONS], tl.float32)
    for i in range(0, tl.minimum(horizon, unroll)):  # the reward i before k, if the prefix did not restart between them
        counts = inside & (k <= end) & (i <= (k - 1) % horizon) & (i < k)
        prefix += tl.load(reward + lane + (slot + k - i) % slots, mask=counts, other=0.0)

    row = sample.to(tl.int64) * (unroll + 1)
    tl.store(value_out + row + k, returns + tl.where(later < end, bootstrap, 0.0) * power.to(tl.float32), mask=inside)
    tl.store(mask_out + row + k, (k <= end).to(tl.float32), mask=inside)
    tl.store(policy_mask_out + row + k, (k < end).to(tl.float32), mask=inside)
    step = sample.to(tl.int64) * unroll
    tl.store(prefix_out + step + k - 1, prefix, mask=inside & (k > 0))
    tl.store(action_out + step + k, tl.where(k < end, chosen, 0), mask=inside & (k < unroll))

    for first in range(0, (unroll + 1) * actions, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)[None, :]
        position = entry // actions
        source = (lane + (slot + position) % slots) * actions + entry % actions
        held = real & (position <= unroll)
        chance = tl.load(policy + source, mask=held & (position < end), other=0.0)
        tl.store(policy_out + row * actions + entry, chance.to(tl.float32), mask=held)


def targets_kernel(
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
    """`targets` in one launch."""
    samples, actions = index.shape[0], policy.shape[2]
    out = Targets(
        value=torch.empty(samples, unroll + 1, dtype=torch.float32, device=index.device),
        prefix=torch.empty(samples, unroll, dtype=torch.float32, device=index.device),
        policy=torch.empty(samples, unroll + 1, actions, dtype=torch.float32, device=index.device),
        action=torch.empty(samples, unroll, dtype=torch.int64, device=index.device),
        mask=torch.empty(samples, unroll + 1, dtype=torch.float32, device=index.device),
        policy_mask=torch.empty(samples, unroll + 1, dtype=torch.float32, device=index.device),
    )
    # Few samples a program while that still leaves SMs idle; the bounds keep a program's tiles in its registers.
    window, positions = triton.next_power_of_2(unroll + n_max + 1), triton.next_power_of_2(unroll + 1)
    tile = min(32, max(2, triton.next_power_of_2(samples) // 512), 2048 // window)
    entries = min(triton.next_power_of_2((unroll + 1) * actions), 1024 // tile)
    _targets_kernel[(triton.cdiv(samples, tile),)](
        reward, done, value, policy, action, index, n, out.value, out.prefix, out.policy, out.action, out.mask, out.policy_mask,
        samples, reward.shape[1], unroll, n_max, float(discount), min(horizon, max(unroll, 1)), actions,
        SAMPLES=tile, WINDOW=window, POSITIONS=positions, ENTRIES=entries, num_warps=max(1, min(4, tile * max(window, entries) // 256)),
    )  # fmt: skip
    return out


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
    index: [M] int64, flat (lane * T + slot), 0 <= index < L * T. n: [M] int64 in 1..n_max, bootstrap steps of each sample.
    unroll: K, 0 to 256. n_max: bound of n, 1 to 256. discount: per step. horizon: steps between restarts of the prefix.

    The window is slots t..t+K+n_max; a sane caller has T > K + n_max and no window across the ring's head. Entries past
    a done or past n are not read into any sum, so they may hold anything, NaN included.

    Raises ValueError for a wrong shape, dtype or device, a tensor that is not contiguous, unroll, n_max or horizon out of range, more than
    1024 actions, or more than 2**30 slots. Bytes moved: per sample the index and n (16), 5 (K + n_max + 1) of ring, K + 1 values, K + 1
    policy rows and K actions read, the targets written.
    """
    checks.tensor("reward", reward, ("L", "T"), torch.float32)
    lanes, slots = reward.shape
    checks.at_most("reward", slots, 2**30)
    checks.tensor("done", done, (lanes, slots), torch.bool, reward.device)
    checks.tensor("value", value, (lanes, slots), torch.float32, reward.device)
    checks.tensor("policy", policy, (lanes, slots, "A"), (torch.float16, torch.float32), reward.device)
    checks.at_most("policy", policy.shape[2], 1024)
    checks.tensor("action", action, (lanes, slots), torch.int64, reward.device)
    checks.tensor("index", index, ("M",), torch.int64, reward.device)
    checks.tensor("n", n, (index.shape[0],), torch.int64, reward.device)
    for name, number, least in (("unroll", unroll, 0), ("n_max", n_max, 1)):
        checks.at_least(name, number, least)
        checks.at_most(name, number, 256)
    checks.at_least("horizon", horizon, 1)
    form = targets_kernel if dispatch.runs_kernel(reward) else targets_reference
    return form(reward, done, value, policy, action, index, n, unroll, n_max, discount, horizon)
