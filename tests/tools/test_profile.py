"""tools/profile: the commands of the Nsight scripts, detached_run, launches and floors of an iteration, trace on a small run."""

import dataclasses
import gzip
import itertools
import json
import operator
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from speedyzero.__main__ import ROOT_FLOPS, SAMPLE_FLOPS, SIMULATION_FLOPS
from speedyzero.config import ConfigError
from speedyzero.envs import describe
from speedyzero.loop import Trainer
from speedyzero.nets import Network
from speedyzero.stages import PARTS, STAGES
from tools.faults.run import ROOT, environment
from tools.profile import launches, operations, roofline, trace
from tools.profile.settings import read_config


def run(*words: str, **variables: str) -> subprocess.CompletedProcess:
    """A script of tools/profile, or a module of it, as a user runs it."""
    script = words[0].endswith(".sh")
    start = ["bash", str(ROOT / "tools/profile" / words[0])] if script else [sys.executable, "-m", f"tools.profile.{words[0]}"]
    return subprocess.run([*start, *words[1:]], capture_output=True, text=True, check=False, env=environment() | variables)


def printed(*words: str) -> list[str]:
    done = run(*words)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


# nsys.sh, ncu.sh


def test_nsys_records_graph_nodes_for_some_seconds_or_one_stage():
    words = printed("nsys.sh", "--dry-run", "--delay", "5", "my runs/a b", "--", "--run-dir", "/tmp/it's $HOME")
    assert words[:2] == ["nsys", "profile"]
    assert {"--cuda-graph-trace=node", "--output=my runs/a b", "--delay=5", "--duration=10", "--kill=sigterm"} <= set(words)
    assert words[-5:] == ["python3", "-m", "speedyzero", "--run-dir", "/tmp/it's $HOME"]
    words = printed("nsys.sh", "--dry-run", "--range", "5.4 backward", "out", "--", "--graph", "off")
    assert {"--capture-range=nvtx", "--nvtx-capture=5.4 backward@speedyzero", "--capture-range-end=stop-shutdown"} <= set(words)
    assert not [word for word in words if word.startswith("--duration")]


def test_ncu_leaves_clocks_and_caches_alone_and_runs_a_stage_without_graphs():
    words = printed("ncu.sh", "--dry-run", "--kernel", "_puct|_backup", "--count", "3", "--skip", "9", "out/x y", "--", "--env", "a  b")
    options = dict(itertools.pairwise(words))
    assert options["--kernel-name"] == "regex:_puct|_backup"
    assert (options["--launch-count"], options["--launch-skip"], options["--export"]) == ("3", "9", "out/x y")
    assert (options["--clock-control"], options["--cache-control"], options["--graph-profiling"]) == ("none", "none", "node")
    assert words[-2:] == ["--env", "a  b"]
    words = printed("ncu.sh", "--dry-run", "--stage", "2 search", "out", "--", "--env", "Pong-v5")
    options = dict(itertools.pairwise(words))
    assert (options["--nvtx-include"], options["--nvtx-push-pop-scope"]) == ("speedyzero@2 search/", "process")
    assert words[-2:] == ["--graph", "off"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["nsys.sh", "--range", "2 sear", "out", "--"], "error: --range 2 sear: is no stage"),
        (["nsys.sh", "out"], "error: usage"),
        (["ncu.sh", "out", "--"], "error: neither --kernel nor --stage"),
        (["ncu.sh", "--stage", "2 s*", "out", "--"], "error: --stage 2 s*: is no stage"),
    ],
)
def test_a_script_refuses_what_would_profile_nothing_or_everything(words, named):
    done = run(*words)
    assert done.returncode == 2
    assert done.stderr.startswith(named)


# detached_run.sh

FAKE = """#!/bin/bash
if [ "$2" != speedyzero ]; then exec {python} "$@"; fi
exec {python} - "${{@: -1}}" "$@" <<'CODE'
import json, os, signal, sys, time
run, resumed = sys.argv[1], "--resume" in sys.argv
os.makedirs(run, exist_ok=True)
print("resumed" if resumed else "begun", flush=True)
json.dump({{"env": "Pong-v5", "preset": "smoke", "seed": 0, "device": "cpu", "env_steps": 9}}, open(run + "/config.json", "w"))
open(run + "/metrics.jsonl", "a").write('{{"iteration": 3, "env_steps": 4, "updates": 5, "wall_s": 6}}\\n')
while not os.path.exists(run + "/end"):
    time.sleep(0.05)
json.dump({{"env_steps": 4, "updates": 5, "wall_s": 6}}, open(run + "/summary.json", "w"))
CODE
"""


