"""PPO on Atari as CleanRL's `ppo_atari_envpool` does it: the peer that BENCHMARKS.md compares environment steps and wall-clock with.

Our own code after the published settings (Huang et al., "The 37 Implementation Details of Proximal Policy Optimization", ICLR blog
track 2022; CleanRL's defaults for EnvPool): 8 environments, 128 steps a rollout, 4 epochs of 4 minibatches, Adam 2.5e-4 annealed to 0,
clip 0.1, entropy 0.01, value 0.5, GAE 0.95, discount 0.99, gray 84x84 stacks of 4, lives as episodes, rewards clipped.

    python -m tools.peers.ppo --env Pong-v5 --out DIR [--steps 10000000] [--target 15]

Writes DIR/metrics.jsonl: environment steps, seconds, mean raw return of the last 32 games. Stops at --target.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections import deque
from pathlib import Path

import envpool
import numpy as np
import torch
import tyro
from torch import Tensor, nn

from speedyzero.processor import keep_memory


@dataclasses.dataclass
class Arguments:
    """PPO on one Atari game."""

    out: Path
    """Folder of the results; made."""
    env: str = "Pong-v5"
    """EnvPool id."""
    seed: int = 1
    """Seed of the network, the actions and the emulators."""
    steps: int = 10_000_000
    """Environment steps; the learning rate falls to 0 over them."""
    target: float = float("inf")
    """Mean return of 32 games at which to stop."""
    threads: int = 2
    """PyTorch's CPU threads."""
    lanes: int = 8
    """Environments stepped side by side."""
    rollout: int = 128
    """Steps of each lane between two updates."""
    log_interval: int = 10
    """Updates between two rows."""


def advantages(
    rewards: Tensor, values: Tensor, done: Tensor, following: Tensor, discount: float = 0.99, decay: float = 0.95
) -> Tensor:
    """Generalised advantage estimates [T, L] (Schulman et al., 2016).

    rewards, values, done: [T, L] float32; `done[t]` says that the episode ended with the reward of step t. following: [L], the value of
    what comes after the last step.
    """
    result, last = torch.zeros_like(rewards), torch.zeros_like(following)
    for t in reversed(range(len(rewards))):
        alive = 1 - done[t]
        after = following if t == len(rewards) - 1 else values[t + 1]
        last = rewards[t] + discount * after * alive - values[t] + discount * decay * alive * last
        result[t] = last
    return result


class Agent(nn.Module):
    """The network of Mnih et al. (2015) with a policy and a value: [B, 4, 84, 84] uint8 -> logits [B, A], value [B]."""

    def __init__(self, actions: int):
        super().__init__()

        def layer(module: nn.Module, gain: float = 2**0.5) -> nn.Module:
            nn.init.orthogonal_(module.weight, gain)
            nn.init.zeros_(module.bias)
            return module

        self.body = nn.Sequential(
            layer(nn.Conv2d(4, 32, 8, 4)), nn.ReLU(), layer(nn.Conv2d(32, 64, 4, 2)), nn.ReLU(), layer(nn.Conv2d(64, 64, 3, 1)), nn.ReLU(),
            nn.Flatten(), layer(nn.Linear(64 * 7 * 7, 512)), nn.ReLU(),
        )  # fmt: skip
        self.policy, self.value = layer(nn.Linear(512, actions), 0.01), layer(nn.Linear(512, 1), 1.0)

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body((observation.float() / 255).contiguous(memory_format=torch.channels_last))
        return self.policy(x), self.value(x).squeeze(1)


def main() -> None:
    a = tyro.cli(Arguments)
    keep_memory()
    torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    a.out.mkdir(parents=True)
    envs = envpool.make(
        a.env, env_type="gymnasium", num_envs=a.lanes, seed=a.seed, episodic_life=True, reward_clip=False, repeat_action_probability=0.0
    )
    agent = Agent(envs.action_space.n).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(agent.parameters(), lr=2.5e-4, eps=1e-5)
    shape = (a.rollout, a.lanes)
    observations = torch.zeros(*shape, 4, 84, 84, dtype=torch.uint8)
    actions, logprobs, rewards, dones, values = torch.zeros(shape, dtype=torch.int64), *(torch.zeros(shape) for _ in range(4))
    games: deque[float] = deque(maxlen=32)
    returns = np.zeros(a.lanes)
    observation = torch.from_numpy(envs.reset()[0])
    batch, begin = a.rollout * a.lanes, time.monotonic()
    with open(a.out / "metrics.jsonl", "w") as log:
        for update in range(1, a.steps // batch + 1):
            optimizer.param_groups[0]["lr"] = 2.5e-4 * (1 - (update - 1) * batch / a.steps)
            for t in range(a.rollout):
                observations[t] = observation
                with torch.no_grad():
                    logits, values[t] = agent(observation)
                policy = torch.distributions.Categorical(logits=logits)
                actions[t] = policy.sample()
                logprobs[t] = policy.log_prob(actions[t])
                raw, reward, terminated, truncated, info = envs.step(actions[t].numpy())
                observation, dones[t] = torch.from_numpy(raw), torch.from_numpy((terminated | truncated).astype(np.float32))
                rewards[t] = torch.from_numpy(np.sign(reward))
                returns += info["reward"]
                for lane in np.flatnonzero(info["terminated"].astype(bool) | truncated):
                    games.append(float(returns[lane]))
                    returns[lane] = 0
            with torch.no_grad():
                following = agent(observation)[1]
            gains = advantages(rewards, values, dones, following)
            targets = gains + values
            flat = [x.flatten(0, 1) for x in (observations, actions, logprobs, gains, targets, values)]
            for _ in range(4):
                for index in torch.randperm(batch).split(batch // 4):
                    o, act, old, adv, target, value_then = (x[index] for x in flat)
                    logits, value = agent(o)
                    policy = torch.distributions.Categorical(logits=logits)
                    ratio = (policy.log_prob(act) - old).exp()
                    adv = (adv - adv.mean()) / (adv.std() + 1e-8)
                    surrogate = torch.minimum(adv * ratio, adv * ratio.clamp(0.9, 1.1)).mean()
                    clipped = value_then + (value - value_then).clamp(-0.1, 0.1)
                    value_loss = 0.5 * torch.maximum((value - target) ** 2, (clipped - target) ** 2).mean()
                    loss = -surrogate - 0.01 * policy.entropy().mean() + 0.5 * value_loss
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                    optimizer.step()
            if update % a.log_interval == 0:
                mean = float(np.mean(games)) if games else None
                row = {"env_steps": update * batch, "wall_s": round(time.monotonic() - begin, 1), "charts/episodic_return": mean}
                print(json.dumps(row), flush=True)
                log.write(json.dumps(row) + "\n")
                log.flush()
                if len(games) == games.maxlen and mean >= a.target:
                    return


if __name__ == "__main__":
    main()
