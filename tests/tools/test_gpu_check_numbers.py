"""The arithmetic of tools/profile/gpu_check.py's parts, by hand: deviations, times, the projected recipe, idle shares."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

# Last, since trace.py there has the name of a module of Python's own.
sys.path.append(str(Path(__file__).parents[2] / "tools" / "profile"))

from checks import compare, emulators, idle, projection, speed, train
from checks.clock import Clock, percentile
from checks.compare import Deviation, deviation
from checks.job import Record


@pytest.fixture
def record(tmp_path):
    return Record(tmp_path / "part.json")


# compare


def test_a_deviation_is_the_greatest_difference_and_its_share_of_the_number_and_the_typical_size():
    got = deviation(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0]))
    # rms of 3 and 4 is sqrt(12.5)
    assert (got.bitwise, got.differ, got.largest) == (False, 1, 0.5)
    assert got.relative == pytest.approx(0.5 / (4 + math.sqrt(12.5)))
    assert got.within(0.1)
    assert not got.within(0.06)


@pytest.mark.parametrize(
    ("got", "expected", "bitwise", "differ", "largest"),
    [
        ([1.0, math.nan, math.inf], [1.0, math.nan, math.inf], True, 0, 0.0),
        ([0.0], [-0.0], False, 0, 0.0),
        ([math.nan, 1.0, 2.0], [math.nan, 1.0, math.inf], False, 1, math.inf),
        ([math.nan, 1.0], [1.0, 1.0], False, 1, math.inf),
        ([1.0, 1.0], [math.nan, 1.0], False, 1, math.inf),
        ([math.inf], [-math.inf], False, 1, math.inf),
        ([1.0], [math.inf], False, 1, math.inf),
        ([], [], True, 0, 0.0),
    ],
)
def test_what_is_not_finite_equals_only_itself(got, expected, bitwise, differ, largest):
    found = deviation(torch.tensor(got), torch.tensor(expected))
    assert (found.bitwise, found.differ, found.largest) == (bitwise, differ, largest)
    assert found.relative == largest


def test_a_deviation_from_zero_is_infinite_and_integers_of_two_widths_are_compared_as_numbers():
    assert deviation(torch.tensor([1e-30]), torch.tensor([0.0])).relative == math.inf
    same = deviation(torch.tensor([1, 2], dtype=torch.int32), torch.tensor([1.0, 2.0], dtype=torch.float64))
    assert same == Deviation(True, 0, 0.0, 0.0)
    assert deviation(torch.tensor([1, 2], dtype=torch.int32), torch.tensor([1, 3])).differ == 1
    with pytest.raises(ValueError, match="shapes"):
        deviation(torch.zeros(2), torch.zeros(3))


def test_a_tensor_compared_in_chunks_is_compared_as_a_whole(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(3, 7, generator=generator), torch.randn(3, 7, generator=generator)
    other[:2] = one[:2]
    whole = deviation(one, other)
    monkeypatch.setattr(compare, "CHUNK", 4)
    in_chunks = deviation(one, other)
    assert (in_chunks.bitwise, in_chunks.differ, in_chunks.largest) == (False, 7, whole.largest)
    assert in_chunks.relative == pytest.approx(whole.relative)


# clock, speed, projection


def test_a_percentile_is_a_value_that_so_many_do_not_exceed():
    assert [percentile([5.0, 1.0, 4.0, 2.0, 3.0], share) for share in (0.2, 0.5, 0.95, 1.0)] == [1.0, 3.0, 5.0, 5.0]
    assert percentile(list(range(1, 101)), 0.95) == 95


def clock_with(calls: list[float], captures: bool, phase: str = "train") -> Clock:
    clock = Clock(SimpleNamespace(config=SimpleNamespace(lanes=8, updates_per_iteration=2)), captures)
    clock.calls[phase, 64] = calls
    return clock


def test_the_first_run_and_the_capture_are_told_apart_from_what_is_to_come():
    row = clock_with([9.0, 1.5, 0.5, 0.4, 0.6], captures=True).row(("train", 64))
    assert row == {
        "phase": "train", "roots": 64, "iterations": 3, "ms_median": 500, "ms_p95": 600, "ms_least": 400, "iterations_a_second": 2,
        "env_steps_a_second": 16, "updates_a_second": 4, "first_run_s": 9.0, "capture_s": 1.0,
    }  # fmt: skip
    uncaptured = clock_with([9.0, 0.25, 0.5, 0.4], captures=False, phase="sweep").row(("sweep", 64))
    assert (uncaptured["ms_median"], uncaptured["capture_s"]) == (400, None)
    assert uncaptured["env_steps_a_second"] is uncaptured["updates_a_second"] is None


def test_what_is_done_most_in_a_run_is_measured_first_and_every_phase_before_a_second_r():
    recipe = {("collect", 0): 250, ("sweep", 512): 4, ("train", 512): 1313, ("train", 4096): 6249, ("learn", 4096): 2750}
    assert speed.order(recipe) == [("train", 4096), ("learn", 4096), ("collect", 0), ("sweep", 512), ("train", 512)]


@pytest.mark.parametrize(
    ("points", "roots", "ms", "source"),
    [
        ({8: 3.0, 16: 5.0}, 16, 5.0, "measured"),
        ({8: 3.0, 16: 5.0}, 12, 4.0, "interpolated from R 8 and 16"),
        ({8: 3.0, 16: 5.0, 64: 6.0}, 32, 5.0 + 16 / 48, "interpolated from R 16 and 64"),
        ({2: 1.0, 8: 3.0, 16: 5.0}, 32, 9.0, "extrapolated from R 8 and 16"),
        ({32: 3.0, 64: 5.0, 128: 8.0}, 1, 3.0, "extrapolated from R 32 and 64"),
        ({32: 3.0, 64: 4.0, 128: 1.0}, 16, 2.5, "extrapolated from R 32 and 64"),
        ({8: 3.0}, 64, 3.0, "as R 8"),
        ({}, 64, None, "not measured"),
    ],
)
def test_what_was_not_measured_lies_on_a_line_and_says_so(points, roots, ms, source):
    assert projection.estimate(points, roots) == (ms, source)


def test_the_projection_adds_up_by_hand():
    recipe = {("collect", 0): 10, ("train", 8): 100, ("train", 16): 200, ("learn", 16): 50}
    floors = {("collect", 0): 0.0, ("train", 8): 1.0, ("train", 16): 2.0, ("learn", 16): 1.5}
    parts = projection.project(recipe, {("collect", 0): 1.0, ("train", 16): 4.0}, floors)
    assert [(part.phase, part.roots, part.ms, part.source) for part in parts] == [
        ("collect", 0, 1.0, "measured"), ("learn", 16, 4.0, "train, measured"), ("train", 8, 4.0, "as R 16"),
        ("train", 16, 4.0, "measured"),
    ]  # fmt: skip
    whole = projection.total(parts, snapshots=10, snapshot_ms=20.0, snapshot_floor_ms=1.0)
    assert whole["seconds"] == pytest.approx(0.01 + 0.2 + 0.4 + 0.8 + 0.2)
    assert whole["floor_seconds"] == pytest.approx(0.1 + 0.4 + 0.075 + 0.01)
    assert whole["floor_share"] == pytest.approx(0.585 / 1.61)
    assert (whole["measured"], whole["complete"]) == (False, True)
    missing = projection.total(projection.project({("sweep", 8): 4}, {}, {("sweep", 8): 1.0}), 0, 0.0, 0.0)
    assert (missing["complete"], missing["seconds"], missing["floor_share"]) == (False, 0.0, None)


def test_the_gaps_are_seconds_above_the_floor_not_shares():
    assert projection.gaps({"a": 5.0, "b": 100.0, "c": 1.0}, {"a": 1.0, "b": 98.0}) == [("a", 4.0), ("b", 2.0), ("c", 1.0)]


# idle


@pytest.mark.parametrize(
    ("intervals", "length"),
    [([], 0), ([(0, 4), (2, 6), (8, 9)], 7), ([(8, 9), (0, 10), (1, 2)], 10), ([(0, 1), (1, 2)], 2), ([(3, 5), (0, 1)], 3)],
)
def test_busy_is_the_union_of_the_intervals(intervals, length):
    assert idle.busy(intervals) == length


def event(category: str, name: str, at: float, duration: float, correlation: int) -> dict:
    return {"ph": "X", "cat": category, "name": name, "ts": at, "dur": duration, "args": {"correlation": correlation}}


REPLAYS = [
    event("cuda_runtime", "cudaGraphLaunch", 0, 5, 1), event("cuda_runtime", "cudaLaunchKernel", 6, 1, 2),
    event("cuda_driver", "cuLaunchKernelEx", 8, 1, 3), event("cuda_runtime", "cudaMemcpyAsync", 9, 1, 4),
    event("cuda_runtime", "cudaStreamSynchronize", 10, 1, 5), event("cuda_runtime", "cudaGraphLaunch", 500, 5, 6),
    event("kernel", "gemm", 100, 200, 1), event("kernel", "conv", 250, 100, 1), event("gpu_memcpy", "Memcpy HtoD", 400, 50, 6),
    event("kernel", "fill", 20, 10, 2), event("kernel", "philox", 40, 10, 3), event("gpu_memset", "Memset", 600, 30, 6),
    event("gpu_user_annotation", "5 learn", 0, 1000, 9), event("cpu_op", "aten::add", 0, 1000, 9),
]  # fmt: skip


def test_the_idle_share_and_what_is_launched_beside_the_graphs(record):
    idle.tell(record, REPLAYS, watched_s=1e-3, unwatched_s=400e-6, iterations=2)
    found = record.results["idle"]
    # 10 + 10 + 250 (100 to 350) + 50 + 30 of 1000 us, in two iterations
    assert found["busy_ms"] == pytest.approx(0.175)
    assert found["idle_share_watched"] == pytest.approx(0.65)
    assert found["idle_share_unwatched"] == pytest.approx(1 - 175 / 400)
    assert found["device_work"] == 3
    assert found["launches_an_iteration"] == {
        "graphs": {"cudaGraphLaunch": 1}, "others": {"cudaLaunchKernel": 0.5, "cuLaunchKernelEx": 0.5, "cudaMemcpyAsync": 0.5},
        "work": {"fill": 0.5, "philox": 0.5},
    }  # fmt: skip
    assert record.failures == []
    assert any("idle 56.2 %" in line for line in record.lines)


def test_a_profile_without_graphs_or_without_work_fails(record):
    idle.tell(record, [event("cuda_runtime", "cudaLaunchKernel", 6, 1, 2)], watched_s=1e-3, unwatched_s=1e-3, iterations=1)
    assert record.failures == [
        "idle: the profiler saw no work of the device", "idle: 0 graph launches an iteration were seen, there must be one",
    ]  # fmt: skip


# emulators


def test_the_hidden_share_by_hand():
    assert emulators.hidden_shares([0.0, 0.0, 0.0], 4.0) == (1.0, 1.0, 1.0)
    assert emulators.hidden_shares([4.0, 4.0, 4.0], 4.0) == (0.0, 0.0, 0.0)
    assert emulators.hidden_shares([0.0, 1.0, 2.0, 3.0, 4.0], 4.0) == (0.5, 0.25, 0.75)
    assert emulators.verdict(0.5, 0.25, 0.75) == "50 % of the turn is hidden, 25 to 75 % by the quartiles of the pairs"
    assert "lost in the noise" in emulators.verdict(0.5, -0.6, 0.75)


# train


def row(iteration: int, steps: int, updates: int, wall: float = 0.0, loss: float | None = 1.0) -> dict:
    return {"iteration": iteration, "env_steps": steps, "updates": updates, "wall_s": wall, "losses/loss": loss}


def test_rates_are_those_of_the_rows_that_learned():
    rows = [row(10, 80, 0, 100.0), row(20, 160, 10, 110.0), row(30, 240, 30, 114.0)]
    assert train.rates(rows) == {"env_steps_a_second": 20.0, "updates_a_second": 5.0}
    assert train.rates(rows[:2]) == {"env_steps_a_second": None, "updates_a_second": None}


ROWS = [row(10, 80, 0), row(20, 160, 10), row(30, 240, 20)]


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ([*ROWS, row(40, 320, 30)], None),
        (ROWS, "the resumed run logged no row"),
        ([*ROWS[:2], row(25, 200, 15), row(40, 320, 30)], "rows that were logged before the stop are gone or changed"),
        ([*ROWS, row(40, 232, 30)], "counters went backwards, from iteration 30 to 40"),
        ([*ROWS, row(30, 240, 20)], "counters went backwards, from iteration 30 to 30"),
        ([*ROWS, row(40, 320, 19)], "counters went backwards, from iteration 30 to 40"),
        ([*ROWS, row(40, 320, 30, loss=None)], "losses that are not finite in 1 rows, the first at iteration 40"),
    ],
)
def test_a_resumed_run_that_lost_something_or_learned_nonsense_is_found_out(after, said):
    found = train.faults(ROWS, after, len(ROWS))
    assert [fault[: len(said or "")] for fault in found] == ([said] if said else [])
