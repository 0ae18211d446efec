"""A timed training run as a user has it, through the command line: stopped by SIGTERM in its middle, resumed, and ended.

The first leg is stopped once it has logged updates and half of its time or of its updates is over; the second runs to the end of the run,
or is stopped too when the time is over. A row of metrics.jsonl is all that is read of a run in progress.
"""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from time import monotonic, sleep

from checks.job import Job, Record

POLL_S = 0.05
FIRST, SECOND = 0.45, 0.88
"""Shares of the part's time at which each leg is stopped; the rest is for what a stop itself takes."""
NO_UPDATE = 0.6
"""Share of the time after which a first leg without a single update logged is given up."""
TOY_ITERATIONS = 150
"""Of training at least in a toy run, so that there is time to stop it, unless the user says how many --env-steps."""
STOPPED, COMPLETE = 128 + signal.SIGTERM, 0


def rows_of(run_dir: Path) -> list[dict]:
    """The rows logged so far; a last line that is still being written is left out."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines if line]


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def rates(rows: list[dict]) -> dict[str, float | None]:
    """Environment steps and updates a second between the first and the last row that has updates, from the run's own clock."""
    learning = [row for row in rows if row["updates"] > 0]
    if len(learning) < 2 or learning[-1]["wall_s"] <= learning[0]["wall_s"]:
        return {"env_steps_a_second": None, "updates_a_second": None}
    seconds = learning[-1]["wall_s"] - learning[0]["wall_s"]
    return {f"{name}_a_second": (learning[-1][name] - learning[0][name]) / seconds for name in ("env_steps", "updates")}


def faults(before: list[dict], after: list[dict], first_new: int) -> list[str]:
    """What is wrong with the rows: `before` the resume, and all `after` it, of which those from `first_new` on are the resumed run's."""
    found = []
    if after[: len(before)] != before:
        found.append("rows that were logged before the stop are gone or changed after the resume: the run went back past its checkpoint")
    for earlier, later in pairwise(after):
        if any(later[name] < earlier[name] for name in ("env_steps", "updates")) or later["iteration"] <= earlier["iteration"]:
            found.append(f"counters went backwards, from iteration {earlier['iteration']} to {later['iteration']}")
            break
    if len(after) <= first_new:
        found.append("the resumed run logged no row")
    bad = [row["iteration"] for row in after if row["updates"] > 0 and not _finite(row)]
    if bad:
        found.append(f"losses that are not finite in {len(bad)} rows, the first at iteration {bad[0]}")
    return found


def _finite(row: dict) -> bool:
    """Whether the loss of a row is a number; a row without one averaged no update."""
    loss = row.get("losses/loss", 0.0)
    return loss is not None and math.isfinite(loss)


