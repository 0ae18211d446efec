"""Two ranks try what `tests/run/test_ranks.py` looks at: `python -m tests.ranks_worker CONFIG.json RESULT`, started once for each rank.

Each rank writes RESULT.RANK, a JSON object of what it found, by the name of the function below that found it.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

from speedyzero import batch, learn
from speedyzero import iteration as steps
from speedyzero.config import Config, from_json
from speedyzero.envs import describe
from speedyzero.layers import BatchNorm2d
from speedyzero.loop import Trainer
from speedyzero.norm_over_ranks import normalise_over_ranks
from speedyzero.ranks import ALONE, Ranks, RanksError, join
from speedyzero.ring import eligible
from speedyzero.run import resume
from speedyzero.state import make_network
from speedyzero_kernels import dispatch
from tests.runs import save

CPU = torch.device("cpu")
LIMIT_S = 60.0


def messages(ranks: Ranks, config: Config) -> dict:
    """What each kind of message brings."""
    base = 10 * ranks.rank
    whole, flags = ranks.gather(torch.tensor([[1.5 + base, 2.0]]), torch.tensor([3 + base], dtype=torch.int32))
    small, wide = ranks.gather_arrays(np.array([True, ranks.leads]), np.array([[7 + base, 8]]))
    mean = torch.tensor([1.0 + base])
    ranks.average(mean)
    return {
        "rows": whole.tolist(), "flags": flags.tolist(), "small": small.tolist(), "wide": wide.tolist(), "mean": mean.tolist(),
        "greatest": ranks.greatest(15 - 5 * ranks.rank), "told": ranks.told({"from": ranks.rank}),
    }  # fmt: skip


def shared_norm(ranks: Ranks, dtype: torch.dtype) -> BatchNorm2d:
    """A BatchNorm of three channels over the rows of all ranks."""
    norm = BatchNorm2d(3).to(dtype).train()
    normalise_over_ranks(norm, ranks)
    return norm


def normalising(ranks: Ranks, config: Config) -> dict:
    """What `differences` finds of the reference, which CPUs run, and of the kernels, interpreted."""
    found = {}
    for form in ("reference", "kernels"):
        with mock.patch.object(dispatch, "runs_kernel", return_value=form == "kernels"):
            found[form] = differences(ranks)
    return found


def differences(ranks: Ranks) -> dict:
    """The greatest differences of a BatchNorm over both ranks' rows and one over all rows: forward and backward in fp64, and forward in
    fp32 of numbers whose mean is far greater than their spread."""
    random = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(6, 3, 2, 2, dtype=torch.float64, generator=random) * 3 + 5 for _ in range(2))
    mine, outcomes = ranks.share(6), []
    for shared in (True, False):
        norm = shared_norm(ranks, torch.float64) if shared else torch.nn.BatchNorm2d(3).double().train()
        norm.weight.data.copy_(torch.tensor([0.5, 1.0, 2.0]))
        given = (x[mine] if shared else x).clone().requires_grad_()
        # A rank's loss is a mean over its rows: twice what it is as a part of the mean over all.
        (norm(given) * (2 * grad[mine] if shared else grad)).sum().backward()
        if shared:
            for parameter in norm.parameters():
                ranks.average(parameter.grad)
        outcomes.append([given.grad / (2 if shared else 1), norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var])
    outcomes[1][0] = outcomes[1][0][mine]
    found = {"difference": max(float((a - b).abs().max()) for a, b in zip(*outcomes, strict=True))}
    far = (300 + x / 100).float()
    with torch.no_grad():
        for name, rows in (("without a weight", x), ("far from zero", far)):
            whole = F.batch_norm(rows.double(), None, None, training=True)
            found[name] = float((shared_norm(ranks, rows.dtype)(rows[mine]) - whole[mine]).abs().max())
    return found


def watched(trainer: Trainer) -> dict[str, list[torch.Tensor]]:
    """One iteration, and what it drew: positions, weights and noise, all of the whole run."""
    seen: dict[str, list[torch.Tensor]] = {"index": [], "weights": [], "noise": []}
    update, noise = steps.learn.update, steps.root_noise

    def watch_update(learner, ring, index, weights, *rest):
        seen["index"].append(index.clone())
        seen["weights"].append(weights.clone())
        return update(learner, ring, index, weights, *rest)

    def watch_noise(*arguments):
        seen["noise"].append(noise(*arguments))
        return seen["noise"][-1]

    steps.learn.update, steps.root_noise = watch_update, watch_noise
    try:
        trainer.step(trainer.phase())
    finally:
        steps.learn.update, steps.root_noise = update, noise
    return seen


def new(config: Config, ranks: Ranks) -> Trainer:
    trainer = Trainer(config, describe(config.env), CPU, ranks)
    trainer.start()
    return trainer


def compared(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> dict[str, float]:
    """The greatest difference of each tensor that differs."""
    return {name: float((mine[name].double() - theirs[name].double()).abs().max()) for name in mine if not mine[name].equal(theirs[name])}


def training(ranks: Ranks, config: Config) -> dict:
    """A run of both ranks beside that of one, up to the first updates, and a little further by both, by one, and by both again."""
    shared, alone = new(config, ranks), new(config, ALONE)
    while (phase := shared.phase()) != "train":
        shared.step(phase)
        alone.step(phase)
    before = compared(shared.state.tensors(), alone.state.tensors())
    seen, expected = watched(shared), watched(alone)
    drawn = {name: all(torch.equal(a, b) for a, b in zip(seen[name], expected[name], strict=True)) for name in seen}
    after = compared(shared.state.tensors(), alone.state.tensors())
    found = {"before": before, "drawn": drawn, "after": after, "noise": list(seen["noise"][0].shape), "env_steps": shared.env_steps}
    ranks.check_same([shared.state.learner.optimizer.flat.values, shared.state.ring.priority])

    path = str(save(shared, config.run_dir / "shared")) if ranks.leads else None
    again, single = (resumed(config, Path(ranks.told(path)), who) for who in (ranks, ALONE))
    found["restored by one"] = compared(single.state.tensors(), shared.state.tensors())
    path = str(save(single, config.run_dir / "single")) if ranks.leads else None
    found["restored by both"] = compared(resumed(config, Path(ranks.told(path)), ranks).state.tensors(), shared.state.tensors())
    for trainer in (shared, again, single):
        for _ in range(2):
            trainer.step(trainer.phase())
    found["went on"] = compared(again.state.tensors(), shared.state.tensors())
    found["counts"] = [[trainer.env_steps, trainer.updates, trainer.episodes] for trainer in (shared, single)]
    ranks.check_same([shared.state.learner.optimizer.flat.values, shared.state.ring.priority])
    return found


def precision(ranks: Ranks, config: Config) -> dict:
    """By type of float, the greatest difference between what both ranks and one make of a batch, by its greatest value: gradient and
    running statistics."""
    trainer = new(config, ALONE)
    while trainer.updates == 0:  # the last layers have left zero
        trainer.step(trainer.phase())
    ring, learned = trainer.state.ring, trainer.state.learner.network
    index, weights = batch.draw(ring, eligible(ring, config), config, trainer.state.updates, torch.Generator().manual_seed(1))

    def outcomes(dtype: torch.dtype, who: Ranks) -> tuple[torch.Tensor, torch.Tensor]:
        network = make_network(learned.spec, 0, CPU)
        network.load_state_dict(learned.state_dict())
        network.to(dtype)
        normalise_over_ranks(network, who)
        draws = torch.Generator().manual_seed(2)
        rows = cast(batch.gather_batch(ring, index, weights, config, draws, rows=who.share(config.batch_size)), dtype)
        rows.targets = cast(rows.targets, dtype)
        learn.losses(network, rows, config)[0].backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in network.parameters()])
        who.average(gradient)
        return gradient, torch.cat([buffer.flatten() for buffer in network.buffers() if buffer.is_floating_point()])

    found = {}
    for dtype in (torch.float32, torch.float64):
        pairs = zip(outcomes(dtype, ranks), outcomes(dtype, ALONE), strict=True)
        found[str(dtype)] = [float((both - one).abs().max() / one.abs().max()) for both, one in pairs]
    return found


def cast(values, dtype: torch.dtype):
    """A dataclass with its floats as another type of float."""
    floats = {name: value for name, value in vars(values).items() if torch.is_tensor(value) and value.is_floating_point()}
    return dataclasses.replace(values, **{name: value.to(dtype) for name, value in floats.items()})


def resumed(config: Config, path: Path, ranks: Ranks) -> Trainer:
    trainer = Trainer(config, describe(config.env), CPU, ranks)
    resume.restore(trainer, path, log=lambda line: None)
    return trainer


def disagreement(ranks: Ranks, config: Config) -> dict:
    """What is said of ranks with other flags, and of ranks whose state came to differ."""
    lines = []
    for complaint in (
        lambda: ranks.check_started_alike({"--seed": 3, "--lr": 0.1 + ranks.rank}),
        lambda: ranks.check_same([torch.full((3,), float(ranks.rank))]),
    ):
        try:
            complaint()
        except RanksError as error:
            lines.append(str(error))
    return {"lines": lines}


def death(ranks: Ranks, config: Config) -> dict:
    """What rank 0 says when rank 1 is no longer there. Last: rank 1 ends here."""
    if not ranks.leads:
        os._exit(9)
    try:
        ranks.average(torch.zeros(3))
    except RanksError as error:
        return {"line": str(error)}
    return {"line": None}


def main() -> None:
    torch.set_num_threads(1)
    config = from_json(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[1]))
    ranks = join(CPU, LIMIT_S)
    found = {}
    for trial in (messages, normalising, precision, training, disagreement, death):
        Path(f"{sys.argv[2]}.{ranks.rank}").write_text(json.dumps(found))
        found[trial.__name__] = trial(ranks, config)
    Path(f"{sys.argv[2]}.{ranks.rank}").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
    os._exit(0)