def test_a_detached_run_goes_on_between_calls_is_resumed_after_it_died_and_ends(tmp_path):
    python, run_dir, out = tmp_path / "python", tmp_path / "run", tmp_path / "out"
    python.write_text(FAKE.format(python=sys.executable))
    python.chmod(0o755)

    def call(seconds: int) -> subprocess.CompletedProcess:
        return run("detached_run.sh", str(run_dir), str(seconds), "--", "--env", "Pong-v5", PYTHON=str(python), OUT=str(out))

    first = call(1)
    assert first.returncode == 75, first.stdout + first.stderr
    while not (run_dir / "metrics.jsonl").exists():
        time.sleep(0.05)
    pid = int((tmp_path / "run.pid").read_text())
    assert call(0).stdout.splitlines()[-1] == "goes on"
    assert int((tmp_path / "run.pid").read_text()) == pid  # the same process
    os.kill(pid, 9)
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        time.sleep(0.05)
    assert call(0).returncode == 75
    (run_dir / "end").touch()
    last = call(600)
    assert last.returncode == 0, last.stdout + last.stderr
    assert (tmp_path / "run.log").read_text().split() == ["begun", "resumed"]
    names = {"metrics.jsonl", "config.json", "summary.json", "run.log", "curve.csv", "curve.png"}
    assert {path.name for path in out.iterdir()} == names


# launches, roofline


@pytest.fixture(scope="module")
def atari() -> launches.Iterations:
    """The `efficientzero` preset on Pong."""
    return launches.Iterations(*read_config("efficientzero", ["--env", "Pong-v5"], "test", "cuda"))


MOST_LAUNCHES = {"an update": 635, "a simulation": 22}
"""Lower them when the code launches less."""


@pytest.mark.slow
def test_an_update_and_a_simulation_launch_no_more_than_they_did(atari):
    found = {"an update": launches.number(atari.update), "a simulation": launches.number(atari.simulation(4104))}
    assert all(found[what] <= MOST_LAUNCHES[what] for what in found), found


@pytest.mark.slow
def test_the_flops_are_those_of_the_design(atari):
    stages = roofline.by_stage(atari.iteration("train", 4096), 790, 4.3)
    assert set(stages) == {*STAGES, *PARTS} - {"6 join"}
    assert stages["5 learn"]["flops"] / 8 == pytest.approx(0.74e12, rel=0.015)  # 0.732: no gradient flows into the observations
    assert stages["5 learn"]["flops"] / 8 / 256 == pytest.approx(SAMPLE_FLOPS, rel=0.002)
    # 297.3 MFLOP for the representation of each root, 18.13 for each of its simulations, one more prediction.
    assert pytest.approx(297.3e6 + 7.3e6) == ROOT_FLOPS
    assert stages["2 search"]["flops"] == pytest.approx(4104 * (ROOT_FLOPS + 50 * SIMULATION_FLOPS), rel=0.002)
    assert stages["2 search"]["launches"] > 50 * launches.number(atari.simulation(4104))


def test_what_is_multiplied_is_what_runs_when_all_of_it_is_run(tiny_config):
    config = tiny_config(simulations=4, updates_per_iteration=3, refresh_roots=16)
    config = dataclasses.replace(config, device="cuda", amp=True)
    counted = launches.Iterations(config, describe(config.env))
    multiplied, run = counted.iteration("train", 16), counted._run("train", 16, 4, 3)
    assert launches.number(multiplied) == launches.number(run) > 100
    for value in ("flops", "moved", "least"):
        both = [launches.summed(found, operator.attrgetter(value)) for found in (multiplied, run)]
        assert both[0] == pytest.approx(both[1])


def test_a_product_moves_its_operands_once_and_views_launch_nothing():
    a, b, bias = (torch.zeros(shape) for shape in ((5, 7), (7, 3), (3,)))
    with launches.Counting() as counting:
        torch.addmm(bias, a, b).relu().t().t().view(-1)[torch.tensor([0, 1])].expand(9, 2)
    found = {launch.name: launch for launch in counting.found}
    assert set(found) == {"addmm", "relu", "index"}
    assert (found["addmm"].flops, found["addmm"].least) == (2 * 5 * 7 * 3, 4 * (35 + 21 + 3 + 15))
    assert found["addmm"].floor(1e-12, 1e-12) == max(210, 296)
    assert found["relu"].floor(1, 1) == 0
    assert found["relu"].seconds(1, 1e-12, 2.0) == 4 * 30 + 2e-6
    assert found["index"].moved == 4 * 4 + 8 * 2  # not all that it may choose from


def test_an_operation_on_many_tensors_is_a_launch_for_64_of_them_and_for_320_chunks():
    def launched(*sizes: int) -> int:
        return launches.multi_tensor_launches([torch.empty(size, device="meta") for size in sizes])

    assert [launched(*[1] * count) for count in (0, 1, 64, 65, 128, 129)] == [0, 1, 1, 2, 2, 3]
    assert [launched(65536 * count) for count in (320, 321, 640)] == [1, 2, 2]
    assert launched(*[65536 * 32 + 1] * 10) == 2  # 330 chunks


