"""Captured iterations against uncaptured ones: every tensor of the state after the same run with `--graph on` and with `--graph off`.

The run: the random start, the first sweep, TRAIN iterations of training with the R of a young ring; then the ring is filled (see
trainers.py), FULL more are trained with the greatest R of the run, and LEARN iterations learned. Two uncaptured runs of one seed are the
yardstick: what they differ by is the libraries', and only what the captured run differs by more is the capture's.

On a CPU nothing is captured. There two runs of one seed are compared, which is repeatability, and is called so.
"""

import dataclasses
from time import monotonic

from torch import Tensor

from tools.profile.checks.compare import Deviation, deviation
from tools.profile.checks.job import Job, Record
from tools.profile.checks.trainers import end, fill, forget, most_roots, once, start, step

TRAIN, FULL, LEARN = 20, 5, 3
BOUND = 1e-3
"""Of |a - b| / (|b| + rms) in any tensor. What was decided must be equal: actions are integers."""


def play(job: Job, graph: str) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The state at the end, on the CPU, and how many iterations of each phase and R led there."""
    config = dataclasses.replace(job.config, graph=graph)
    trainer, counts = start(config, job.spec), {}

    def count(phase: str, roots: int) -> None:
        name = f"{phase} R {roots}"
        counts[name] = counts.get(name, 0) + 1

    trained = 0
    while trained < TRAIN and trainer.phase() in ("collect", "sweep", "train"):
        (phase, roots), _ = step(trainer)
        count(phase, roots)
        trained += phase == "train"
    fill(trainer)
    most = most_roots(config)
    for phase, times in (("train", FULL), ("learn", LEARN)):
        for _ in range(times):
            once(trainer, phase, most)
            count(phase, most)
    state = {name: tensor.detach().cpu().clone() for name, tensor in trainer.state.tensors().items()}
    end(trainer)
    return state, counts


def compare(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Deviation]:
    """The deviation of each tensor of `one` from that of `other`."""
    return {name: deviation(tensor, other[name]) for name, tensor in one.items()}


def worst_of(found: dict[str, Deviation]) -> str:
    """The tensor that deviates most."""
    return max(found, key=lambda name: (found[name].relative, not found[name].bitwise))


def tell(record: Record, name: str, what: str, found: dict[str, Deviation], judged: bool) -> None:
    """Note a comparison; fail on what is beyond the bound if it is `judged`."""
    equal, worst = sum(one.bitwise for one in found.values()), worst_of(found)
    line = f"{what}: {equal} of {len(found)} tensors bitwise equal"
    if not found[worst].bitwise:
        line += f"; largest deviation {found[worst].largest:.2e} (relative {found[worst].relative:.2e}) in {worst}"
    record.say(line)
    beyond = [name for name, one in found.items() if not one.within(BOUND)]
    actions = found["ring.action"].differ
    record.keep(name, {
        "what": what, "tensors": len(found), "bitwise": equal, "bound": BOUND, "beyond_the_bound": beyond, "actions_that_differ": actions,
        "deviations": {name: one.to_json() for name, one in found.items() if not one.bitwise},
    })  # fmt: skip
    if judged and actions:
        record.fail(f"{what}: {actions} actions differ")
    elif judged and beyond:
        record.fail(f"{what}: {len(beyond)} tensors are beyond the bound of {BOUND:g}, the worst {worst} with {found[worst].relative:.2e}")


def run(job: Job, record: Record) -> None:
    begin = monotonic()
    eager, counts = play(job, "off")
    seconds = monotonic() - begin
    forget()
    record.keep("iterations", counts)
    record.say("after " + ", ".join(f"{times} of {name}" for name, times in counts.items()))
    if not job.cuda:
        again, _ = play(job, "off")
        tell(record, "repeatability", "nothing is captured on a CPU; two runs of one seed", compare(again, eager), judged=True)
        return
    captured, _ = play(job, "on")
    forget()
    tell(record, "captured", "captured against uncaptured", compare(captured, eager), judged=True)
    del captured
    if job.left() < seconds:
        record.say(f"no yardstick: a second uncaptured run takes {seconds:.0f} s, and {job.left():.0f} s are left")
        return
    again, _ = play(job, "off")
    tell(record, "yardstick", "the yardstick, uncaptured against uncaptured", compare(again, eager), judged=False)
