"""Where the time of a training iteration goes, stage by stage, against the floor of each: trace.py's table beside roofline.py's.

An uncaptured trainer with a full ring is profiled, since the kernels of a replayed graph belong to no stage. On CUDA a stage's time is its
kernels' on the device, which a graph does not change; on a CPU it is the host's. The largest gaps are what to work on first.
"""

from time import perf_counter

import roofline
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from checks.facts import ceilings_of
from checks.job import Job, Record
from checks.projection import gaps
from checks.trace_tool import trace
from checks.trainers import most_roots, once
from speedyzero.loop import Trainer
from speedyzero.run.files import write_json
from speedyzero.stages import PARTS, STAGES


def activities(cuda: bool) -> list[ProfilerActivity]:
    """What the profiler is to see."""
    return [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])


def own_floors(works: list[roofline.Work], tflops: float, tbs: float) -> dict[str, float]:
    """Seconds at least of each stage and part, without the parts inside."""
    found: dict[str, float] = {}
    for work in works:
        found[work.stage] = found.get(work.stage, 0.0) + work.seconds(tflops, tbs)
    return found


def run(job: Job, record: Record, trainer: Trainer, captured_ms: float | None) -> None:
    """Profile `trainer`; `captured_ms` of the same iteration is what a run takes. Writes stages.json, as trace.py would, and the trace."""
    roots, most, iterations = most_roots(job.config), ceilings_of(job), job.pick(3, 5)
    once(trainer, "train", roots)
    with profile(activities=activities(job.cuda)) as profiler:
        begin = perf_counter()
        for _ in range(iterations):
            with record_function(trace.ITERATION):
                once(trainer, "train", roots)
        seconds = (perf_counter() - begin) / iterations
    events = trace.events_of(profiler, job.out / "trace.json.gz")
    spans = trace.spans_of(events)
    trace.give_device_time(spans, events)
    rows = trace.table_of(spans, iterations)
    where = torch.cuda.get_device_name(job.device) if job.cuda else "cpu"
    facts = {
        "config": job.config.to_json(), "phase": "train", "roots": roots, "device": where, "iterations": iterations, "seconds": seconds,
        "stages": {name: row for name, row in rows.items() if name != trace.OUTSIDE}, "outside": rows[trace.OUTSIDE],
    }  # fmt: skip
    write_json(job.out / "stages.json", facts)

    works = roofline.Model(job.config, job.spec, roofline.Arguments().depth).iteration("train", roots)
    clock = "device" if job.cuda else "cpu"
    spent = {name: rows[name][f"{clock}_self"] for name in (*STAGES, *PARTS) if name in rows}
    floors = own_floors(works, *most)
    floor, whole = sum(floors.values()), sum(spent.values())
    above = gaps(spent, floors)
    record.keep("stages", {
        "roots": roots, "clock": clock, "seconds_under_the_profiler": seconds, "measured": spent, "floors": floors, "floor_seconds": floor,
        "measured_seconds": whole, "gaps": [{"stage": name, "seconds": more} for name, more in above],
    })  # fmt: skip
    record.say("", f"an iteration of training, R {roots}, by stage, uncaptured under the profiler ({clock} time):")
    record.say(*roofline.rows_of(roofline.by_stage(works, *most), *most, facts))
    taken = f"{1e3 * whole:.3f} ms in the stages" + (f", {captured_ms:.3f} ms an iteration as it is run" if captured_ms else "")
    record.say(f"floor {1e3 * floor:.4g} ms, {taken}")
    for rank, (name, more) in enumerate(above[:2]):
        record.say(f"{'largest' if rank == 0 else 'second'} gap to the floor: {name}, {1e3 * more:.3f} ms above it"
                   f" ({100 * more / whole if whole else 0:.0f} % of the iteration)")
    if whole == 0:
        record.fail(f"stages: the profiler saw no {clock} time in any stage")
