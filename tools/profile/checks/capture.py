"""Captured iterations against uncaptured ones: every tensor of the state after the same run with `--graph on`, `split` and `off`.

The run: the random start, the first sweep, TRAIN iterations of training with the R of a young ring; then the ring is filled (see
trainers.py), FULL more are trained with the greatest R of the run, and LEARN iterations learned. Two uncaptured runs of one seed are the
yardstick: what they differ by is the libraries', and only what the captured run differs by more is the capture's.

On a CPU nothing is captured. There two runs of one seed are compared, which is repeatability, and is called so.
"""

import dataclasses
from collections import Counter
from time import monotonic

from torch import Tensor

from tools.profile.checks.compare import deviation
from tools.profile.checks.job import Job, Record
from tools.profile.checks.trainers import end, fill, forget, most_roots, once, start, step

TRAIN, FULL, LEARN = 20, 5, 3
BOUND = 1e-3
"""Of |a - b| / (|b| + rms) in any tensor. What was decided must be equal: actions are integers."""


def play(job: Job, graph: str) -> tuple[dict[str, Tensor], Counter[str]]:
    """The state at the end, on the CPU, and how many iterations of each phase and R led there."""
    config = dataclasses.replace(job.config, graph=graph)
    trainer, counts = start(config, job.spec), Counter()
    trained, most = 0, most_roots(config)
    while trained < TRAIN and trainer.phase() in ("collect", "sweep", "train"):
        (phase, roots), _ = step(trainer)
        counts[f"{phase} R {roots}"] += 1
        trained += phase == "train"
    fill(trainer)
    for phase, times in (("train", FULL), ("learn", LEARN)):
        counts[f"{phase} R {most}"] += times
        for _ in range(times):
            once(trainer, phase, most)
    state = {name: tensor.detach().cpu().clone() for name, tensor in trainer.state.tensors().items()}
    end(trainer)
    del trainer
    forget()
    return state, counts


def compare(record: Record, name: str, what: str, got: dict[str, Tensor], expected: dict[str, Tensor], judged: bool = True) -> None:
    """Compare all tensors and note it; fail on what is beyond the bound if it is `judged`."""
    found = {tensor: deviation(got[tensor], expected[tensor]) for tensor in got}
    worst = max(found, key=lambda name: (found[name].relative, not found[name].bitwise))
    equal = sum(one.bitwise for one in found.values())
    line = f"{what}: {equal} of {len(found)} tensors bitwise equal"
    if not found[worst].bitwise:
        line += f"; largest deviation {found[worst].largest:.2e} (relative {found[worst].relative:.2e}) in {worst}"
    record.say(line)
    beyond, actions = [name for name, one in found.items() if not one.within(BOUND)], found["ring.action"].differ
    record.keep(name, {
        "tensors": len(found), "bitwise": equal, "beyond_the_bound": beyond, "actions_that_differ": actions,
        "deviations": {name: dataclasses.asdict(one) for name, one in found.items() if not one.bitwise},
    })  # fmt: skip
    if judged and actions:
        record.fail(f"{what}: {actions} actions differ")
    elif judged and beyond:
        record.fail(f"{what}: {len(beyond)} tensors are beyond the bound of {BOUND:g}, the worst {worst} with {found[worst].relative:.2e}")


def run(job: Job, record: Record) -> None:
    begin = monotonic()
    eager, counts = play(job, "off")
    seconds = monotonic() - begin
    record.say("after " + ", ".join(f"{times} of {name}" for name, times in counts.items()))
    if not job.cuda:
        compare(record, "repeatability", "nothing is captured on a CPU; two runs of one seed", play(job, "off")[0], eager)
        return
    compare(record, "captured", "captured against uncaptured", play(job, "on")[0], eager)
    if job.left() < seconds:
        record.late(f"--graph split was not compared: a run takes {seconds:.0f} s, and {job.left():.0f} s are left")
        return
    compare(record, "split", "captured in two graphs against uncaptured", play(job, "split")[0], eager)
    if job.left() < seconds:
        record.late(f"no yardstick: a second uncaptured run takes {seconds:.0f} s, and {job.left():.0f} s are left")
        return
    compare(record, "yardstick", "the yardstick, uncaptured against uncaptured", play(job, "off")[0], eager, judged=False)
