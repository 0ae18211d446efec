"""Whether a run's network can fit its targets: learn the same few positions of its newest checkpoint again and again.

    python -m tools.inspect.overfit runs/Pong-v5_efficientzero_seed0 --updates 300
    python -m tools.inspect.overfit RUN_DIR --fresh --no-augment --lr 0.05

The ring is frozen: no emulators, no search, no new targets. The network, the losses and the optimiser remain. Each loss is
compared with its floor, which follows from the targets (loss_floors.py), and with what a constant reaches; both in training mode, by the
batch's statistics, and in evaluation mode, by the running ones, as the snapshot would. Changes nothing of the run. If the losses fall
here and the run does not learn, it is the data, the search or the schedule; if they do not, it is the network or the optimiser.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor

from speedyzero import learn
from speedyzero.batch import gather_batch
from speedyzero.config import ConfigError, pick_device
from speedyzero.envs import EnvError
from speedyzero.optim import make_learner
from speedyzero.run.checkpoint import CheckpointError
from speedyzero.state import State, make_network
from tools.inspect.findings import LOSSES, loss_table
from tools.inspect.load_run import load_run
from tools.inspect.look import anywhere
from tools.inspect.loss_floors import Bounds

FITTED = 0.9
"""Share of the way from the constant's loss to the floor from which on a loss counts as fitted."""


@dataclass
class Arguments:
    """Learn the same few positions of a run's newest checkpoint again and again."""

    run_dir: tyro.conf.Positional[Path]
    """Folder of the run."""
    updates: int = 300
    """How often."""
    batch: int | None = None
    """How many positions; default: the run's batch."""
    fresh: bool = False
    """Begin with a new network, not with the run's."""
    lr: float | None = None
    """Constant; default: the run's after its warm-up."""
    augment: bool = True
    """Shift the frames and change their intensity, if the run does."""
    seed: int = 0
    """Of the positions, and of a new network."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """In bf16 on CUDA if the run's is, in fp32 on a CPU."""


def evaluated(state: State, index: Tensor, seed: int) -> dict[str, tuple[float, float, Bounds]]:
    """The losses at the positions `index`, see `loss_table`."""
    generator, weights = torch.Generator(state.device).manual_seed(seed), torch.ones(index.shape[0], device=state.device)
    return loss_table(
        state, gather_batch(state.ring, index, weights, state.config, generator, normalisation=state.learner.network.normalisation)
    )


def learn_again(state: State, index: Tensor, updates: int, seed: int) -> None:
    """Update the network `updates` times from the positions `index`."""
    generator, weights = torch.Generator(state.device).manual_seed(seed), torch.ones(index.shape[0], device=state.device)
    count = torch.zeros_like(state.updates)
    for update in range(1, updates + 1):
        metrics = learn.update(state.learner, state.ring, index, weights, count, state.config, generator)
        if update in (1, updates) or update % max(1, updates // 10) == 0:
            row = "  ".join(f"{name.removesuffix('_loss')} {float(metrics[f'losses/{name}']):.4f}" for name in LOSSES)
            print(f"update {update:5d}  {row}  grad_norm {float(metrics['train/grad_norm']):.3g}", flush=True)


def verdict(limit: Bounds, by_batch: float, running: float) -> str:
    """Whether a loss is fitted, and if not how far it is."""
    if limit.constant - limit.floor < 1e-6:
        return "nothing to learn: all targets are alike" if by_batch - limit.floor < 0.05 else "does NOT fit: not even a constant"
    share, alike = limit.learned(by_batch), limit.learned(running)
    text = "fits" if share >= FITTED else "fits in part" if share >= 0.5 else "does NOT fit"
    if share >= 0.5 and share - alike > 0.25:
        text += f"; only {alike:.0%} by the running statistics: BatchNorm has not caught up"
    return f"{text}, {share:.0%} of the way from a constant to the floor"


def main() -> None:
    options = tyro.cli(Arguments, prog="overfit")
    try:
        device = pick_device(options.device)
        for name, least in (("updates", 1), ("batch", 2)):
            if (value := getattr(options, name)) is not None and value < least:
                raise ConfigError(f"--{name} {value}: must be at least {least}")
        state, path = load_run(
            options.run_dir, device, batch_size=options.batch, lr=options.lr, lr_warmup=0.0, lr_decay=1.0,
            augment=None if options.augment else False, amp=None if device.type == "cuda" else False,
        )  # fmt: skip
        config = state.config
        index = anywhere(state, config.batch_size, torch.Generator(device).manual_seed(options.seed))
        if index.shape[0] < config.batch_size:
            raise ConfigError(f"--batch {config.batch_size}: only {index.shape[0]} positions can be learned from; give a smaller one")
    except (ConfigError, EnvError, CheckpointError) as error:
        sys.exit(f"error: {error}")
    torch.set_num_threads(config.threads)
    if options.fresh:
        network = make_network(state.learner.network.spec, options.seed, device)
        if network.pixels is not None:  # of the frames, not of the network
            network.pixels.fold_from(state.learner.network.pixels)
        state.learner = make_learner(network, config)
    state.learner.optimizer.flat.momentum.zero_()
    print(f"{path}: {config.env}, {options.updates} updates of {config.batch_size} positions, {config.optimizer}, lr {config.lr:g}, "
          f"augment {config.augment}, {'a new network' if options.fresh else 'the network of the run'}")  # fmt: skip
    start = evaluated(state, index, options.seed)
    learn_again(state, index, options.updates, options.seed)
    print(f"\n{'':18s} {'floor':>8s} {'constant':>8s} {'start':>8s} {'end':>8s} {'running':>8s}")
    for name, (by_batch, running, limit) in evaluated(state, index, options.seed).items():
        print(f"{name:18s} {limit.floor:8.4f} {limit.constant:8.4f} {start[name][0]:8.4f} {by_batch:8.4f} {running:8.4f}  "
              f"{verdict(limit, by_batch, running)}")  # fmt: skip
    print(f"updates skipped: {int(state.learner.skipped)}")


if __name__ == "__main__":
    main()
