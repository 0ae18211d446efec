"""A timed training run as a user has it, through the command line: stopped by SIGTERM in its middle, resumed, and ended.

The first leg is stopped once it has logged updates and half of its time or of its updates is over; the second runs to the end of the run,
or is stopped too when the time is over. Of a run in progress, only the rows of metrics.jsonl are read.
"""

import math
import signal
import subprocess
from collections.abc import Callable
from itertools import pairwise
from time import monotonic, sleep

from tools.faults.run import Run, rows_of
from tools.profile.checks.job import Job, Record

FIRST, SECOND, NO_UPDATE = 0.45, 0.88, 0.6
"""Shares of the part's time at which each leg is stopped, and after which a first leg without a single update logged is given up; the rest
is for what a stop itself takes."""
TOY_ITERATIONS = 150
"""Least iterations of training in a toy run, so that there is time to stop it, unless the user says how many --env-steps."""
STOPPED, COMPLETE = 128 + signal.SIGTERM, 0


def rates(rows: list[dict]) -> dict[str, float | None]:
    """Environment steps and updates a second between the first and the last row that has updates, from the run's own clock."""
    learning = [row for row in rows if row["updates"] > 0]
    seconds = learning[-1]["wall_s"] - learning[0]["wall_s"] if learning else 0.0
    names = ("env_steps", "updates")
    return {f"{name}_a_second": (learning[-1][name] - learning[0][name]) / seconds if seconds > 0 else None for name in names}


def faults(before: list[dict], after: list[dict]) -> list[str]:
    """What is wrong with all rows `after` a resume, given those `before` it."""
    found = []
    if after[: len(before)] != before:
        found.append("rows that were logged before the stop are gone or changed after the resume: the run went back past its checkpoint")
    for earlier, later in pairwise(after):
        if any(later[name] < earlier[name] for name in ("env_steps", "updates")) or later["iteration"] <= earlier["iteration"]:
            found.append(f"counters went backwards, from iteration {earlier['iteration']} to {later['iteration']}")
            break
    # A row without a loss averaged no update; one whose loss is null was not finite.
    losses = {row["iteration"]: row.get("losses/loss", 0.0) for row in after if row["updates"] > 0}
    bad = [iteration for iteration, loss in losses.items() if loss is None or not math.isfinite(loss)]
    if bad:
        found.append(f"losses that are not finite in {len(bad)} rows, the first at iteration {bad[0]}")
    return found


def leg(job: Job, record: Record, name: str, flags: list[str], over: Callable[[list[dict]], bool], before: int) -> tuple[Run, list[dict]]:
    """One process of the run until it ends or is stopped, when `over` of its rows; notes it. `before`: rows of earlier legs."""
    path, first_row_s, exit_s = job.work / "run" / "metrics.jsonl", None, None

    def logged() -> list[dict]:
        return rows_of(path.read_bytes() if path.exists() else b"")[0]

    run = Run([*flags, "--run-dir", str(job.work / "run")], job.work / f"train_{name}.log")
    while run.process.poll() is None and not over(rows := logged()):
        if len(rows) > before and first_row_s is None:
            first_row_s = monotonic() - run.started
        sleep(0.05)
    if run.process.poll() is None:
        begin = monotonic()
        run.process.send_signal(signal.SIGTERM)
        try:
            run.process.wait(max(5.0, job.left()))
            exit_s = monotonic() - begin
        except subprocess.TimeoutExpired:
            run.end()
    rows = logged()
    found = {
        "exit_code": run.process.returncode, "wall_s": monotonic() - run.started, "sigterm_to_exit_s": exit_s,
        "to_the_first_row_s": first_row_s, **{key: rows[-1][key] if rows else 0 for key in ("iteration", "env_steps", "updates")},
        **rates(rows[before:]),
    }  # fmt: skip
    record.keep(name, found)
    record.say(f"{name} leg: " + ", ".join(f"{key} {value:.4g}" for key, value in found.items() if value is not None))
    return run, rows


def run(job: Job, record: Record) -> None:
    config, total, begin = job.config, job.left(), monotonic()

    def spent() -> float:
        return (monotonic() - begin) / total

    def half(rows: list[dict]) -> bool:
        learned = bool(rows) and rows[-1]["updates"] > 0
        return spent() > NO_UPDATE or (learned and (spent() > FIRST or rows[-1]["updates"] > config.planned_updates // 2))

    toy = [] if job.cuda else ["--env-steps", str(max(config.env_steps, config.start_transitions + TOY_ITERATIONS * config.lanes))]
    first, before = leg(job, record, "first", [*toy, *job.arguments], half, 0)
    code = first.process.returncode
    if code == COMPLETE:
        record.fail("train: the run was complete before it could be stopped; give more --env-steps or --final-updates")
    elif code != STOPPED:
        record.fail(f"train: exit code {code} after SIGTERM, not {STOPPED} ({first.last_line()})")
    elif not before or before[-1]["updates"] == 0:
        record.late(f"train: no update was logged within {monotonic() - begin:.0f} s, so nothing was resumed")
    else:
        second, rows = leg(job, record, "resumed", ["--resume"], lambda rows: spent() > SECOND, len(before))
        if second.process.returncode not in (STOPPED, COMPLETE):
            record.fail(f"train: exit code {second.process.returncode} after the resume ({second.last_line()})")
        elif len(rows) <= len(before):
            record.late("train: the resumed run logged no row in its time")
        for name in ("losses/loss", "charts/episodic_return"):
            if values := [row[name] for row in rows if row.get(name) is not None]:
                record.keep(name, [values[0], values[-1]])
                record.say(f"{name} from {values[0]:.4g} to {values[-1]:.4g} in {len(rows)} rows")
        for fault in faults(before, rows):
            record.fail(f"train: {fault}")
