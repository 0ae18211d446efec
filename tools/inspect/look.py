"""Look at what a run's network sees and is taught, at its newest checkpoint. Changes nothing of the run, which may be training.

    python -m tools.inspect.look runs/Pong-v5_efficientzero_seed0
    python -m tools.inspect.look RUN_DIR --positions 4 --at 0:120 3:7      # lane:slot, besides those drawn

Prints what is true of the whole run, one line each with a verdict (ok, look, BAD), and a table for each position: half of them drawn by
priority as an update draws, half where a reward or an end lies in the window. Writes what the network sees of them to DIR/look.png:
pictures.py says how to read it. Exits with 1 if a verdict is BAD.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from speedyzero.batch import Batch, draw, gather_batch
from speedyzero.config import ConfigError, pick_device
from speedyzero.envs import EnvError
from speedyzero.ring import eligible
from speedyzero.run.checkpoint import CheckpointError
from speedyzero.state import State
from tools.inspect.findings import copies, network_findings, ring_findings, target_findings, unrolled
from tools.inspect.load_run import load_run
from tools.inspect.pictures import picture, write_png
from tools.inspect.reference_targets import Raw

MOST_CHECKED = 256
"""Positions behind the verdicts on losses and predictions."""
MOST_PLAYED_THROUGH = 64
"""Positions worked out by hand."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="look", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--positions", type=int, default=16, help="how many to draw")
    parser.add_argument("--at", nargs="+", default=[], metavar="LANE:SLOT", help="further positions")
    parser.add_argument("--out", type=Path, default=None, help="folder of look.png; default: the current one")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--device", default="cpu", choices=("auto", "cpu", "cuda"), help="default: cpu, as the GPU is the run's")
    return parser.parse_args()


