"""How much of its time the device is idle while captured iterations are replayed, and what the host still launches beside the graphs.

torch.profiler sees every kernel and copy of a replay. Busy is the union of their intervals, so that what runs side by side counts once;
idle is the rest of the time from the first iteration's call to the last one's return. Watching each node of a graph costs time of its own:
the busy time over that of an iteration that nobody watched is given too, and is the fairer of the two. The emulators' turn is no work of
the device: where it is not hidden, it shows as idle time.

Beside its graph an iteration launches little: replaying a graph with a registered generator fills the seed and the offset of its random
numbers, two small launches. They are counted and named.

On a CPU there is no device to be idle. In its place stands the share of the time that the trainer's thread is on a core, and is called so.
"""

import re
import statistics
from collections import Counter
from time import perf_counter, process_time, thread_time

from speedyzero.loop import Trainer
from tools.profile import trace
from tools.profile.checks.job import Job, Record
from tools.profile.checks.trainers import end, filled, most_roots, once

Interval = tuple[float, float]
RUNTIME = ("cuda_runtime", "cuda_driver")
GRAPH_LAUNCH = re.compile(r"(cuda|cu)GraphLaunch")
# What puts work on the device; names differ between the runtime and the driver, and end in _v2, _ptsz and more.
LAUNCH = re.compile(r"(cuda|cu)(LaunchKernel|LaunchCooperativeKernel|LaunchHostFunc|Memcpy|Memset)")


def busy(intervals: list[Interval]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for begin, finish in sorted(intervals):
        if finish > reached:
            total += finish - max(begin, reached)
            reached = finish
    return total


def work_of(events: list[dict]) -> list[dict]:
    """The kernels, copies and fills of the device."""
    return [event for event in events if event.get("cat") in trace.DEVICE_WORK and event.get("ph") == "X"]


def launches(events: list[dict]) -> dict[str, Counter[str]]:
    """Launches by the host: `graphs`, and `others` by the call; and `work`, the device's work of the others by its name."""
    found: dict[str, Counter[str]] = {"graphs": Counter(), "others": Counter(), "work": Counter()}
    from_graphs, from_others = set(), set()
    for event in events:
        if event.get("cat") not in RUNTIME:
            continue
        correlation = event.get("args", {}).get("correlation")
        if GRAPH_LAUNCH.match(event["name"]):
            found["graphs"][event["name"]] += 1
            from_graphs.add(correlation)
        elif LAUNCH.match(event["name"]):
            found["others"][event["name"]] += 1
            from_others.add(correlation)
    for event in work_of(events):
        if event.get("args", {}).get("correlation") in from_others - from_graphs:
            found["work"][event["name"]] += 1
    return found


def on_a_core(record: Record, trainer: Trainer, roots: int, iterations: int) -> None:
    """The CPU's stand-in."""
    begin, thread, process = perf_counter(), thread_time(), process_time()
    for _ in range(iterations):
        once(trainer, "train", roots)
    wall, thread, process = perf_counter() - begin, thread_time() - thread, process_time() - process
    shares = {"thread_share": thread / wall, "cores_of_the_process": process / wall}
    record.keep("stand_in", {"iterations": iterations, "wall_s": wall} | shares)
    record.say(f"stand-in on a CPU, {iterations} iterations: the trainer's thread is on a core {100 * thread / wall:.1f} % of the time, "
               f"the process on {process / wall:.2f} cores")


def tell(record: Record, events: list[dict], watched_s: float, unwatched_s: float, iterations: int) -> None:
    """Note what the events of `iterations` replays say, given the seconds of them all and of one that nobody watched."""
    work = work_of(events)
    spent = busy([(event["ts"], event["ts"] + event["dur"]) for event in work]) / 1e6
    idle = 1 - spent / watched_s
    unwatched_idle = 1 - spent / iterations / unwatched_s
    found = launches(events)
    counts = {what: {name: number / iterations for name, number in counter.most_common()} for what, counter in found.items()}
    graphs = sum(found["graphs"].values()) / iterations
    record.keep("idle", {
        "iterations": iterations, "watched_ms": 1e3 * watched_s / iterations, "unwatched_ms": 1e3 * unwatched_s,
        "busy_ms": 1e3 * spent / iterations, "idle_share_watched": idle, "idle_share_unwatched": unwatched_idle,
        "device_work": len(work) / iterations, "launches_an_iteration": counts,
    })  # fmt: skip
    record.say(f"device busy {1e3 * spent / iterations:.3f} ms an iteration, in {len(work) / iterations:.0f} kernels and copies")
    record.say(f"idle {100 * unwatched_idle:.1f} % of the {1e3 * unwatched_s:.3f} ms that an iteration takes; "
               f"{100 * idle:.1f} % of the {1e3 * watched_s / iterations:.3f} ms that it takes under the profiler")
    others = ", ".join(f"{number:g} {name}" for name, number in counts["others"].items()) or "none"
    record.say(f"launches by the host an iteration: {graphs:g} of graphs; others: {others}")
    for name, number in counts["work"].items():
        record.say(f"  beside the graph: {number:g} {name[:120]}")
    if not work:
        record.fail("idle: the profiler saw no work of the device")
    if graphs < 1:
        record.fail(f"idle: {graphs:g} graph launches an iteration were seen, there must be one")


def run(job: Job, record: Record) -> None:
    trainer, roots, iterations = filled(job.config, job.spec), most_roots(job.config), job.pick(20, 10)
    for _ in range(3):
        once(trainer, "train", roots)
    if not job.cuda:
        on_a_core(record, trainer, roots, iterations)
        end(trainer)
        return
    unwatched = statistics.median(once(trainer, "train", roots) for _ in range(iterations))
    events, seconds = trace.profiled(lambda: once(trainer, "train", roots), iterations, job.cuda, job.out / "replay.json.gz")
    tell(record, events, seconds * iterations, unwatched, iterations)
    end(trainer)