def test_the_bytes_of_the_kernels_are_those_that_their_readme_states():
    at = operations.sizes("smoke", "cpu")
    roots, actions, bins, config = at.roots, at.network.actions, at.network.bins, at.config
    rows, simulations = config.batch_size * (config.unroll + 1), config.simulations
    parameters = sum(p.numel() for p in Network(at.network).parameters())
    expected = {
        "plant": roots * (34 * actions + 48 * (simulations + 1)), "to_scalar": roots * (4 * bins + 4),
        "cross_entropy": 12 * rows * bins + 4 * rows * 6, "clipped_lars_step": 28 * parameters, "sgd_step": 24 * parameters,
        "select_puct": roots * (operations.puct(at, 0).depth * (24 * actions + 4) + 25),
    }  # fmt: skip
    for name, moved in expected.items():
        assert operations.MAKERS[name](at, 0).cost()[0] == pytest.approx(moved, rel=0.01), name


def test_the_recipe_has_the_iterations_that_a_run_has(tiny_config):
    # No game of MountainCar ends within 60 steps: an end would cost a lane a transition, and the recipe knows of none.
    config = tiny_config(env="MountainCar-v0", env_steps=240, ring_positions=400)
    trainer, found = Trainer(config, describe(config.env), torch.device("cpu")), {}
    trainer.start()
    while (phase := trainer.phase()) is not None:
        key = phase, 0 if phase == "collect" else trainer.roots()
        found[key] = found.get(key, 0) + 1
        trainer.step(phase)
    assert dict(roofline.recipe(config)) == found
    assert {phase for phase, _ in found} == {"collect", "sweep", "train", "learn"}
    assert len({roots for _, roots in found}) > 2


# trace


@pytest.mark.slow
def test_a_trace_names_every_stage_that_runs_and_its_shares_add_up(tmp_path):
    arguments = ["--env", "Catch-v0", "--preset", "smoke", "--device", "cpu", "--iterations", "3", "--warmup", "1"]
    done = run("trace", *arguments, "--out", str(tmp_path / "trace.json.gz"))
    assert done.returncode == 0, done.stderr
    rows = {line[:18].strip(): line for line in done.stdout.splitlines() if line.count("%") == 2}
    assert set(rows) == {*STAGES, *PARTS, "outside"}
    assert abs(sum(float(line.split("%")[-2].split()[-1]) for line in rows.values()) - 100) < 0.1
    events = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))["traceEvents"]
    assert {*STAGES, *PARTS} <= {event["name"] for event in events if event.get("cat") == "user_annotation"}


def span(name: str, start: float, end: float) -> dict:
    return {"ph": "X", "cat": "user_annotation", "name": name, "ts": start, "dur": end - start}


def launch(correlation: int, at: float, start: float, duration: float, category: str = "kernel") -> list[dict]:
    """A launch by the host at a time, and the device's work for it."""
    args = {"correlation": correlation}
    return [
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": at, "dur": 1, "tid": 7 * correlation, "args": args},
        {"ph": "X", "cat": category, "name": "k", "ts": start, "dur": duration, "args": args},
    ]


def test_device_time_belongs_to_the_innermost_stage_at_the_launch_whenever_it_runs():
    ranges = [
        span("an iteration", 0, 100), span("2 search", 10, 40), span("2.1 observe", 11, 20), span("2.2 tree search", 20, 39),
        span("3 act", 50, 60), {"ph": "X", "cat": "gpu_user_annotation", "name": "2 search", "ts": 500, "dur": 9},
    ]  # fmt: skip
    work = [
        *launch(1, 12, 300, 5), *launch(2, 25, 310, 7, "gpu_memcpy"), *launch(3, 39.5, 320, 11), *launch(4, 55, 21, 13, "gpu_memset"),
        *launch(5, 70, 340, 17), *launch(6, 200, 350, 1000),
    ]  # fmt: skip
    rows = trace.table_of(work + ranges[::-1], 1)
    device = {name: (round(1e6 * row["device_total"], 6), round(1e6 * row["device_self"], 6)) for name, row in rows.items()}
    assert device == {"2 search": (23, 11), "2.1 observe": (5, 5), "2.2 tree search": (7, 7), "3 act": (13, 13), "outside": (17, 17)}
    host = {name: (round(1e6 * row["cpu_total"], 6), round(1e6 * row["cpu_self"], 6)) for name, row in rows.items()}
    assert host == {"2 search": (30, 2), "2.1 observe": (9, 9), "2.2 tree search": (19, 19), "3 act": (10, 10), "outside": (60, 60)}
    halves = trace.table_of(work + ranges, 2)
    assert halves["2 search"]["device_total"] == pytest.approx(23e-6 / 2)
    table = trace.text_of(rows, cuda=True)
    assert float(table[1].split("%")[0].split()[-1]) == pytest.approx(100 * 23 / 53, abs=0.01)


def test_a_stage_that_the_list_does_not_know_is_an_error():
    with pytest.raises(ConfigError, match=r"'5\.7 dream'.*speedyzero/stages\.py"):
        trace.table_of([span("5.7 dream", 0, 1)], 1)
