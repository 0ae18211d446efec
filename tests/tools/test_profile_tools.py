"""tools/profile: what nsys.sh and ncu.sh would run, trace.py on a small run, roofline.py's counts against the trainer itself."""

import gzip
import itertools
import json
import os
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from speedyzero.config import ConfigError
from speedyzero.envs import describe
from speedyzero.loop import Trainer
from speedyzero.stages import PARTS, STAGES
from tests.bench import operations
from tests.tools import tools_support

TOOLS = tools_support.TOOLS / "profile"


@pytest.fixture
def tool(monkeypatch):
    return partial(tools_support.load_tool, monkeypatch, "profile")


def run(tool: str, *arguments: str, path: str | None = None) -> subprocess.CompletedProcess:
    start = ["/bin/bash"] if tool.endswith(".sh") else [sys.executable]
    env = os.environ | ({"PATH": path} if path else {})
    return subprocess.run([*start, str(TOOLS / tool), *arguments], capture_output=True, text=True, check=False, env=env)


def the_error(done: subprocess.CompletedProcess) -> str:
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if not line.startswith("USDT:")]  # torch's profiler says when it starts
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def flags(done: subprocess.CompletedProcess) -> list[str]:
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    return shlex.split(done.stdout)


# nsys.sh, ncu.sh


def test_nsys_prints_a_command_with_graph_nodes_and_with_names_that_hold_spaces():
    words = flags(run("nsys.sh", "--dry-run", "--delay", "5", "--duration", "7", "my runs/a b", "--", "--run-dir", "/tmp/it's $HOME"))
    assert words[:2] == ["nsys", "profile"]
    expected = {
        "--trace=cuda,nvtx,osrt", "--cuda-graph-trace=node", "--force-overwrite=true", "--output=my runs/a b", "--delay=5", "--duration=7",
        "--kill=sigterm",
    }  # fmt: skip
    assert expected <= set(words)
    assert words[-5:] == ["python", "-m", "speedyzero", "--run-dir", "/tmp/it's $HOME"]


def test_nsys_records_one_stage_in_the_domain_of_the_ranges_instead_of_seconds():
    words = flags(run("nsys.sh", "--dry-run", "--range", "5.4 backward", "--", "--graph", "off"))
    assert {"--capture-range=nvtx", "--nvtx-capture=5.4 backward@speedyzero", "--capture-range-end=stop-shutdown"} <= set(words)
    assert not [word for word in words if word.startswith(("--delay", "--duration"))]
    assert words[-2:] == ["--graph", "off"]


def test_ncu_prints_a_command_for_one_kernel_that_leaves_clocks_and_caches_alone():
    chosen = ("--kernel", "_puct|_backup", "--count", "3", "--skip", "9")
    words = flags(run("ncu.sh", "--dry-run", *chosen, "out/x y", "--", "--env", "a  b"))
    options = dict(itertools.pairwise(words))
    assert words[0] == "ncu"
    assert options["--kernel-name"] == "regex:_puct|_backup"
    assert (options["--launch-count"], options["--launch-skip"], options["--export"]) == ("3", "9", "out/x y")
    assert (options["--clock-control"], options["--cache-control"], options["--graph-profiling"]) == ("none", "none", "node")
    assert options["--target-processes"] == "all"
    assert "--nvtx-include" not in words
    assert words[-5:] == ["python", "-m", "speedyzero", "--env", "a  b"]


@pytest.mark.parametrize("name", [*STAGES, *PARTS])
def test_ncu_filters_by_every_stage_and_then_runs_without_graphs(name):
    words = flags(run("ncu.sh", "--dry-run", "--stage", name, "out", "--", "--env", "Pong-v5"))
    options = dict(itertools.pairwise(words))
    assert options["--nvtx-include"] == f"speedyzero@{name}/"
    assert options["--nvtx-push-pop-scope"] == "process"
    assert words[-2:] == ["--graph", "off"]


