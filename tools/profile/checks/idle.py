"""How much of its time the device is idle while captured iterations are replayed, and what the host still launches beside the graphs.

torch.profiler sees every kernel and copy of a replay. Busy is the union of their intervals, so that what runs side by side counts once;
idle is the rest. Watching each node of a graph costs time of its own: the busy time over that of an iteration that nobody watched is
given too, and is the fairer of the two. The emulators' turn is no work of the device: where it is not hidden, it shows as idle time.

On a CPU there is no device to be idle. In its place stands the share of the time that the trainer's thread is on a core, and is called so.
"""

import re
import statistics
from collections import Counter
from time import perf_counter, thread_time

from tools.profile import trace
from tools.profile.checks.job import Job, Record
from tools.profile.checks.trainers import end, filled, most_roots, once

WATCHED = 5
"""Iterations under the profiler: some 11,000 events each, and the trace must come back from a lease."""
GRAPH_LAUNCH = re.compile(r"(cuda|cu)GraphLaunch")
# What puts work on the device; names differ between the runtime and the driver, and end in _v2, _ptsz and more.
LAUNCH = re.compile(r"(cuda|cu)(LaunchKernel|LaunchCooperativeKernel|LaunchHostFunc|Memcpy|Memset)")


def busy(intervals: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for begin, finish in sorted(intervals):
        if finish > reached:
            total += finish - max(begin, reached)
            reached = finish
    return total


def share(part: float) -> str:
    """An idle share in words; where the profiler made the work slower than an iteration is without it, there is none to tell."""
    return f"{100 * part:.1f} %" if part >= 0 else "nothing (the work takes longer under the profiler)"


def tell(record: Record, events: list[dict], watched_s: float, unwatched_s: float, iterations: int) -> None:
    """Note what the events of `iterations` replays say, given the seconds of one, and of one that nobody watched."""
    work = [event for event in events if event.get("cat") in trace.DEVICE_WORK and event.get("ph") == "X"]
    spent = busy([(event["ts"], event["ts"] + event["dur"]) for event in work]) / 1e6 / iterations
    called = Counter(event["name"] for event in events if event.get("cat") in trace.HOST_CALLS)
    graphs = sum(times for name, times in called.items() if GRAPH_LAUNCH.match(name)) / iterations
    others = {name: times / iterations for name, times in called.most_common() if LAUNCH.match(name)}
    idle, unwatched = 1 - spent / watched_s, 1 - spent / unwatched_s
    record.keep("idle", {
        "iterations": iterations, "watched_ms": 1e3 * watched_s, "unwatched_ms": 1e3 * unwatched_s, "busy_ms": 1e3 * spent,
        "idle_share_watched": idle, "idle_share_unwatched": unwatched, "device_work": len(work) / iterations, "graph_launches": graphs,
        "other_launches": others,
    })  # fmt: skip
    record.say(f"device busy {1e3 * spent:.3f} ms an iteration, in {len(work) / iterations:.0f} kernels and copies",
               f"idle: {share(unwatched)} of the {1e3 * unwatched_s:.3f} ms that an iteration takes; {share(idle)} of the "
               f"{1e3 * watched_s:.3f} ms that it takes under the profiler",
               f"launches by the host an iteration: {graphs:g} of graphs; others: "
               + (", ".join(f"{times:g} {name}" for name, times in others.items()) or "none"))
    if not work:
        record.fail("idle: the profiler saw no work of the device")
    if graphs < 1:
        record.fail(f"idle: {graphs:g} graph launches an iteration were seen, there must be one")


def run(job: Job, record: Record) -> None:
    trainer, roots, iterations = filled(job.config, job.spec), most_roots(job.config), job.pick(20, 10)
    for _ in range(3):
        once(trainer, "train", roots)
    begin, thread = perf_counter(), thread_time()
    unwatched = [once(trainer, "train", roots) for _ in range(iterations)]
    on_a_core = (thread_time() - thread) / (perf_counter() - begin)
    if job.cuda:
        events, seconds = trace.profiled(lambda: once(trainer, "train", roots), WATCHED, job.cuda, job.work / "replay.json.gz")
        tell(record, events, seconds, statistics.median(unwatched), WATCHED)
    else:
        record.keep("stand_in", {"iterations": iterations, "thread_share": on_a_core})
        record.say(f"stand-in on a CPU, {iterations} iterations: the trainer's thread is on a core {100 * on_a_core:.1f} % of the time")
    end(trainer)
