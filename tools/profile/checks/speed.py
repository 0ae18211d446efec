"""How fast each phase runs, how long the whole recipe would take of that, and that memory stays what it is.

Every phase and R of the recipe is run on one trainer: the random start and the first sweep as in a run, then the ring is filled (see
trainers.py) and the rest is run on it, though in a run a small R belongs to a ring that is not full: the kernels see the same shapes. An
iteration is counted nowhere, so the schedules stay at the start of training; no kernel's time depends on them. The host's clock runs from
the call to the return, which waits for the device: that is what a run's iteration takes, the emulators' turn included.

`first run` holds the compilation of what no part before compiled; `capture` is the second call less an iteration. The projection is the
recipe's iterations times these medians; what was not measured is interpolated, and says so. On CUDA the same is timed without graphs, for
fewer iterations, and stage by stage (stages.py).
"""

import dataclasses
import statistics
from dataclasses import asdict
from time import perf_counter

from tools.profile import roofline
from tools.profile.checks import stages
from tools.profile.checks.clock import Clock, memory
from tools.profile.checks.facts import ceilings_of
from tools.profile.checks.job import Job, Record
from tools.profile.checks.projection import Key, Part, project, total
from tools.profile.checks.trainers import end, fill, filled, forget, most_roots, start

# Growth of the process that is not a leak: logs of the emulators, buffers of the allocator of the C library.
RSS_SLACK = 2**25
SNAPSHOTS = 8
# Of the time that is left when all is captured: stages and uncaptured iterations take the rest.
MEMORY_SHARE = 0.35


def order(recipe: dict[Key, int]) -> list[Key]:
    """Phases and R as they should be measured, should the time run out: what a run does most first, each phase before a second R."""
    keys = sorted(recipe, key=lambda key: -recipe[key])
    firsts = [next(key for key in keys if key[0] == phase) for phase in dict.fromkeys(phase for phase, _ in keys)]
    return firsts + [key for key in keys if key not in firsts]


HEAD = (f"{'phase':8s} {'R':>6s} {'times':>6s} {'ms median':>10s} {'ms p95':>10s} {'its/s':>9s} {'steps/s':>9s} {'updates/s':>10s} "
        f"{'first run':>10s} {'capture':>9s}")


def in_a_run(row: dict) -> tuple[int, int]:
    """Where a phase and R comes in a run."""
    return ("collect", "sweep", "train", "learn").index(row["phase"]), row["roots"]


def text(row: dict) -> str:
    """A row of a clock as a line under HEAD."""
    steps, updates, capture = (row[name] for name in ("env_steps_a_second", "updates_a_second", "capture_s"))
    return (f"{row['phase']:8s} {row['roots']:6d} {row['iterations']:6d} {row['ms_median']:10.3f} {row['ms_p95']:10.3f} "
            f"{row['iterations_a_second']:9.2f} {f'{steps:.1f}' if steps else '-':>9s} {f'{updates:.1f}' if updates else '-':>10s} "
            f"{row['first_run_s']:8.2f} s {'-' if capture is None else f'{capture:.2f} s':>9s}")


def snapshot_ms(job: Job, clock: Clock) -> float:
    """Median milliseconds of copying the network into its snapshot."""
    times = []
    for _ in range(clock.unlike + SNAPSHOTS):
        begin = perf_counter()
        clock.trainer.run("snapshot", clock.trainer.state.refold)
        times.append(perf_counter() - begin)
    return 1e3 * statistics.median(times[clock.unlike :])


def watch_memory(job: Job, record: Record, clock: Clock) -> None:
    """Train with the least R for a while; what is held must not change."""
    roots = min(r for phase, r in clock.calls if phase == "train")
    most = job.pick(1000, 20)
    before = memory(job.device)
    done = len(clock.calls["train", roots])
    clock.run("train", roots, 1, done + most - clock.unlike, MEMORY_SHARE * job.left())
    times = len(clock.calls["train", roots]) - done
    after = memory(job.device)
    growth = {name: after[name] - before[name] for name in before}
    record.keep("memory", {"iterations": times, "roots": roots, "before": before, "after": after, "growth": growth})
    held = ", ".join(f"{name} {after[name] / 2**20:.1f} MiB ({growth[name] / 2**20:+.1f})" for name in after)
    record.say(f"memory over {times} iterations of training, R {roots}: {held}")
    for name, more in growth.items():
        if (more != 0) if name != "rss" else (more > RSS_SLACK):
            record.fail(f"memory: {name} changed by {more} bytes over {times} iterations of training")


