"""Whether a run's network can fit its targets: learn the same few positions of its newest checkpoint again and again.

    python -m tools.inspect.overfit runs/Pong-v5_efficientzero_seed0 --updates 300
    python -m tools.inspect.overfit RUN_DIR --fresh --no-augment --lr 0.05 --optimizer sgd --amp False

The ring is frozen: no emulators, no search, no new targets. The network, the losses and the optimiser remain. Each loss is
compared with its floor, which follows from the targets (loss_floors.py), and with what a constant reaches; both in training mode, by the
batch's statistics, and in evaluation mode, by the running ones, as the snapshot would. Changes nothing of the run. If the losses fall
here and the run does not learn, it is the data, the search or the schedule; if they do not, it is the network or the optimiser.
"""

import argparse
import sys
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from speedyzero import learn
from speedyzero.batch import gather_batch
from speedyzero.config import ConfigError, pick_device
from speedyzero.envs import EnvError
from speedyzero.optim import make_learner
from speedyzero.run.checkpoint import CheckpointError
from speedyzero.state import State, make_network
from tools.inspect.findings import LOSSES, copies
from tools.inspect.load_run import load_run
from tools.inspect.look import anywhere
from tools.inspect.loss_floors import Bounds, bounds

FITTED = 0.9
"""Share of the way from the constant's loss to the floor from which on a loss counts as fitted."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="overfit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--batch", type=int, default=None, help="windows of an update; default: the run's")
    parser.add_argument("--positions", type=int, default=None, help="how many to learn; default: one batch")
    parser.add_argument("--fresh", action="store_true", help="begin with a new network, not with the run's")
    parser.add_argument("--lr", type=float, default=None, help="constant; default: the run's after its warm-up")
    parser.add_argument("--optimizer", choices=("sgd", "clipped-lars"), default=None)
    parser.add_argument("--amp", choices=("True", "False"), default=None, help="bf16; default: the run's on CUDA, False on a CPU")
    parser.add_argument("--no-augment", action="store_true")
    parser.add_argument("--seed", type=int, default=0, help="of the positions and the batches")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    return parser.parse_args()


def evaluated(state: State, index: Tensor, seed: int) -> tuple[dict[str, float], dict[str, float], dict[str, Bounds]]:
    """The losses at the positions `index` by the batch's statistics and by the running ones, and their bounds; changes nothing."""
    generator = torch.Generator(state.device).manual_seed(seed)
    weights, normalisation = torch.ones(index.shape[0], device=state.device), state.learner.network.normalisation
    batch = gather_batch(state.ring, index, weights, state.config, generator, normalisation=normalisation)
    with torch.no_grad(), learn.mixed_precision(state.config.amp, index):
        by_batch, running = (learn.losses(network, batch, state.config)[1] for network in copies(state)[:2])
    limits = bounds(batch.targets, state.config.support)
    by_batch, running = ({name: float(losses[name]) for name in LOSSES} for losses in (by_batch, running))
    return by_batch, running, limits


def learn_again(state: State, index: Tensor, updates: int, seed: int) -> None:
    """Update the network `updates` times from batches of the positions `index`, each drawn alike."""
    config, generator = state.config, torch.Generator(state.device).manual_seed(seed)
    weights = torch.ones(config.batch_size, device=state.device)
    count = torch.zeros_like(state.updates)
    begin = perf_counter()
    for update in range(1, updates + 1):
        picked = index[torch.randperm(index.shape[0], generator=generator, device=state.device)[: config.batch_size]]
        metrics = learn.update(state.learner, state.ring, picked, weights, count, config, generator)
        if update in (1, updates) or update % max(1, updates // 10) == 0:
            row = "  ".join(f"{name.removesuffix('_loss')} {float(metrics[f'losses/{name}']):.4f}" for name in LOSSES)
            norm, seconds = float(metrics["train/grad_norm"]), perf_counter() - begin
            print(f"update {update:5d}  {row}  grad_norm {norm:.3g}  {seconds:.0f} s", flush=True)


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
    options = arguments()
    try:
        device = pick_device(options.device)
        for name in ("updates", "batch", "positions"):
            least = 2 if name == "batch" else 1
            if (value := getattr(options, name)) is not None and value < least:
                raise ConfigError(f"--{name} {value}: must be at least {least}")
        amp = {"True": True, "False": False, None: None if device.type == "cuda" else False}[options.amp]
        augment = False if options.no_augment else None
        state, path = load_run(
            options.run_dir, device, batch_size=options.batch, lr=options.lr, lr_warmup=0.0, lr_decay=1.0, optimizer=options.optimizer,
            amp=amp, augment=augment,
        )  # fmt: skip
        generator = torch.Generator(device).manual_seed(options.seed)
        wanted = max(options.positions or state.config.batch_size, state.config.batch_size)
        index = anywhere(state, wanted, generator)
        if index.shape[0] < state.config.batch_size:
            raise ConfigError(f"--batch {state.config.batch_size}: only {index.shape[0]} positions can be learned from; give a smaller one")
    except (ConfigError, EnvError, CheckpointError) as error:
        sys.exit(f"error: {error}")
    config = state.config
    torch.set_num_threads(config.threads)
    if options.fresh:
        network = make_network(state.learner.network.spec, options.seed, device)
        if network.pixels is not None:  # of the frames, not of the network
            network.pixels.fold_from(state.learner.network.pixels)
        state.learner = make_learner(network, config)
    state.learner.optimizer.flat.momentum.zero_()
    print(f"{path}: {config.env}, {index.shape[0]} positions, {options.updates} updates of {config.batch_size}, {config.optimizer}, lr "
          f"{config.lr:g}, amp {config.amp}, augment {config.augment}, {'a new network' if options.fresh else 'the network of the run'}")
    start = evaluated(state, index, options.seed)
    learn_again(state, index, options.updates, options.seed)
    end = evaluated(state, index, options.seed)
    print(f"\n{'':18s} {'floor':>8s} {'constant':>8s} {'start':>8s} {'end':>8s} {'running':>8s}")
    for name in LOSSES:
        limit, by_batch, running = end[2][name], end[0][name], end[1][name]
        print(f"{name:18s} {limit.floor:8.4f} {limit.constant:8.4f} {start[0][name]:8.4f} {by_batch:8.4f} {running:8.4f}  "
              f"{verdict(limit, by_batch, running)}")  # fmt: skip
    print(f"updates skipped: {int(state.learner.skipped)}")


if __name__ == "__main__":
    main()
