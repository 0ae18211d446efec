"""tools/faults/moments.py on tools/faults/watch.py: the moments of kills as drawn, and that each comes just then, as files are written."""

import contextlib
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.tools.faults_support import moments
from tests.tools.faults_support import watch as watches

Moment, Pace = moments.Moment, moments.Pace


PACE = Pace(start_s=3.0, iteration_s=0.1, iterations=1000, evaluation_s=2.0, write_s={"checkpoint_*": 0.04, "frames_*": 0.02})


@pytest.mark.parametrize("seed", range(5))
def test_moments_are_of_every_kind_and_spread_over_the_run(seed):
    drawn = moments.draw(random.Random(seed), 50, PACE, 25)
    assert drawn == moments.draw(random.Random(seed), 50, PACE, 25)
    assert drawn[0] == Moment("write", "config.json")
    kinds = [moment.kind for moment in drawn]
    assert kinds.count("write") == 25
    assert kinds.count("clock") + kinds.count("after") + kinds.count("evaluation") == 25
    assert kinds.count("clock") > 8
    assert kinds.count("after") > 3
    assert all(kind in ("write", "evaluation") for kind in kinds[45:])
    assert all(moment.pattern in ("eval.json", "summary.json") for moment in drawn[45:] if moment.kind == "write")
    targets = [moment.iteration for moment in drawn if moment.pattern == "checkpoint_*"]
    assert targets == sorted(targets)
    assert targets[-1] > 700
    # The number of a kill times 1000 / 45, less two intervals.
    assert {moment.iteration for moment in drawn[30:31]} <= {0, 616}
    for moment in drawn:
        longest = {"clock": 8.0, "after": 0.005, "evaluation": 2.0, "write": PACE.write_s.get(moment.pattern, 0.0)}[moment.kind]
        assert 0 <= moment.delay <= longest
    assert max(moment.delay for moment in drawn if moment.kind == "clock") > 4
    assert max(moment.delay for moment in drawn if moment.pattern == "checkpoint_*" and moment.kind == "write") > 0.02


@pytest.fixture
def sleeper():
    """A process that does nothing, as a run."""
    process = subprocess.Popen(["sleep", "60"])
    yield SimpleNamespace(process=process, started=time.monotonic(), said=lambda: "")
    process.kill()
    process.wait()


def writing(folder: Path, name: str) -> Iterator[Callable[[], object]]:
    """The steps of a write as `replacing` does it, one by one: each folder that is missing, the file aside, the file in its place."""
    path = folder / name
    aside = path.with_name(path.name + ".tmp")
    for above in reversed(path.relative_to(folder).parents):
        yield lambda above=folder / above: above.mkdir(exist_ok=True)
    yield lambda: aside.write_bytes(b"half")
    yield lambda: aside.rename(path)


class Stepping:
    """A watch in front of which the next step is taken whenever somebody looks, so that none is missed and none comes too early."""

    def __init__(self, watch: watches.Watch, steps: list[Callable[[], object]]):
        self._watch, self._steps = watch, steps

    def events(self, seconds: float) -> Iterator[watches.Event]:
        if self._steps:
            self._steps.pop(0)()
        yield from self._watch.events(seconds)


def came_at(run, folder: Path, moment: Moment, names: list[str], reached: int = 0, limit: float = 5.0) -> list[str] | None:
    """The files that were there when the moment came, while these are written one by one; None if it did not come."""
    steps = [step for name in names for step in writing(folder, name)]
    with contextlib.closing(watches.Watch(folder)) as watch:
        run.started = time.monotonic()
        came = moments.wait(run, Stepping(watch, steps), moment, reached, 20, limit)
    there = sorted(path.name for path in folder.rglob("*") if path.is_file())
    for step in steps:
        step()
    return there if came else None


def test_a_moment_within_a_write_comes_while_the_file_is_aside(sleeper, tmp_path):
    names = [f"checkpoints/checkpoint_{i:09d}.safetensors" for i in (10, 20, 30)]
    there = came_at(sleeper, tmp_path, Moment("write", "checkpoint_*", 20), names)
    assert there == ["checkpoint_000000010.safetensors", "checkpoint_000000020.safetensors", "checkpoint_000000030.safetensors.tmp"]


def test_a_moment_after_a_checkpoint_comes_when_it_is_whole_and_not_of_another_file(sleeper, tmp_path):
    names = ["config.json", "checkpoints/frames/frames_000000000.safetensors", "checkpoints/checkpoint_000000010.safetensors"]
    there = came_at(sleeper, tmp_path, Moment("after", "checkpoint_*", 0, 0.001), names)
    assert there == ["checkpoint_000000010.safetensors", "config.json", "frames_000000000.safetensors"]


def test_for_a_write_that_does_not_come_a_later_checkpoint_will_do(sleeper, tmp_path):
    names = [f"checkpoints/checkpoint_{i:09d}.safetensors" for i in (10, 20, 30)]
    there = came_at(sleeper, tmp_path, Moment("write", "frames_*", 0), names)
    assert there == ["checkpoint_000000010.safetensors", "checkpoint_000000020.safetensors"]


def test_a_checkpoint_from_before_counts_as_reached(sleeper, tmp_path):
    assert came_at(sleeper, tmp_path, Moment("write", "frames_*", 5), ["frames_000000000.safetensors"], reached=5) is not None
    (tmp_path / "frames_000000000.safetensors").unlink()
    assert came_at(sleeper, tmp_path, Moment("write", "frames_*", 6), ["frames_000000000.safetensors"], reached=5, limit=0.5) is None


def test_a_moment_by_the_clock_comes_at_its_time_and_not_to_a_run_that_ended(sleeper, tmp_path):
    begin = time.monotonic()
    assert came_at(sleeper, tmp_path, Moment("clock", delay=0.4), []) == []
    assert 0.4 <= time.monotonic() - begin < 2
    sleeper.process.kill()
    sleeper.process.wait()
    assert came_at(sleeper, tmp_path, Moment("clock", delay=0.1), []) is None


def test_a_moment_in_the_evaluation_comes_once_it_was_said_to_begin(sleeper, tmp_path):
    lines = ["env_steps 3", "env_steps 4\nplaying 2 games\n"]
    sleeper.said = lambda: lines.pop(0) if len(lines) > 1 else lines[0]
    assert came_at(sleeper, tmp_path, Moment("evaluation"), []) == []
    lines[:] = ["displaying 2 games"]
    assert came_at(sleeper, tmp_path, Moment("evaluation"), [], limit=0.2) is None


def test_the_pace_is_that_of_the_files_as_they_appear(tmp_path):
    code = """
import pathlib, sys, time
time.sleep(0.5)
for name in ("config.json", "checkpoint_000000004.safetensors", "checkpoint_000000010.safetensors", "eval.json"):
    path = pathlib.Path(sys.argv[1], name)
    path.with_name(name + ".tmp").write_bytes(b"")
    time.sleep(0.2)
    path.with_name(name + ".tmp").rename(path)
    time.sleep(0.3)
"""
    with contextlib.closing(watches.Watch(tmp_path)) as watch:
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
        pace = moments.measured(SimpleNamespace(process=process, started=time.monotonic()), watch)
    assert pace.iterations == 10
    assert pace.write_s.keys() == {"config.json", "checkpoint_*", "eval.json"}
    assert all(0.15 < seconds < 0.4 for seconds in pace.write_s.values())
    assert 0.6 < pace.start_s < 2
    assert pace.iteration_s == pytest.approx(0.1, rel=0.3)
    assert pace.evaluation_s == pytest.approx(0.5, rel=0.3)
