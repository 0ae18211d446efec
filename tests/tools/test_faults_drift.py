"""tools/faults/drift.py: figures of made-up samples, by hand, and which drift breaks which bound."""

import dataclasses

import pytest

from tests.tools.faults_support import drift

Sample = drift.Sample


def samples(count: int = 100, **change) -> list[Sample]:
    """An hour of a run that does not drift, one every 36 s; `change` maps a field to what is added to it, by the share of the hour."""
    made = []
    for number in range(count):
        part = number / (count - 1)
        fair = Sample(
            seconds=3600 * part, rss_mb=700.0, fds=4, threads=7, cpu_s=40.0 * number, iteration=100 * number,
            env_steps=800 * number, updates=100 * number, metrics_bytes=18_000 * number, tensorboard_bytes=12_000 * number,
            checkpoints_bytes=6_000_000,
        )  # fmt: skip
        made.append(dataclasses.replace(fair, **{name: getattr(fair, name) + more(part) for name, more in change.items()}))
    return made


def test_figures_of_made_up_samples_are_those_worked_out_by_hand():
    found = drift.figures(samples(rss_mb=lambda part: 4 * part, fds=lambda part: 2 * (0.1 < part < 0.11)), 5)
    assert found["hours"] == pytest.approx(1)
    assert found["iterations"] == 9900
    assert found["rss_mb_per_hour"] == pytest.approx(4)
    assert found["rss_mb_first"] == pytest.approx(700 + 4 * 10 / 99)
    assert found["rss_mb_last"] == pytest.approx(700 + 4 * 90 / 99)
    assert (found["fds_first"], found["fds_last"], found["fds_least"], found["fds_most"]) == (4, 4, 4, 6)
    assert found["cpu_s_per_iteration_first"] == pytest.approx(0.4)
    assert found["cpu_s_per_iteration_last"] == pytest.approx(0.4)
    assert found["metrics_bytes_per_row_last"] == pytest.approx(900)
    assert found["tensorboard_bytes_per_row_first"] == pytest.approx(600)
    assert found["checkpoints_mb_last"] == 6


def judged(**change) -> list[str]:
    """The names of the bounds that made-up samples break."""
    return [verdict.name for verdict in drift.verdicts(drift.figures(samples(**change), 5)) if not verdict.kept]


CPU = "CPU time of an iteration, last fifth by first"


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({}, []),
        ({"rss_mb": lambda part: 9 * part}, []),
        ({"rss_mb": lambda part: -50 * part}, []),
        ({"rss_mb": lambda part: 11 * part}, ["memory, trend"]),
        ({"rss_mb": lambda part: 30 * part}, ["memory, trend", "memory, last fifth by first"]),
        ({"rss_mb": lambda part: 15 * (part > 0.8) - 60 * (0.5 < part < 0.75)}, ["memory, last fifth by first"]),
        ({"fds": lambda part: 3 * (int(100 * part) % 7 == 1)}, []),
        ({"fds": lambda part: int(part > 0.6)}, ["open files"]),
        ({"fds": lambda part: 5 * (0.4 < part < 0.42)}, ["open files"]),
        ({"threads": lambda part: int(0.4 < part < 0.42)}, ["threads"]),
        ({"cpu_s": lambda part: 200 * part**2}, []),
        ({"cpu_s": lambda part: 400 * part**2}, [CPU]),
        ({"cpu_s": lambda part: -400 * part**2}, [CPU]),
    ],
)
def test_a_drift_breaks_its_bound_and_no_other(change, broken):
    assert judged(**change) == broken


def test_samples_count_once_the_ring_is_full_and_the_start_is_over():
    made = samples(101)  # one every 36 s, 800 steps each
    assert drift.settled(made, 4000) == made[10:]
    assert drift.settled(made, 20_000) == made[25:]
    late = [dataclasses.replace(sample, updates=0 if number < 40 else 1) for number, sample in enumerate(made)]
    assert drift.settled(late, 0) == late[40:]
    unsaved = [dataclasses.replace(sample, checkpoints_bytes=0 if number < 30 else 1) for number, sample in enumerate(made)]
    assert drift.settled(unsaved, 0) == unsaved[30:]
    assert drift.settled([], 4000) == []
    with pytest.raises(ValueError, match="9 samples after the warm-up: ten are needed"):
        drift.figures(made[:9], 5)
