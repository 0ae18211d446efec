"""tools/profile: the commands of the Nsight scripts, trace on a small run, roofline's counts against the trainer itself; detached_run."""

import gzip
import itertools
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from speedyzero.config import ConfigError
from speedyzero.envs import describe
from speedyzero.loop import Trainer
from speedyzero.stages import PARTS, STAGES
from tools.faults.run import ROOT, environment
from tools.profile import operations, roofline, trace


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
    assert words[-5:] == ["python", "-m", "speedyzero", "--run-dir", "/tmp/it's $HOME"]
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


# roofline


@pytest.fixture(scope="module")
def atari() -> roofline.Model:
    """The `efficientzero` preset on Pong."""
    return roofline.Model(*roofline.read_config("efficientzero", ["--env", "Pong-v5"], "test", "cuda"), 4.0)


def test_the_flops_of_the_networks_and_stages_are_those_of_the_design(atari):
    assert round(sum(flops for flops, _ in atari.represent(10)) / 10 / 1e6, 1) == 297.3
    assert round(sum(flops for flops, _ in atari.model_step(10)) / 10 / 1e6, 2) == 18.13
    stages = roofline.by_stage(atari.iteration("train", 4096), 790, 4.3)
    assert stages["5 learn"]["flops"] / 8 == pytest.approx(0.74e12, rel=0.015)  # 0.732: no gradient flows into the observations
    assert stages["2 search"]["flops"] * 4096 / 4104 / 8 == pytest.approx(0.62e12, rel=0.01)


def test_a_product_moves_its_operands_and_its_result_once_and_takes_the_longer_of_flops_and_bytes():
    a, b, bias = (torch.zeros(shape, device="meta") for shape in ((5, 7), (7, 3), (3,)))
    assert roofline.count(lambda: torch.addmm(bias, a, b).relu(), 2) == ((2 * 5 * 7 * 3, 2 * (35 + 21 + 3 + 15)),)
    work = roofline.Work("2.2 tree search", "", ((2e12, 1e12), (1e12, 3e12)), times=10)
    assert work.seconds(1, 1) == pytest.approx(10 * (2 + 3))
    assert work.seconds(2, 3) == pytest.approx(10 * (1 + 1))
    stages = roofline.by_stage([work, roofline.Work("2.1 observe", "", ((0, 1e12),))], 1, 1)
    assert stages["2 search"] == {"flops": 30e12, "bytes": 41e12, "seconds": 51}


def test_the_last_layers_are_counted_in_fp32(atari):
    head, x = atari.network.value_head, torch.zeros(10, atari.network.value_head.hidden.weight.shape[1], device="meta")
    (_, hidden), (_, last) = roofline.count(lambda: head(x), 2)
    width, bins = head.last.weight.shape[1], head.last.weight.shape[0]
    assert last == 4 * (10 * width + width * bins + bins + 10 * bins)
    assert hidden % 2 == 0


COUNTED = """
import dataclasses, json, sys, torch
from tools.profile import compile_table, roofline
from speedyzero.iteration import iteration
from speedyzero.stages import STAGES

config, spec = roofline.read_config("efficientzero", ["--env", "Pong-v5", "--updates-per-iteration", "2", *sys.argv[1:]], "test")

class ByStage(roofline.Launches):
    def __init__(self):
        super().__init__(2)
        self.names, self.flops = [], {}
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.profiler._record_function_enter_new.default:
            self.names.append(args[0])
        elif "_record_function_exit" in str(func):
            self.names.pop()
        before = len(self.found)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        for flops, _ in self.found[before:]:
            for name in self.names:
                self.flops[name] = self.flops.get(name, 0) + flops
        return out

# Autocast knows no meta tensors; it changes no shape.
trainer = compile_table.meta_state(dataclasses.replace(config, amp=False), spec)
with compile_table.LikeCuda(), ByStage() as counted:
    iteration(trainer, "train", config.refresh_roots)
stages = roofline.by_stage(roofline.Model(config, spec, 4.0).iteration("train", config.refresh_roots), 790, 4.3)
print(json.dumps([counted.flops, {name: row["flops"] for name, row in stages.items() if row["flops"]}]))
"""


@pytest.mark.parametrize("refresh", ["sweep", "sampled"])
def test_every_stage_has_the_flops_that_the_trainers_own_iteration_makes_there(refresh):
    command = [sys.executable, "-c", COUNTED, "--refresh", refresh]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stderr
    counted, stated = json.loads(done.stdout.splitlines()[-1])
    assert set(counted) == {"2 search", "2.2 tree search", "5 learn", "5.3 losses", "5.4 backward"}
    assert stated == counted