def uncaptured(job: Job, record: Record, captured: dict[Key, float]) -> None:
    """On CUDA: what the graphs save, and the table by stage; on a CPU the table alone, there is nothing else."""
    trainer = filled(dataclasses.replace(job.config, graph="off"), job.spec)
    roots = most_roots(job.config)
    stages.run(job, record, trainer, captured.get(("train", roots)))
    if job.cuda:
        clock = Clock(trainer, captures=False)
        for phase in ("train", "learn"):
            clock.run(phase, roots, 3, 5, 0.2 * job.left())
        found = clock.milliseconds()
        record.keep("uncaptured", [clock.row(key) for key in found])
        for (phase, r), ms in found.items():
            more = f", {ms / captured[phase, r]:.2f} times as long as captured" if (phase, r) in captured else ""
            record.say(f"uncaptured, {phase} R {r}: {ms:.3f} ms{more}")
    end(trainer)


def tell_projection(job: Job, record: Record, measured: dict[Key, float], snapshot: float) -> None:
    """The recipe at these speeds and at the floor of this device."""
    config, most = job.config, ceilings_of(job)
    model, recipe = roofline.Model(config, job.spec, roofline.Arguments().depth), roofline.recipe(config)
    floors = {key: 1e3 * sum(work.seconds(*most) for work in model.iteration(*key)) for key in recipe}
    parts: list[Part] = project(recipe, measured, floors)
    copies = config.total_updates // config.snapshot_interval
    whole = total(parts, copies, snapshot, 1e3 * model.fold().seconds(*most))
    record.keep("projection", whole)
    record.say("", f"the whole recipe, {config.env_steps} steps and {config.total_updates} updates, at these speeds:",
               f"{'phase':8s} {'R':>6s} {'iterations':>11s} {'ms each':>10s} {'seconds':>9s} {'floor, s':>9s} {'share':>8s}  source")
    for part in sorted(parts, key=lambda part: in_a_run(asdict(part))):
        share = f"{100 * part.floor_seconds / part.seconds:.1f} %" if part.seconds else "-"
        each = f"{part.ms:.3f}" if part.ms is not None else "-"
        record.say(f"{part.phase:8s} {part.roots:6d} {part.iterations:11d} {each:>10s} {part.seconds:9.2f} {part.floor_seconds:9.3g} "
                   f"{share:>8s}  {part.source}")
    record.say(f"{copies} snapshots of {snapshot:.3f} ms each; in all {whole['seconds']:.1f} s = {whole['seconds'] / 60:.2f} minutes",
               f"the floor is {whole['floor_seconds']:.3g} s, {100 * whole['floor_seconds'] / whole['seconds']:.1f} % of that",
               f"left out: {whole['left_out']}")
    if not whole["complete"]:
        missing = ", ".join(f"{part.phase} R {part.roots}" for part in parts if part.ms is None)
        record.fail(f"projection: nothing was measured for {missing}")


def run(job: Job, record: Record) -> None:
    recipe = roofline.recipe(job.config)
    begin = perf_counter()
    trainer = start(job.config, job.spec)
    clock = Clock(trainer, captures=job.cuda)
    clock.start()
    record.keep("start_s", perf_counter() - begin)
    played = trainer.slots
    fill(trainer)
    record.keep("ring", {"slots_played": played, "slots": trainer.slots})
    if job.config.refresh == "sampled":
        record.say("R 0 stands for the windows of the batches, which sampled refresh searches whatever the ring holds")
    rows, at_line = [], len(record.lines)
    for at, (phase, roots) in enumerate(order(recipe)):
        if at and job.left() < job.pick(60, 0):
            record.say(f"{phase} R {roots} and what the recipe does less often: out of time")
            break
        clock.run(phase, roots, job.pick(5, 3), job.pick(60, 8), job.pick(4.0, 0.5))
        rows.append(clock.row((phase, roots)))
        record.keep("phases", rows)
        record.lines[at_line:] = []
        record.say(HEAD, *(text(row) for row in sorted(rows, key=in_a_run)))
    snapshot = snapshot_ms(job, clock)
    record.keep("snapshot_ms", snapshot)
    measured = clock.milliseconds()
    tell_projection(job, record, measured, snapshot)
    record.say("")
    watch_memory(job, record, clock)
    end(trainer)
    del trainer, clock
    forget()
    uncaptured(job, record, measured)