class Leg:
    """One process of the run."""

    def __init__(self, job: Job, run_dir: Path, flags: list[str], name: str):
        self.run_dir, self.begin = run_dir, monotonic()
        self.log = job.out / f"train_{name}.log"
        self._file = self.log.open("w")
        command = [sys.executable, "-m", "speedyzero", *flags, "--run-dir", str(run_dir)]
        self.process = subprocess.Popen(command, stdout=self._file, stderr=subprocess.STDOUT, env=os.environ | {"PYTHONUNBUFFERED": "1"})

    def wait(self, over: Callable[[list[dict]], bool]) -> list[dict]:
        """Until the process ends or `over` of its rows; returns them."""
        while self.process.poll() is None:
            rows = rows_of(self.run_dir)
            if over(rows):
                return rows
            sleep(POLL_S)
        return rows_of(self.run_dir)

    def stop(self, limit: float) -> float | None:
        """SIGTERM; seconds to the exit, None if the process had ended before or outlived the limit."""
        if self.process.poll() is not None:
            self._file.close()
            return None
        begin = monotonic()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(limit)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return None
        finally:
            self._file.close()
        return monotonic() - begin

    def last_line(self) -> str:
        """Of what it printed."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "nothing was printed"


def counts(rows: list[dict]) -> dict[str, int]:
    """Of the last row."""
    return {name: rows[-1][name] if rows else 0 for name in ("iteration", "env_steps", "updates")}


def run(job: Job, record: Record) -> None:
    run_dir, whole = job.out / "run", job.left()
    begin = monotonic()
    config, toy = job.config, []
    if not job.cuda:
        toy = ["--env-steps", str(max(config.env_steps, config.start_transitions + TOY_ITERATIONS * config.lanes))]
    first = Leg(job, run_dir, [*toy, *job.arguments], "first")

    def half(rows: list[dict]) -> bool:
        spent = (monotonic() - begin) / whole
        learned = bool(rows) and rows[-1]["updates"] > 0
        return spent > NO_UPDATE or (learned and (spent > FIRST or rows[-1]["updates"] > config.planned_updates // 2))

    before = first.wait(half)
    exit_s = first.stop(max(5.0, job.left()))
    at_stop, code = rows_of(run_dir), first.process.returncode
    wall = monotonic() - first.begin
    checkpoint = size_of(run_dir / "checkpoints")
    record.keep("first", {
        "exit_code": code, "wall_s": wall, "sigterm_to_exit_s": exit_s, "checkpoints_bytes": checkpoint,
        **counts(at_stop), **rates(at_stop),
    })  # fmt: skip
    tell_leg(record, "stopped by SIGTERM", record.results["first"])
    if not before or before[-1]["updates"] == 0:
        record.fail(f"train: no update was logged within {wall:.0f} s")
    if code == COMPLETE:
        record.fail("train: the run was complete before it could be stopped; give more --env-steps or --final-updates")
        return
    if code != STOPPED:
        record.fail(f"train: exit code {code} after SIGTERM, not {STOPPED} ({first.last_line()}); see {first.log.name}")
        return

    second = Leg(job, run_dir, ["--resume"], "resumed")
    seen: list[float] = []

    def at_the_end(rows: list[dict]) -> bool:
        if len(rows) > len(at_stop) and not seen:
            seen.append(monotonic() - second.begin)
        return monotonic() - begin > SECOND * whole

    second.wait(at_the_end)
    exit_s = second.stop(max(5.0, job.left()))
    code, rows, wall = second.process.returncode, rows_of(run_dir), monotonic() - second.begin
    resume_s = seen[0] if seen else None
    record.keep("resumed", {
        "exit_code": code, "wall_s": wall, "sigterm_to_exit_s": exit_s, "to_the_first_row_s": resume_s,
        "checkpoints_bytes": size_of(run_dir / "checkpoints"), **counts(rows), **rates(rows[len(at_stop):]),
    })  # fmt: skip
    tell_leg(record, "resumed, and " + ("complete" if code == COMPLETE else "stopped again"), record.results["resumed"])
    if code not in (STOPPED, COMPLETE):
        record.fail(f"train: exit code {code} after the resume, not {STOPPED} or {COMPLETE} ({second.last_line()}); see {second.log.name}")
    losses = [row["losses/loss"] for row in rows if row.get("losses/loss") is not None]
    returns = [row["charts/episodic_return"] for row in rows if row.get("charts/episodic_return") is not None]
    ends = {name: [values[0], values[-1]] if values else None for name, values in (("loss", losses), ("episodic_return", returns))}
    record.keep("ends", ends | {"rows": len(rows)})
    told = [f"{name} from {pair[0]:.4g} to {pair[1]:.4g}" for name, pair in ends.items() if pair]
    record.say(", ".join([*told, f"{len(rows)} rows"]))
    if (run_dir / "eval.json").exists():
        record.keep("eval", json.loads((run_dir / "eval.json").read_text()))
    for fault in faults(at_stop, rows, len(at_stop)):
        record.fail(f"train: {fault}")


def tell_leg(record: Record, what: str, leg: dict) -> None:
    """One leg in two lines."""
    record.say(f"{what}: exit code {leg['exit_code']} after {leg['wall_s']:.1f} s, {leg['env_steps']} steps and {leg['updates']} updates")
    told = [f"checkpoints of {leg['checkpoints_bytes'] / 2**20:.1f} MiB"]
    if leg.get("to_the_first_row_s") is not None:
        told.append(f"its first row {leg['to_the_first_row_s']:.1f} s after the start")
    if leg["updates_a_second"] is not None:
        told.append(f"{leg['env_steps_a_second']:.1f} steps/s and {leg['updates_a_second']:.1f} updates/s while it learned")
    if leg["sigterm_to_exit_s"] is not None:
        told.append(f"{leg['sigterm_to_exit_s']:.2f} s from SIGTERM to the exit")
    record.say(f"  {', '.join(told)}")
