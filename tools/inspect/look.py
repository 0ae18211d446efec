"""Look at what a run's network sees and is taught, at its newest checkpoint. Changes nothing of the run, which may be training: on
the CPU, as the GPU is the run's.

    python -m tools.inspect.look runs/Pong-v5_efficientzero_seed0
    python -m tools.inspect.look RUN_DIR --positions 4 --seed 1 --out pictures

Prints what is true of the run, one line each with a verdict (ok, look, BAD), and a table for each position: half of them drawn by
priority as an update draws, half where a reward or an end lies in the window. Writes what the network sees of them to DIR/look.png:
pictures.py says how to read it. Exits with 1 if a verdict is BAD.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from PIL import Image
from torch import Tensor

from speedyzero.batch import Batch, draw, gather_batch
from speedyzero.config import Config, ConfigError
from speedyzero.envs import EnvError
from speedyzero.refresh import bootstrap, n_steps
from speedyzero.ring import Ring, eligible
from speedyzero.run.checkpoint import CheckpointError
from speedyzero.state import State
from speedyzero_kernels.support import to_scalar
from tools.inspect.findings import copies, network_findings, ring_findings, stacked, unrolled
from tools.inspect.load_run import load_run
from tools.inspect.pictures import picture

MOST_CHECKED = 256
"""Positions behind the verdicts on losses and predictions."""


@dataclass
class Arguments:
    """Look at what a run's network sees and is taught, at its newest checkpoint."""

    run_dir: tyro.conf.Positional[Path]
    """Folder of the run."""
    positions: int = 16
    """How many to draw."""
    out: Path = Path()
    """Folder of look.png."""
    seed: int = 0
    """Of what is drawn."""