def named(places: list[str], state: State) -> list[int]:
    """Flat indices of LANE:SLOT. Raises ConfigError on what is not one, or was never written."""
    found = []
    for place in places:
        lane, colon, slot = place.partition(":")
        if not (colon and lane.isdecimal() and slot.isdecimal()):
            raise ConfigError(f"--at {place}: give LANE:SLOT, as 0:120")
        most = min(int(state.ring.head), state.ring.slots)
        if int(lane) >= state.ring.lanes or int(slot) >= most:
            raise ConfigError(f"--at {place}: there are lanes 0 to {state.ring.lanes - 1} and slots 0 to {most - 1}")
        found.append(int(lane) * state.ring.slots + int(slot))
    return found


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
    some = near.view(-1).nonzero()[:, 0].cpu()
    chosen = some[torch.randperm(some.shape[0], generator=generator)[: count // 2]]
    drawn, _ = draw(ring, allowed, replace(config, batch_size=count), state.updates, generator)
    return torch.cat((chosen.to(state.device), drawn))[:count]


def anywhere(state: State, count: int, generator: torch.Generator) -> Tensor:
    """Flat indices of at most `count` eligible positions, all alike."""
    every = eligible(state.ring, state.config).view(-1).nonzero()[:, 0]
    return every[torch.randperm(every.shape[0], generator=generator)[:count].to(every.device)]


def batches(state: State, index: Tensor, generator: torch.Generator) -> tuple[Batch, Batch]:
    """What an update learns from at `index`: augmented as it would be, and not."""
    weights = torch.ones(index.shape[0], device=state.device)
    plain = replace(state.config, augment=False)
    normalisation = state.learner.network.normalisation
    return tuple(
        gather_batch(state.ring, index, weights, config, generator, normalisation=normalisation) for config in (state.config, plain)
    )


def numbers(row: Tensor) -> str:
    return "[" + " ".join(f"{x:.2f}" for x in row.tolist()) + "]"


def print_positions(state: State, index: Tensor, plain: Batch) -> None:
    """A table for each position, a line for each step of its window."""
    ring, goal, raw = state.ring, plain.targets, Raw(state.ring, state.config)
    values, prefixes, logits = (x.cpu() for x in unrolled(copies(state)[2], plain.observation, goal.action, state.config.lstm_horizon))
    policies = logits.softmax(2)
    allowed = eligible(ring, state.config).view(-1)
    for row, flat in enumerate(index.tolist()):
        lane, slot = divmod(flat, ring.slots)
        print(f"\nposition {row}: lane {lane}, slot {slot}, {int(ring.age()[slot])} steps old, n = {raw.n(slot)}, priority "
              f"{float(ring.priority[lane, slot]):.3g}{'' if ring.measured[lane, slot] else ' (inherited)'}"
              f"{'' if allowed[flat] else ', NOT eligible'}")  # fmt: skip
        print("  k slot  reward(raw)  f d  act  mask    z = rewards + bootstrap  v now  v cached  root  prefix:target now  refreshed  "
              "policy: target, now")  # fmt: skip
        for k, step in enumerate(raw.window(lane, slot)):
            at = (lane, step.slot)
            prefix = f"{float(goal.prefix[row, k - 1]):6.2f} {float(prefixes[row, k - 1]):6.2f}" if k else " " * 13
            act = int(goal.action[row, k]) if k < state.config.unroll else int(ring.action[at])
            print(f"  {k} {step.slot:4d} {float(ring.reward[at]):6.2f}({float(ring.raw_reward[at]):g})".ljust(22)
                  + f"{'f' if ring.first[at] else '-'} {'d' if ring.done[at] else '-'}  {act:3d}   "
                  f"{int(goal.mask[row, k])} {int(goal.policy_mask[row, k])} {float(goal.value[row, k]):8.3f} = {step.rewards:6.3f} + "
                  f"{step.bootstrap:6.3f}  {float(values[row, k]):7.3f} {float(ring.value[at]):7.3f} {float(ring.root_value[at]):7.3f}    "
                  f"{prefix}   {int(ring.refreshed_at[at]):6d}   {numbers(goal.policy[row, k])} {numbers(policies[row, k])}")  # fmt: skip


def stacked(batch: Batch, steps: int) -> Tensor:
    """[M, K + 1, planes, H, W] on the host: the observations and their futures."""
    return torch.cat((batch.observation[:, None], batch.future.unflatten(0, (-1, steps))), 1).float().cpu()


def main() -> None:
    options = arguments()
    try:
        if options.positions < 1:
            raise ConfigError(f"--positions {options.positions}: must be at least 1")
        out = options.out or Path()
        if not out.is_dir():
            raise ConfigError(f"--out {out}: not a folder; make it first")
        device = pick_device(options.device)
        state, path = load_run(options.run_dir, device, amp=False)
        generator = torch.Generator(device).manual_seed(options.seed)
        index = torch.cat((positions(state, options.positions, generator),
                           torch.tensor(named(options.at, state), dtype=torch.int64, device=device)))  # fmt: skip
    except (ConfigError, EnvError, CheckpointError) as error:
        sys.exit(f"error: {error}")
    torch.set_num_threads(state.config.threads)
    print(f"{path}: {state.config.env}, {int(state.updates)} updates")
    batch, plain = batches(state, index, generator)
    many = anywhere(state, MOST_CHECKED, generator)
    many_batch, many_plain = batches(state, many, generator)
    checked = torch.cat((index, many))[:MOST_PLAYED_THROUGH]
    found = ring_findings(state) + target_findings(state, checked, *batches(state, checked, generator))
    found += network_findings(state, many_batch, many_plain)
    print("\n".join(map(str, found)))
    print_positions(state, index, plain)
    try:
        pixels = state.spec.image and not state.config.normalize_frames
        seen, taught = (stacked(one, state.config.unroll) for one in (plain, batch))
        write_png(out / "look.png", picture(seen, taught, state.config.frame_stack, pixels))
    except OSError as error:
        sys.exit(f"error: --out: {error.strerror or error} ({error.filename}); make it writable, or give another folder")
    print(f"\nwhat the network sees of them: {out / 'look.png'}")
    sys.exit(any(finding.verdict == "BAD" for finding in found))


if __name__ == "__main__":
    main()