def test_the_bytes_of_the_kernels_are_those_that_the_bench_counts():
    at = operations.sizes("cpu", "cpu")
    roots, actions, bins, config = at.roots, at.network.actions, at.network.bins, at.config
    batch, unroll, half = config.batch_size, config.unroll, config.simulations // 2
    frame = at.network.in_channels // config.frame_stack * at.network.height * at.network.width
    rows = batch * (unroll + 1)
    assert roofline.root_prior_bytes(roots, actions, logit=4, noise=4) == operations.root_prior(at, 0).bytes
    assert roofline.plant_bytes(roots, actions, config.simulations + 1) == operations.plant(at, 0).bytes
    assert roofline.to_scalar_bytes(roots, bins, logit=4) == operations.to_scalar(at, 0).bytes
    both = sum(roofline.cross_entropy_bytes(rows, bins, 4, forward=forward) for forward in (True, False))
    assert both == operations.cross_entropy(at, 0).bytes
    gathered = roofline.observations_bytes(rows, batch * (unroll + config.frame_stack), frame, 4, config.frame_stack, 4)
    assert gathered == operations.observations(at, 0).bytes
    assert roofline.targets_bytes(batch, actions, unroll, config.n_step) == operations.targets(at, 0).bytes
    trees = operations.grown(at, 0, half)
    depth = operations.select_puct(trees, half).depth.double().mean().item()
    assert roofline.select_bytes("puct", roots, actions, depth) == pytest.approx(operations.puct(at, 0).bytes)
    assert roofline.select_bytes("gumbel", roots, actions, 0) == 25 * roots
    assert roofline.backup_bytes(roots, actions, depth, half) == pytest.approx(operations.backup(at, 0).bytes)
    parameters = sum(p.numel() for p in operations.Network(at.network).parameters())
    assert roofline.optimizer_bytes("clipped-lars", parameters) == operations.clipped_lars_step(at, 0).bytes
    assert roofline.optimizer_bytes("sgd", parameters) == operations.sgd_step(at, 0).bytes


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


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """A smoke run in a trace: what was printed, the Chrome trace and the JSON."""
    folder = tmp_path_factory.mktemp("trace")
    arguments = ["--env", "Catch-v0", "--preset", "smoke", "--device", "cpu", "--iterations", "3", "--warmup", "1"]
    done = run("trace", *arguments, "--out", str(folder / "trace.json.gz"), "--json", str(folder / "stages.json"))
    assert done.returncode == 0, done.stderr
    return done.stdout, folder


def test_a_trace_names_every_stage_that_runs_and_its_shares_add_up(traced):
    text, folder = traced
    rows = {line[:18].strip(): line for line in text.splitlines() if line.count("%") == 2}
    assert set(rows) == {*STAGES, *PARTS, "outside"}
    own = {name: float(line.split("%")[-2].split()[-1]) for name, line in rows.items()}
    assert abs(sum(own.values()) - 100) < 0.1
    events = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))["traceEvents"]
    assert {*STAGES, *PARTS} <= {event["name"] for event in events if event.get("cat") == "user_annotation"}


def test_the_time_of_a_stage_is_its_own_and_that_of_its_parts(traced):
    _, folder = traced
    facts = json.loads((folder / "stages.json").read_text())
    stages = facts["stages"]
    for name in STAGES:
        parts = sum(stages[part]["cpu_total"] for part in PARTS if part[0] == name[0])
        assert stages[name]["cpu_total"] == pytest.approx(stages[name]["cpu_self"] + parts)
        assert stages[name]["calls"] == pytest.approx(1)
    whole = sum(stages[name]["cpu_total"] for name in STAGES) + facts["outside"]["cpu_total"]
    assert whole == pytest.approx(facts["seconds"], rel=0.2)
    assert facts["config"]["graph"] == "off"


def test_a_trace_can_be_compared_with_its_floor(traced, tmp_path):
    text, folder = traced
    ceilings = ("--tflops", "0.1", "--tbs", "0.02")
    done = run("roofline", "--measured", str(folder / "stages.json"), *ceilings, "--json", str(tmp_path / "f.json"))
    assert done.returncode == 0, done.stderr
    facts, floor = (json.loads(path.read_text()) for path in (folder / "stages.json", tmp_path / "f.json"))
    assert f"R {facts['roots']}," in text
    assert floor["roots"] == facts["roots"]
    line = next(line for line in done.stdout.splitlines() if line.startswith("5 learn"))
    expected = 100 * floor["stages"]["5 learn"]["seconds"] / facts["stages"]["5 learn"]["cpu_total"]
    assert float(line.split("%")[1].split()[-1]) == pytest.approx(expected, abs=0.01)
    assert any(line.startswith("6 join") for line in done.stdout.splitlines())


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


def test_a_stage_that_the_list_does_not_know_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"'5\.7 dream'.*speedyzero/stages\.py"):
        trace.table_of([span("5.7 dream", 0, 1)], 1)
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"is not a file that trace.py wrote"):
        roofline.read_trace(tmp_path / "other.json")