@pytest.mark.parametrize(
    ("script", "arguments", "named"),
    [
        ("nsys.sh", ["out"], "no -- before"),
        ("nsys.sh", ["--graph", "off", "--"], "--graph"),
        ("nsys.sh", ["a", "b", "--"], "b: there is an OUT"),
        ("nsys.sh", ["--delay", "--"], "--delay: needs a value"),
        ("nsys.sh", ["--delay", "soon", "--"], "--delay soon"),
        ("nsys.sh", ["--duration", "0", "--"], "--duration 0"),
        ("nsys.sh", ["--range", "2 sear", "--"], "--range 2 sear: is none of 1 ingest, 2 search"),
        ("ncu.sh", ["--stage", "2 search", "--"], "no OUT"),
        ("ncu.sh", ["out", "--"], "neither --kernel nor --stage"),
        ("ncu.sh", ["--stage", "2 s*", "out", "--"], "--stage 2 s*: is none of 1 ingest"),
        ("ncu.sh", ["--stage", "2 search", "out", "--", "--graph", "on"], "--graph: --stage sets"),
        ("ncu.sh", ["--kernel", "x", "--count", "0", "out", "--"], "--count 0"),
        ("ncu.sh", ["--kernel", "x", "--skip", "-1", "out", "--"], "--skip -1"),
    ],
)
def test_a_script_says_in_one_line_what_is_wrong(script, arguments, named):
    assert named in the_error(run(script, "--dry-run", *arguments))


@pytest.mark.parametrize(("script", "first"), [("nsys.sh", []), ("ncu.sh", ["--kernel", "x"])])
def test_where_the_profiler_is_missing_a_script_prints_the_command_and_fails(script, first, tmp_path):
    for name in ("dirname", "grep", "tr", "mkdir"):
        (tmp_path / name).symlink_to(next(p for p in (Path("/usr/bin") / name, Path("/bin") / name) if p.exists()))
    out = tmp_path / "made" / "out"
    done = run(script, *first, str(out), "--", "--env", "Pong-v5", path=str(tmp_path))
    assert done.returncode == 127
    assert f"{script.removesuffix('.sh')} is not on the PATH" in the_error(done)
    assert shlex.split(done.stdout)[-2:] == ["--env", "Pong-v5"]
    assert not out.parent.exists()