def positions(state: State, count: int, generator: torch.Generator) -> Tensor:
    """Flat indices of `count` eligible positions: half by priority, half with a reward or an end in their window, if there are such.

    Raises:
        ConfigError: none is eligible yet.
    """
    ring, config = state.ring, state.config
    allowed = eligible(ring, config)
    if not allowed.any():
        raise ConfigError(f"{config.run_dir}: no position can be learned from yet; wait for the first sweep after the random start")
    eventful = (ring.reward != 0) | ring.done
    near = torch.stack([eventful.roll(-k, 1) for k in range(1, config.unroll + 1)]).any(0) & allowed
    drawn, _ = draw(ring, allowed, replace(config, batch_size=count), state.updates, generator)
    return torch.cat((_some(near, count // 2, generator), drawn))[:count]


def anywhere(state: State, count: int, generator: torch.Generator) -> Tensor:
    """Flat indices of at most `count` eligible positions, all alike."""
    return _some(eligible(state.ring, state.config), count, generator)


def _some(allowed: Tensor, count: int, generator: torch.Generator) -> Tensor:
    every = allowed.view(-1).nonzero()[:, 0]
    return every[torch.randperm(every.shape[0], generator=generator, device=generator.device)[:count]]


def batches(state: State, index: Tensor, generator: torch.Generator) -> tuple[Batch, Batch]:
    """What an update learns from at `index`: augmented as it would be, and not."""
    weights, normalisation = torch.ones(index.shape[0], device=state.device), state.learner.network.normalisation
    plain = replace(state.config, augment=False)
    return tuple(
        gather_batch(state.ring, index, weights, config, generator, normalisation=normalisation) for config in (state.config, plain)
    )


def value_parts(ring: Ring, config: Config, lane: int, slot: int, n: int) -> tuple[float, float]:
    """What the value target of a position with `n` steps adds up: the rewards, and the bootstrap value, both discounted."""
    rewards = 0.0
    for i in range(1, n + 1):
        at = lane, (slot + i) % ring.slots
        rewards += config.discount ** (i - 1) * float(ring.reward[at])
        if ring.done[at]:
            return rewards, 0.0
    return rewards, config.discount**n * float(bootstrap(ring, config)[at])


def numbers(row: Tensor) -> str:
    return "[" + " ".join(f"{x:.2f}" for x in row.tolist()) + "]"


def print_positions(state: State, index: Tensor, plain: Batch) -> None:
    """A table for each position, a line for each step of its window."""
    ring, config, goal = state.ring, state.config, plain.targets
    values, prefixes, logits = (x.cpu() for x in unrolled(copies(state)[2], plain.observation, goal.action, config.lstm_horizon))
    prefixes, policies = to_scalar(prefixes), logits.softmax(2)
    for row, (flat, n) in enumerate(zip(index.tolist(), n_steps(ring, index, config).tolist(), strict=True)):
        lane, slot = divmod(flat, ring.slots)
        print(f"\nposition {row}: lane {lane}, slot {slot}, {int(ring.age()[slot])} steps old, n = {n}, priority "
              f"{float(ring.priority[lane, slot]):.3g}{'' if ring.measured[lane, slot] else ' (inherited)'}")  # fmt: skip
        print("  k slot  reward(raw)  f d  act  mask    z = rewards + bootstrap  v now  v cached  root  prefix:target now  refreshed  "
              "policy: target, now")  # fmt: skip
        for k in range(config.unroll + 1):
            at = lane, (slot + k) % ring.slots
            rewards, value = value_parts(ring, config, *at, n) if goal.policy_mask[row, k] else (0.0, 0.0)
            prefix = f"{float(goal.prefix[row, k - 1]):6.2f} {float(prefixes[row, k - 1]):6.2f}" if k else " " * 13
            print(f"  {k} {at[1]:4d} {float(ring.reward[at]):6.2f}({float(ring.raw_reward[at]):g})".ljust(22)
                  + f"{'f' if ring.first[at] else '-'} {'d' if ring.done[at] else '-'}  {int(ring.action[at]):3d}   "
                  f"{int(goal.mask[row, k])} {int(goal.policy_mask[row, k])} {float(goal.value[row, k]):8.3f} = {rewards:6.3f} + "
                  f"{value:6.3f}  {float(values[row, k]):7.3f} {float(ring.value[at]):7.3f} {float(ring.root_value[at]):7.3f}    "
                  f"{prefix}   {int(ring.refreshed_at[at]):6d}   {numbers(goal.policy[row, k])} {numbers(policies[row, k])}")  # fmt: skip


def main() -> None:
    options = tyro.cli(Arguments, prog="look")
    try:
        if options.positions < 1:
            raise ConfigError(f"--positions {options.positions}: must be at least 1")
        if not options.out.is_dir():
            raise ConfigError(f"--out {options.out}: not a folder; make it first")
        state, path = load_run(options.run_dir, torch.device("cpu"), amp=False)
        generator = torch.Generator().manual_seed(options.seed)
        index = positions(state, options.positions, generator)
    except (ConfigError, EnvError, CheckpointError) as error:
        sys.exit(f"error: {error}")
    torch.set_num_threads(state.config.threads)
    print(f"{path}: {state.config.env}, {int(state.updates)} updates")
    batch, plain = batches(state, index, generator)
    many = anywhere(state, MOST_CHECKED, generator)
    found = ring_findings(state) + network_findings(state, *batches(state, many, generator))
    print("\n".join(map(str, found)))
    print_positions(state, index, plain)
    seen, taught = (stacked(one, state.config.unroll) for one in (plain, batch))
    image = Image.fromarray(picture(seen, taught, state.config.frame_stack, state.spec.image and not state.config.normalize_frames).numpy())
    larger = max(1, 40 // max(seen.shape[3:]))  # a board of a few cells
    try:
        image.resize((image.width * larger, image.height * larger), Image.Resampling.NEAREST).save(options.out / "look.png")
    except OSError as error:
        sys.exit(f"error: --out: {error.strerror or error} ({error.filename}); make it writable, or give another folder")
    print(f"\nwhat the network sees of them: {options.out / 'look.png'}")
    sys.exit(any(finding.verdict == "BAD" for finding in found))


if __name__ == "__main__":
    main()
