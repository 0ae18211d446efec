"""Whether a change learns better, in minutes: play a random start, freeze the ring, learn, and examine positions never learned from.

    python -m tools.inspect.learning --env Pong-v5 --preset cpu-atari --threads 1 --lr 0.6 --augment False --seed 0
    python -m tools.inspect.learning --budget-updates 600 --init he --out rows.jsonl --env Pong-v5 --value-weight 1

All flags but those below are the trainer's, and mean what they mean there. The ring is filled by random actions, then `Trainer.step` does
what it does in the phases `sweep` and `learn`: searches, the sweep of values, updates, snapshots. There is no run directory, no log and no
checkpoint. The held-out positions are another random start, from another seed, in a ring of its own, so none can be drawn for training.
They are examined after 150, 300, 600, ... updates and at the end, by a snapshot folded at that moment, as the search would see it.
Examining draws nothing from the run's generator and changes nothing: the training is the same whatever is examined, bit for bit.

The columns of the table; `train` before a name means the same of positions of the training ring, drawn alike:

    prefix   value-prefix loss a step, in nats: the mean over the unroll steps
    const    that of the best constant of each unroll step: the entropy of the step's mean target
    floor    the least there can be: the entropy of each target alone (a reward of 1 lies between two bins)
    learned  1 at the floor, 0 at the constant, less if worse
    ahead k  area under the ROC curve of |predicted value prefix at step k|, the latent unrolled with the actions that were taken, for
             telling windows with a reward within k steps from those without: 0.5 is chance, 1 is perfect
    value    mean value; return: mean of the discounted rewards that really followed, which are those of random play
    corr     their correlation; rmse: the root of their mean squared difference; std: that of the returns, the rmse of the best constant
    cons     mean cosine of projected imagined and real latents, 1 is best. A collapsed latent has a high one, too: see the rank
    rank     effective rank of the latents: exp of the entropy of their squared singular values, the mean taken away
    entropy  of the policies that the searches found; norm: of the gradient. Both are means since the last row
    win/s    windows learned from in a second of training, searches included and examining not
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter, process_time

import numpy as np
import torch
from torch import Tensor, nn

from speedyzero import learn
from speedyzero.__main__ import parse
from speedyzero.batch import gather_batch
from speedyzero.config import Config, ConfigError
from speedyzero.envs import EnvError, EnvSpec, describe
from speedyzero.layers import ActionConv, ConvNorm, LinearNorm
from speedyzero.loop import Trainer
from speedyzero.nets import Network
from speedyzero.precision import mixed_precision
from speedyzero.processor import prepare
from speedyzero.ring import Ring, eligible
from speedyzero.run.files import jsonable
from speedyzero.snapshot import fold, make_snapshot
from speedyzero.state import State
from speedyzero_kernels.support import cross_entropy, to_scalar
from tools.inspect.findings import copies, unrolled
from tools.inspect.loss_floors import prefix_bounds

FIRST_MARK = 150
"""Updates before the first row; every further row comes after twice as many."""
OTHER_SEED = 1_000_003
"""Between the seed of the run and that of the held-out positions."""
CHUNK = 256
"""Positions that go through the network at once when examined."""
COMPARED = 512
"""Positions behind the consistency and the rank."""

Row = dict[str, float | list[float]]
"""Numbers by the names of the columns; `ahead` is a list."""


def arguments(given: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of this tool, and the trainer's flags. Raises ConfigError."""
    parser = argparse.ArgumentParser(
        prog="learning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog="all other flags are the trainer's: python -m speedyzero --help",
    )  # fmt: skip
    parser.add_argument("--positions", type=int, default=12_000, help="random transitions to learn from, and as many held out")
    parser.add_argument("--examined", type=int, default=6_000, help="held-out positions to examine; a third as many learned ones")
    parser.add_argument("--tail", type=int, default=350, help="the value is examined where so many steps follow in the data")
    parser.add_argument("--budget-updates", type=int, default=2_400)
    parser.add_argument("--init", choices=("torch", "he"), default="torch", help="weights at the start: the trainer's, or He's, larger")
    parser.add_argument("--out", type=Path, default=None, metavar="FILE", help="append the rows to it, as JSON lines")
    options, flags = parser.parse_known_args(given)
    for name in ("positions", "examined", "tail", "budget_updates"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 1")
    for flag in ("--start-transitions", "--resume", "--run-dir"):
        if any(given.partition("=")[0] == flag for given in flags):
            raise ConfigError(f"{flag}: not here; the start is of --positions transitions, and there is no run directory")
    return options, flags


def returns(reward: np.ndarray, done: np.ndarray, discount: float) -> np.ndarray:
    """Discounted rewards that follow each slot [L, T], up to the end of its episode or of the data: f64.

    reward: [L, T], received on arriving at the slot. done: [L, T] bool, the slot is terminal. What is at a terminal slot means nothing.
    """
    found = np.zeros(reward.shape)
    for t in range(reward.shape[1] - 2, -1, -1):
        found[:, t] = reward[:, t + 1] + discount * found[:, t + 1] * ~done[:, t + 1]
    return found


def area(score: np.ndarray, label: np.ndarray) -> float:
    """Area under the ROC curve: how likely a labelled one scores above one that is not, ties counted half. NaN without either.

    score: [M] float. label: [M] bool.
    """
    positive, negative = int(label.sum()), int((~label).sum())
    if not positive or not negative:
        return float("nan")
    _, which, counts = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[which]  # from 1; equal scores share the mean of their ranks
    return float((rank[label].sum() - positive * (positive + 1) / 2) / (positive * negative))


def effective_rank(latent: Tensor) -> float:
    """exp of the entropy of the squared singular values of latents [M, features], their mean taken away: 1 to min(M, features)."""
    latent = latent.double()
    square = torch.linalg.svdvals(latent - latent.mean(0)) ** 2
    return float(torch.special.entr(square / square.sum().clamp_min(1e-300)).sum().exp())


def he(network: Network, seed: int) -> None:
    """Give all weights before a BatchNorm He's initialisation, larger than PyTorch's own; those that start at zero stay there."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for module in network.modules():
            if isinstance(module, ConvNorm | ActionConv):
                fresh = nn.init.kaiming_normal_(torch.empty(module.weight.shape), mode="fan_out", nonlinearity="relu")
            elif isinstance(module, LinearNorm):
                fresh = nn.init.kaiming_uniform_(torch.empty(module.weight.shape), nonlinearity="relu")
            else:
                continue
            module.weight.copy_(torch.where(module.weight == 0, 0.0, fresh.to(module.weight.device)))


class Frozen(Trainer):
    """A trainer whose first sweep takes as many roots at once as it can, as all it finds is of one snapshot; the rest is as ever."""

    def roots(self) -> int:
        if self.phase() != "sweep":
            return super().roots()
        most, known = self.config.refresh_roots, (self.slots - 1) * self.config.lanes  # no position may come twice
        return next(most // part for part in (1, 2, 4, 8) if most // part <= known or part == 8)


def random_start(config: Config, spec: EnvSpec, device: torch.device) -> Trainer:
    """A trainer whose ring holds the random start of its seed."""
    trainer = Frozen(config, spec, device)
    trainer.start()
    while trainer.phase() == "collect":
        trainer.step("collect")
    return trainer


def held_out(config: Config, spec: EnvSpec, device: torch.device) -> Ring:
    """A ring of as many random transitions as the run starts with, of other games: another seed for the emulators and the actions."""
    config = replace(config, seed=(config.seed + OTHER_SEED) % 2**31, ring_positions=config.start_transitions + 64 * config.lanes)
    trainer = random_start(config, spec, device)
    trainer.state.emulators.close()
    return trainer.state.ring


@dataclass
class Exam:
    """Positions of a ring, and what really followed them."""

    ring: Ring
    index: Tensor
    """[M] int64, flat."""
    followed: np.ndarray
    """[M] float64, the return; means something where `long` is."""
    long: np.ndarray
    """[M] bool, whether enough steps follow in the data for the return."""
    ahead: np.ndarray
    """[M, K] bool, whether a reward comes within 1..K steps."""
    whole: np.ndarray
    """[M, K] bool, whether no episode ends before the step, so that the value prefix there is one."""


def set_exam(ring: Ring, config: Config, count: int, tail: int) -> Exam:
    """An exam of at most `count` positions of a ring that never lapped, all alike, whether they were searched or not.

    Raises:
        ConfigError: the data is too short for it.
    """
    slots = int(ring.head)
    if slots <= tail + 1:
        raise ConfigError(f"--positions {config.start_transitions}: {config.lanes} lanes have {slots} steps each, and --tail {tail} leaves "
                          "none to examine; raise --positions")  # fmt: skip
    allowed = eligible(ring, replace(config, refresh="sampled")).cpu().numpy()  # searched or not: all windows that exist
    flat = np.sort(np.random.default_rng(config.seed).permutation(np.flatnonzero(allowed))[:count])
    lane, slot = np.divmod(flat, ring.slots)
    reward, done = ring.reward.cpu().numpy(), ring.done.cpu().numpy()
    window = slot[:, None] + np.arange(1, config.unroll + 1)
    return Exam(
        ring=ring,
        index=torch.from_numpy(flat).to(ring.head.device),
        followed=returns(reward[:, :slots], done[:, :slots], config.discount)[lane, slot],
        long=slot < slots - tail,
        ahead=np.logical_or.accumulate(reward[lane[:, None], window] != 0, 1),
        whole=~np.logical_or.accumulate(done[lane[:, None], window - 1], 1),
    )


def examine(state: State, exam: Exam, network: Network) -> Row:
    """How the snapshot `network` does in the exam."""
    config, generator = replace(state.config, augment=False), torch.Generator(state.device)  # nothing is drawn from it
    parts: dict[str, list[Tensor]] = {name: [] for name in ("value", "loss", "prefix", "target", "mask")}
    for index in exam.index.split(CHUNK):
        # The futures are not looked at: one step of them is the least there can be.
        batch = gather_batch(exam.ring, index, torch.ones_like(index), config, generator, torch.ones_like(index[:1]), network.normalisation)
        goal = batch.targets
        value, logits, _ = unrolled(network, batch.observation.to(network.input_format["dtype"]), goal.action, config.lstm_horizon)
        loss = cross_entropy(logits.flatten(0, 1), goal.prefix.flatten()).view_as(goal.prefix)
        found = {"value": value[:, 0], "loss": loss, "prefix": to_scalar(logits), "target": goal.prefix, "mask": goal.mask[:, 1:]}
        for name, tensor in found.items():
            parts[name].append(tensor.float().cpu())
    value, loss, prefix, target, mask = (torch.cat(part) for part in parts.values())
    each = (loss * mask).sum(0) / mask.sum(0).clamp_min(1)
    limit = prefix_bounds(target, mask, config.support)
    value, followed = value.double().numpy()[exam.long], exam.followed[exam.long]
    steps = min(config.unroll, config.lstm_horizon)  # the prefix starts from zero after
    with np.errstate(invalid="ignore"):
        corr = float(np.corrcoef(value, followed)[0, 1])
    return {
        "prefix": float(each.mean()), "const": limit.constant, "floor": limit.floor, "learned": limit.learned(float(each.mean())),
        "prefix_by_step": each.tolist(),
        "ahead": [area(prefix[exam.whole[:, k], k].abs().numpy(), exam.ahead[exam.whole[:, k], k]) for k in range(steps)],
        "value": float(value.mean()), "return": float(followed.mean()), "corr": corr,
        "rmse": float(np.sqrt(((value - followed) ** 2).mean())), "std": float(followed.std()),
    }  # fmt: skip


@torch.no_grad()
def compare_latents(state: State, exam: Exam, network: Network) -> Row:
    """Consistency of the training network and rank of the snapshot's latents, of COMPARED of the positions."""
    config, generator = replace(state.config, augment=False, consistency_weight=1.0), torch.Generator(state.device)
    spread = torch.linspace(0, len(exam.index) - 1, min(COMPARED, len(exam.index))).long()
    _, evaluation, _ = copies(state)
    latents, cosine, kept = [], 0.0, 0.0
    for index in exam.index[spread.to(exam.index.device)].split(CHUNK):
        weights = torch.ones(len(index), device=state.device)
        batch = gather_batch(exam.ring, index, weights, config, generator, normalisation=network.normalisation)
        latents.append(network.represent(batch.observation.to(network.input_format["dtype"])).flatten(1))
        with mixed_precision(config.amp, index):
            loss = learn.losses(evaluation, batch, config)[1]["consistency_loss"]
        cosine, kept = cosine - float(loss) * batch.targets.action.numel(), kept + float(batch.targets.mask[:, 1:].sum())
    return {"cons": cosine / max(kept, 1.0), "rank": effective_rank(torch.cat(latents))}


def rows(trainer: Trainer, held: Exam, own: Exam, budget: int) -> Iterator[Row]:
    """Train on the frozen ring for at least `budget` updates; a row at every mark and at the end."""
    state, config = trainer.state, trainer.config
    network = make_snapshot(state.learner.network.spec, state.device, config.amp)
    seconds, busy, last, mark, begin = 0.0, 0.0, (0, 0.0), FIRST_MARK, perf_counter()
    while config.refresh == "sweep" and trainer.phase() == "sweep":
        trainer.step("sweep")
    state.search_averages.drain()
    swept = perf_counter() - begin
    while trainer.updates < budget:
        begin, busy_before = perf_counter(), process_time()
        trainer.step("learn")
        seconds, busy = seconds + perf_counter() - begin, busy + process_time() - busy_before
        if trainer.updates >= min(mark, budget):
            found = state.search_averages.drain() | state.learn_averages.drain()
            fold(state.learner.network, network)
            trained = examine(state, own, network)
            yield {
                "updates": trainer.updates, "windows": trainer.updates * config.batch_size, "seconds": seconds, "cpu_seconds": busy,
                "sweep_seconds": swept, **examine(state, held, network), **compare_latents(state, held, network),
                **{f"train_{name}": trained[name] for name in ("prefix", "learned", "ahead", "value", "return", "corr", "rmse", "std")},
                **{name: value for name, value in found.items() if name.startswith("losses/")},
                "entropy": found["search/visit_entropy"], "depth": found["search/depth"], "norm": found["train/grad_norm"],
                "skipped": int(state.learner.skipped),
                "win/s": (trainer.updates - last[0]) * config.batch_size / (seconds - last[1]),
            }  # fmt: skip
            last = trainer.updates, seconds
            while mark <= trainer.updates:
                mark *= 2


DIGITS = {
    "updates": 0, "seconds": 0, "prefix": 3, "const": 3, "floor": 3, "learned": 2, "ahead": 2, "value": 2, "return": 2, "corr": 2,
    "rmse": 2, "std": 2, "cons": 2, "rank": 1, "entropy": 2, "norm": 2, "win/s": 0, "train_learned": 2, "train_corr": 2,
}  # fmt: skip
"""The columns of the table, and how many digits each has after the point."""


def line(row: Row | None, steps: int) -> str:
    """One line of the table; without a row: its head. `steps`: of `ahead`."""
    cells = []
    for name, digits in DIGITS.items():
        names = [f"ahead {k}" for k in range(1, steps + 1)] if name == "ahead" else [name.replace("_", " ")]
        values = names if row is None else [f"{value:.{digits}f}" for value in np.atleast_1d(row[name])]
        cells += [value.rjust(max(6, len(head))) for head, value in zip(names, values, strict=True)]
    return " ".join(cells)


def main() -> None:
    try:
        options, flags = arguments(sys.argv[1:])
        with tempfile.TemporaryDirectory() as nowhere:
            config, device = parse([*flags, "--start-transitions", str(options.positions), "--run-dir", f"{nowhere}/none"])[:2]
        prepare(config.threads)
        spec = describe(config.env, frame_size=config.frame_size, gray=config.gray)
        begin = perf_counter()
        trainer = random_start(config, spec, device)
        if options.init == "he":
            he(trainer.state.learner.network, config.seed)
            trainer.state.refold()
        held = set_exam(held_out(config, spec, device), config, options.examined, options.tail)
        own = set_exam(trainer.state.ring, config, -(-options.examined // 3), options.tail)
    except (ConfigError, EnvError) as error:
        sys.exit(f"error: {error}")
    steps = min(config.unroll, config.lstm_horizon)
    print(f"{config.env}, seed {config.seed}, init {options.init}: {trainer.env_steps} random transitions and as many held out, in "
          f"{perf_counter() - begin:.0f} s; {len(held.index)} of those examined, a reward within {steps} steps of "
          f"{held.ahead[held.whole[:, -1], steps - 1].mean():.1%}\n{line(None, steps)}", flush=True)  # fmt: skip
    for row in rows(trainer, held, own, options.budget_updates):
        print(line(row, steps), flush=True)
        if options.out:
            told = {"flags": flags, "init": options.init, "seed": config.seed, "positions": trainer.env_steps} | row
            with options.out.open("a") as file:
                print(json.dumps(jsonable(told)), file=file)


if __name__ == "__main__":
    main()