@pytest.mark.parametrize(("script", "first"), [("nsys.sh", []), ("ncu.sh", ["--kernel", "x"])])
def test_where_the_profiler_is_there_a_script_runs_what_it_would_print(script, first, tmp_path):
    profiler = tmp_path / script.removesuffix(".sh")
    profiler.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > "{tmp_path}/said"\nexit 3\n')
    profiler.chmod(0o755)
    arguments = [*first, str(tmp_path / "a b" / "out"), "--", "--env", "a  b"]
    done = run(script, *arguments, path=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 3
    assert (tmp_path / "a b").is_dir()
    assert (tmp_path / "said").read_text().splitlines() == flags(run(script, "--dry-run", *arguments))[1:]


# roofline.py


@pytest.fixture
def atari(tool):
    """roofline.py and its model of the `efficientzero` preset on Pong."""
    roofline = tool("roofline")
    config, spec = roofline.read_config("efficientzero", ["--env", "Pong-v5"], "test", "cuda")
    return roofline, roofline.Model(config, spec, 4.0)


def test_the_flops_of_the_networks_are_those_of_the_record(atari):
    _, model = atari
    assert round(sum(flops for flops, _ in model.represent(10)) / 10 / 1e6, 1) == 297.3
    assert round(sum(flops for flops, _ in model.model_step(10)) / 10 / 1e6, 2) == 18.13


def test_a_product_moves_its_operands_and_its_result_once(atari):
    roofline, _ = atari
    a, b, bias = (torch.zeros(shape, device="meta") for shape in ((5, 7), (7, 3), (3,)))
    assert roofline.count(lambda: torch.addmm(bias, a, b).relu(), 2) == ((2 * 5 * 7 * 3, 2 * (35 + 21 + 3 + 15)),)


def test_numbers_have_two_bytes_on_cuda_and_four_on_a_cpu_and_where_learning_is_not_mixed(tool):
    roofline, moved = tool("roofline"), {}
    for device, more in (("cuda", []), ("cuda", ["--amp", "False"]), ("cpu", [])):
        config, spec = roofline.read_config("smoke", ["--env", "Pong-v5", *more], "test", device)
        stages = roofline.by_stage(roofline.Model(config, spec, 4.0).iteration("train", 64), 790, 4.3)
        moved[device, *more] = {name: row["bytes"] for name, row in stages.items()}
    card, plain, host = moved.values()
    assert card["2.2 tree search"] == plain["2.2 tree search"]
    for name in ("5.3 losses", "5.4 backward"):
        assert plain[name] == host[name] == pytest.approx(2 * card[name], rel=1e-5)  # but for values [B], always in fp32
    assert card["2.2 tree search"] < host["2.2 tree search"] < 2 * card["2.2 tree search"]  # trees are the same on both
    assert card["5.2 gather"] < plain["5.2 gather"] == host["5.2 gather"]


def test_an_update_and_its_share_of_the_sweep_cost_what_the_design_says(atari):
    roofline, model = atari
    stages = roofline.by_stage(model.iteration("train", 4096), 790, 4.3)
    assert stages["5 learn"]["flops"] / 8 == pytest.approx(0.74e12, rel=0.015)  # 0.732: no gradient flows into the observations
    assert stages["2 search"]["flops"] * 4096 / 4104 / 8 == pytest.approx(0.62e12, rel=0.01)


COUNTED = """
import json, sys
sys.path.insert(0, sys.argv[1])
import compile_table, dataclasses, roofline, torch
from speedyzero.iteration import iteration
from speedyzero.stages import STAGES

config, spec = roofline.read_config("efficientzero", ["--env", "Pong-v5", "--updates-per-iteration", "2", *sys.argv[2:]], "test")

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
    command = [sys.executable, "-c", COUNTED, str(TOOLS), "--refresh", refresh]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counted, stated = json.loads(done.stdout.splitlines()[-1])
    assert set(counted) == {"2 search", "2.2 tree search", "5 learn", "5.3 losses", "5.4 backward"}
    assert stated == counted


def test_the_bytes_of_the_kernels_are_those_that_the_bench_counts(tool):
    roofline, at = tool("roofline"), operations.sizes("cpu", "cpu")
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


def test_a_launch_takes_the_longer_of_its_flops_and_its_bytes(tool):
    roofline = tool("roofline")
    work = roofline.Work("2.2 tree search", "", ((2e12, 1e12), (1e12, 3e12)), times=10)
    assert work.seconds(1, 1) == pytest.approx(10 * (2 + 3))
    assert work.seconds(2, 3) == pytest.approx(10 * (1 + 1))
    stages = roofline.by_stage([work, roofline.Work("2.1 observe", "", ((0, 1e12),))], 1, 1)
    assert stages["2 search"] == {"flops": 30e12, "bytes": 41e12, "seconds": 51}


def test_the_recipe_has_the_iterations_that_a_run_has(tool, tiny_config):
    roofline = tool("roofline")
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


def test_the_shares_of_the_floor_add_up_and_so_does_the_recipe(tmp_path):
    done = run("roofline.py", "--preset", "cpu", "--env", "Catch-v0", "--json", str(tmp_path / "floor.json"))
    assert done.returncode == 0, done.stderr
    shares = {line[:18].strip(): float(line.split("%")[0].split()[-1]) for line in done.stdout.split("\n\n")[0].splitlines() if "%" in line}
    assert abs(sum(share for name, share in shares.items() if name in STAGES) - 100) < 0.1
    assert abs(shares["2.1 observe"] + shares["2.2 tree search"] - shares["2 search"]) < 0.03
    facts = json.loads((tmp_path / "floor.json").read_text())
    assert facts["total"]["flops"] == pytest.approx(sum(row["flops"] for row in facts["recipe"]))
    snapshots = facts["total"]["seconds"] - sum(row["seconds"] for row in facts["recipe"])
    assert 0 < snapshots < 0.1 * facts["total"]["seconds"]
    assert {row["phase"] for row in facts["recipe"]} == {"collect", "sweep", "train", "learn"}


# trace.py


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """A smoke run in a trace: what was printed, the Chrome trace and the JSON."""
    folder = tmp_path_factory.mktemp("trace")
    arguments = ["--env", "Catch-v0", "--preset", "smoke", "--device", "cpu", "--iterations", "3", "--warmup", "1"]
    done = run("trace.py", *arguments, "--out", str(folder / "trace.json.gz"), "--json", str(folder / "stages.json"))
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
    done = run("roofline.py", "--measured", str(folder / "stages.json"), *ceilings, "--json", str(tmp_path / "f.json"))
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


def test_device_time_belongs_to_the_innermost_stage_at_the_launch_whenever_it_runs(tool):
    trace = tool("trace")
    ranges = [
        span("an iteration", 0, 100), span("2 search", 10, 40), span("2.1 observe", 11, 20), span("2.2 tree search", 20, 39),
        span("3 act", 50, 60), {"ph": "X", "cat": "gpu_user_annotation", "name": "2 search", "ts": 500, "dur": 9},
    ]  # fmt: skip
    work = [
        *launch(1, 12, 300, 5), *launch(2, 25, 310, 7, "gpu_memcpy"), *launch(3, 39.5, 320, 11), *launch(4, 55, 21, 13, "gpu_memset"),
        *launch(5, 70, 340, 17), *launch(6, 200, 350, 1000),
    ]  # fmt: skip
    spans = trace.spans_of(work + ranges[::-1])
    trace.give_device_time(spans, work)
    rows = trace.table_of(spans, 1)
    device = {name: (round(1e6 * row["device_total"], 6), round(1e6 * row["device_self"], 6)) for name, row in rows.items()}
    assert device == {"2 search": (23, 11), "2.1 observe": (5, 5), "2.2 tree search": (7, 7), "3 act": (13, 13), "outside": (17, 17)}
    host = {name: (round(1e6 * row["cpu_total"], 6), round(1e6 * row["cpu_self"], 6)) for name, row in rows.items()}
    assert host == {"2 search": (30, 2), "2.1 observe": (9, 9), "2.2 tree search": (19, 19), "3 act": (10, 10), "outside": (60, 60)}
    halves = trace.table_of(spans, 2)
    assert halves["2 search"]["device_total"] == pytest.approx(23e-6 / 2)
    table = trace.text_of(rows, cuda=True)
    assert "CUDA total" in table[0]
    assert float(table[1].split("%")[0].split()[-1]) == pytest.approx(100 * 23 / 53, abs=0.01)


def test_a_stage_that_the_list_does_not_know_is_an_error(tool):
    trace = tool("trace")
    with pytest.raises(ConfigError, match=r"'5\.7 dream'.*speedyzero/stages\.py"):
        trace.spans_of([span("5.7 dream", 0, 1)])
    assert trace.spans_of([span("Optimizer.step#SGD.step", 0, 1)]) == []


@pytest.mark.parametrize(
    ("tool_name", "arguments", "named"),
    [
        ("trace.py", ["--iterations", "0"], "--iterations 0"),
        ("trace.py", ["--warmup", "-1"], "--warmup -1"),
        ("trace.py", ["--env", "Nonsense-v9"], "--env Nonsense-v9"),
        ("trace.py", ["--out", "/nowhere/trace.json"], "--out /nowhere/trace.json"),
        ("roofline.py", ["--tflops", "0"], "--tflops 0"),
        ("roofline.py", ["--measured", "/nowhere.json"], "--measured /nowhere.json"),
        ("roofline.py", ["--measured", "/nowhere.json", "--lanes", "4"], "--lanes: --measured brings"),
    ],
)
def test_a_tool_says_in_one_line_what_is_wrong(tool_name, arguments, named):
    assert named in the_error(run(tool_name, *arguments))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_trace_on_cuda_where_there_is_none_is_an_error():
    assert "--device cuda" in the_error(run("trace.py", "--device", "cuda", "--env", "Catch-v0"))


def test_more_iterations_than_the_run_has_are_an_error(tmp_path):
    done = run("trace.py", "--env", "Catch-v0", "--env-steps", "208", "--iterations", "50", "--out", str(tmp_path / "t.json"))
    assert "--iterations 50" in the_error(done)


def test_measured_stages_that_the_list_does_not_know_are_an_error(traced, tmp_path):
    facts = json.loads((traced[1] / "stages.json").read_text())
    facts["stages"]["7 dream"] = facts["stages"]["6 join"]
    (tmp_path / "odd.json").write_text(json.dumps(facts))
    assert "'7 dream' is no stage" in the_error(run("roofline.py", "--measured", str(tmp_path / "odd.json")))
    (tmp_path / "other.json").write_text("[]")
    assert "is not a file that trace.py wrote" in the_error(run("roofline.py", "--measured", str(tmp_path / "other.json")))
