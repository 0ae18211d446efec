"""Time of a training iteration by stage against the floor of each: the table of trace.py beside that of roofline.py.

Profiles an uncaptured trainer with a full ring, since the kernels of a replayed graph belong to no stage. On CUDA a stage's time is its
kernels' on the device, which a graph does not change; on a CPU it is the host's. The largest gaps are what to work on first.
"""

from speedyzero.loop import Trainer
from speedyzero.run.files import write_json
from speedyzero.stages import PARTS, STAGES
from tools.profile import roofline, trace
from tools.profile.checks.facts import ceilings_of
from tools.profile.checks.job import Job, Record
from tools.profile.checks.trainers import most_roots, once


def own_floors(works: list[roofline.Work], tflops: float, tbs: float) -> dict[str, float]:
    """Seconds at least of each stage and part, without the parts inside."""
    found: dict[str, float] = {}
    for work in works:
        found[work.stage] = found.get(work.stage, 0.0) + work.seconds(tflops, tbs)
    return found


def gaps(spent: dict[str, float], floors: dict[str, float]) -> list[tuple[str, float]]:
    """Stages by the seconds that they take above their floor, most first; both exclusive of the parts inside."""
    above = {name: seconds - floors.get(name, 0.0) for name, seconds in spent.items()}
    return sorted(above.items(), key=lambda item: -item[1])


def run(job: Job, record: Record, trainer: Trainer, captured_ms: float | None) -> None:
    """Profile `trainer`; a run takes `captured_ms` for the same iteration. Writes stages.json, as trace.py does, and the trace."""
    roots, most, iterations = most_roots(job.config), ceilings_of(job), job.pick(3, 5)
    once(trainer, "train", roots)
    events, seconds = trace.profiled(lambda: once(trainer, "train", roots), iterations, job.cuda, job.out / "trace.json.gz")
    rows = trace.table_of(events, iterations)
    facts = trace.facts_of(job.config, rows, roots, iterations, seconds)
    write_json(job.out / "stages.json", facts)

    works = roofline.Model(job.config, job.spec, roofline.Arguments().depth).iteration("train", roots)
    clock = "device" if job.cuda else "cpu"
    spent = {name: rows[name][f"{clock}_self"] for name in (*STAGES, *PARTS) if name in rows}
    floors = own_floors(works, *most)
    floor, total, above = sum(floors.values()), sum(spent.values()), gaps(spent, floors)
    record.keep("stages", {
        "roots": roots, "clock": clock, "seconds_under_the_profiler": seconds, "measured": spent, "floors": floors, "floor_seconds": floor,
        "measured_seconds": total, "gaps": [{"stage": name, "seconds": more} for name, more in above],
    })  # fmt: skip
    record.say("", f"an iteration of training, R {roots}, by stage, uncaptured under the profiler ({clock} time):")
    record.say(*roofline.rows_of(roofline.by_stage(works, *most), *most, facts))
    taken = f"{1e3 * total:.3f} ms in the stages" + (f", {captured_ms:.3f} ms an iteration as it is run" if captured_ms else "")
    record.say(f"floor {1e3 * floor:.4g} ms, {taken}")
    for name, more in above[:2]:
        record.say(f"largest gaps to the floor: {name}, {1e3 * more:.3f} ms ({100 * more / total if total else 0:.0f} % of the iteration)")
    if total == 0:
        record.fail(f"stages: the profiler saw no {clock} time in any stage")
