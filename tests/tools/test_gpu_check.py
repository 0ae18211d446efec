"""tools/profile/gpu_check.py: its whole path at toy size on a CPU, and a driver that outlives its parts."""

import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from speedyzero.config import Config, ConfigError
from speedyzero.stages import PARTS, STAGES
from tests.bench.operations import MAKERS

# Last, since trace.py there has the name of a module of Python's own.
sys.path.append(str(Path(__file__).parents[2] / "tools" / "profile"))

import gpu_check
import roofline
from checks import NAMES
from checks.job import JOB, Record, read_job, write_job

TOOLS = Path(gpu_check.__file__).parent
ON_CPU = ["--device", "cpu"]
TINY = [
    "--channels", "4", "--stem-channels", "4", "--head-channels", "2", "--head-hidden", "8", "--lstm", "8", "--support", "5",
    "--projection", "8", "--unroll", "2", "--n-step", "2", "--simulations", "3", "--batch-size", "4", "--refresh-roots", "16",
    "--lanes", "4",
]  # fmt: skip


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    # Neither the installation nor the folder one is in may matter: only the driver's own checkout.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, str(TOOLS / "gpu_check.py"), *arguments], capture_output=True, text=True, check=False, env=env, **options
    )


def the_error(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")
    return done.stderr


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """All parts on a CPU: what was printed, the folder, and the summary. Done once, by whichever of xdist's workers comes first."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "gpu_check"
    folder.mkdir(exist_ok=True)
    out, printed = folder / "new" / "out", folder / "printed"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.exists():
            # More time than it takes: other work on the machine must not matter.
            done = run(str(out), *ON_CPU, *TINY, "--budget", "1500", cwd=folder)
            printed.write_text(done.stdout)
            assert done.returncode == 0, done.stdout + done.stderr
    return printed.read_text(), out, json.loads((out / "summary.json").read_text())


def results(checked, part: str) -> dict:
    return checked[2]["parts"][part]["results"]


def test_every_part_passes_and_is_in_the_table_in_its_file_and_in_the_summary(checked):
    text, out, summary = checked
    assert summary["failed"] == []
    assert list(summary["parts"]) == sorted(NAMES)
    words = " ".join(text.split())
    heads = [line.split()[:2] for line in text.splitlines() if line[:1].isalpha() and " passed " in line and line.endswith(" s")]
    assert heads == [[name, "passed"] for name in NAMES]
    for name in NAMES:
        written = json.loads((out / f"{name}.json").read_text())
        assert written["results"] == summary["parts"][name]["results"]
        assert all(" ".join(line.split()) in words for line in written["lines"])
        assert (out / f"{name}.log").exists()
    assert summary["config"]["channels"] == 4
    assert max(len(line) for line in text.splitlines() if str(out) not in line) <= gpu_check.WIDTH


def test_parity_compares_every_operation_with_its_kernel_in_the_interpreter(checked):
    found = results(checked, "parity")
    assert found["kernels"] == "interpreted"
    assert set(found["operations"]) == set(MAKERS)
    assert all(one["passed"] for tensors in found["operations"].values() for one in tensors.values())
    # Were the reference compared with itself, nothing would differ at all.
    assert sum(not one["bitwise"] for tensors in found["operations"].values() for one in tensors.values()) > 10
    assert {"state weights", "state momentum", "out 0"} <= set(found["operations"]["sgd_step"])


def test_two_runs_of_one_seed_are_bitwise_equal_on_a_cpu_and_that_is_not_called_capture(checked):
    found = results(checked, "capture")
    assert set(found) == {"iterations", "repeatability"}
    assert found["repeatability"]["bitwise"] == found["repeatability"]["tensors"] > 100
    assert sum(times for name, times in found["iterations"].items() if name.startswith("train ")) == 25
    assert found["iterations"]["learn R 8"] == 3


def test_the_projection_covers_the_recipe_at_the_floor_of_the_measured_ceilings(checked):
    text, out, summary = checked
    found, job = results(checked, "speed"), read_job(out, 0.0)
    recipe = roofline.recipe(job.config)
    measured = {(row["phase"], row["roots"]): row["ms_median"] for row in found["phases"]}
    assert set(measured) == set(recipe)
    parts = {(part["phase"], part["roots"]): part for part in found["projection"]["parts"]}
    most = [results(checked, "facts")["ceilings"][name] / 1e12 for name in ("flops_a_second", "bytes_a_second")]
    model = roofline.Model(job.config, job.spec, roofline.Arguments().depth)
    for key, iterations in recipe.items():
        assert parts[key]["seconds"] == pytest.approx(iterations * measured[key] / 1e3)
        floor = sum(work.seconds(*most) for work in model.iteration(*key))
        assert parts[key]["floor_seconds"] == pytest.approx(iterations * floor)
    assert found["projection"]["measured"]
    assert found["memory"]["iterations"] == 20
    assert f"{found['projection']['seconds']:.1f} s = " in text
    assert summary["parts"]["speed"]["status"] == "passed"


def test_the_stages_are_those_of_the_trainer_and_roofline_reads_them(checked):
    _, out, _ = checked
    found, facts = results(checked, "speed")["stages"], roofline.read_trace(out / "stages.json")
    assert set(found["measured"]) == {*STAGES, *PARTS}
    assert facts["roots"] == found["roots"] == 8
    assert found["measured_seconds"] == pytest.approx(sum(row["cpu_self"] for row in facts["stages"].values()))
    most = [results(checked, "facts")["ceilings"][name] / 1e12 for name in ("flops_a_second", "bytes_a_second")]
    job = read_job(out, 0.0)
    works = roofline.Model(job.config, job.spec, roofline.Arguments().depth).iteration("train", 8)
    assert found["floor_seconds"] == pytest.approx(sum(work.seconds(*most) for work in works))
    assert sum(found["floors"].values()) == pytest.approx(found["floor_seconds"])
    above = [gap["seconds"] for gap in found["gaps"]]
    assert above == sorted(above, reverse=True)
    first = found["gaps"][0]
    assert first["seconds"] == pytest.approx(found["measured"][first["stage"]] - found["floors"].get(first["stage"], 0.0))


def test_the_training_run_was_stopped_resumed_and_ended(checked):
    found = results(checked, "train")
    assert found["first"]["exit_code"] == 143
    assert found["resumed"]["exit_code"] in (0, 143)
    assert 0 < found["first"]["updates"] < found["resumed"]["updates"]
    assert found["first"]["checkpoints_bytes"] > 10_000
    assert found["first"]["sigterm_to_exit_s"] > 0
    assert 0 < found["resumed"]["to_the_first_row_s"] < found["resumed"]["wall_s"]
    assert found["resumed"]["updates_a_second"] > 0


def test_the_stand_ins_of_a_cpu_say_so(checked):
    text, _, _ = checked
    assert "stand-in on a CPU" in text
    assert 0 < results(checked, "idle")["stand_in"]["thread_share"] <= 1.05
    turn = results(checked, "emulators")["lanes_4"]["turn"]
    assert turn["steps_a_second"] == pytest.approx(4e3 / turn["ms_median"])
    assert "lanes_32" not in results(checked, "emulators")


def test_a_folder_with_the_results_of_another_check_is_refused(checked, tmp_path):
    _, out, _ = checked
    before = sorted(path.name for path in out.iterdir())
    with pytest.raises(ConfigError, match=rf"^OUT_DIR {out}: holds the results of another check"):
        gpu_check.prepare(out, read_job(out, 0.0).config, [])
    assert sorted(path.name for path in out.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--parts", "facts,tea"], "--parts facts,tea: there is no part 'tea'; choose from facts,parity"),
        (["--parts", ","], "names no part"),
        (["--budget", "0"], "--budget 0: must be greater than 0"),
        (["--budget", "inf"], "--budget inf: must be"),
        (["--env", "Nonsense-v9"], "--env Nonsense-v9"),
        (["--run-dir", "elsewhere"], "--run-dir: is not for a check"),
        (["--resume"], "--resume: is not for a check"),
        (["--graph=off"], "--graph: is not for a check"),
        (["--no-resume"], "--no-resume: is not for a check"),
        (["--lanes", "0"], "--lanes 0: must be greater than 0"),
    ],
)
def test_a_bad_flag_is_one_line_and_leaves_nothing_behind(monkeypatch, capsys, tmp_path, arguments, named):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", str(tmp_path / "out"), *ON_CPU, *arguments])
    with pytest.raises(SystemExit) as left:
        gpu_check.main()
    message = str(left.value)
    assert message.startswith("error: ")
    assert named in message
    assert "\n" not in message
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none_is_one_line(tmp_path):
    assert "--device cuda: PyTorch finds no CUDA device" in the_error(run(str(tmp_path / "out"), "--device", "cuda"))


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^OUT_DIR .*/file/out: cannot be written \(Not a directory\)"):
        gpu_check.prepare(tmp_path / "file" / "out", Config(), [])
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_the_defaults_and_flags_of_a_check_are_those_of_the_run(tmp_path):
    arguments = gpu_check.Arguments(tmp_path, device="cpu")
    config, flags = gpu_check.read(arguments, ["--lanes", "4"])
    assert (config.env, config.preset, config.lanes, config.device) == ("Catch-v0", "smoke", 4, "cpu")
    assert flags == ["--preset", "smoke", "--device", "cpu", "--env", "Catch-v0", "--lanes", "4"]
    write_job(tmp_path, config, flags)
    job = read_job(tmp_path, 5.0)
    assert (job.config, job.arguments) == (dataclasses.replace(config), tuple(flags))
    other, _ = gpu_check.read(dataclasses.replace(arguments, env="CartPole-v1", preset="cpu"), [])
    assert (other.env, other.preset) == ("CartPole-v1", "cpu")


def test_parts_run_in_the_order_in_which_they_read_each_other():
    assert gpu_check.chosen("train, facts") == ["facts", "train"]
    with pytest.raises(ConfigError):
        gpu_check.chosen("")


def test_a_part_gets_its_share_of_what_is_left(monkeypatch):
    monkeypatch.setattr(gpu_check, "WEIGHTS", {"facts": 1, "speed": 3, "train": 4})
    assert gpu_check.limits(["facts", "speed", "train"], 80.0) == 10.0
    assert gpu_check.limits(["speed", "train"], 77.0) == 33.0
    assert gpu_check.limits(["train"], 50.0) == 50.0


def test_the_budget_fits_a_limit_of_ten_minutes_and_every_part_has_a_share():
    assert set(gpu_check.WEIGHTS) == set(NAMES)
    assert gpu_check.Arguments(Path("out")).budget <= 590


def test_only_parity_on_a_cpu_is_interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("PYTHONPATH", "/mine")
    assert gpu_check.environment("parity", "cpu")["TRITON_INTERPRET"] == "1"
    for part, device in (("parity", "cuda"), ("speed", "cpu"), ("train", "cuda")):
        assert "TRITON_INTERPRET" not in gpu_check.environment(part, device)
    assert gpu_check.environment("facts", "cpu")["PYTHONPATH"].split(":") == [str(gpu_check.ROOT), str(gpu_check.ROOT / "kernels"), "/mine"]


# A driver and parts that do what it must survive

PARTS_THAT = """
import json, os, signal, subprocess, sys, time
part, out, deadline = sys.argv[1], sys.argv[2], float(sys.argv[3])
def write(failures):
    results = {"left": deadline - time.monotonic()}
    json.dump({"lines": ["found by " + part], "failures": failures, "results": results}, open(f"{out}/{part}.json", "w"))
if part == "facts":
    write([])
if part == "parity":
    write([]); print("about to crash", flush=True); os.kill(os.getpid(), signal.SIGSEGV)
if part == "capture":
    import faulthandler; faulthandler.register(signal.SIGUSR2)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open(f"{out}/child", "w").write(str(child.pid))
    write([]); time.sleep(600)
if part == "speed":
    write(["one thing", "another"]); sys.exit(1)
if part == "idle":
    print("Traceback: no file was written"); sys.exit(1)
if part == "emulators":
    sys.exit("error: three")
if part == "train":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open(f"{out}/left_behind", "w").write(str(child.pid))
    write([])
"""


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that ended and waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_alive(pid)


@pytest.fixture
def survived(tmp_path, monkeypatch, capsys):
    """What the driver makes of parts that crash, hang, fail and leave processes behind: outcomes by part, the summary, the table."""
    script = tmp_path / "part.py"
    script.write_text(PARTS_THAT)
    monkeypatch.setattr(gpu_check, "PART", script)
    monkeypatch.setattr(gpu_check, "WEIGHTS", dict.fromkeys(NAMES, 10) | {"capture": 2})
    config, flags = gpu_check.read(gpu_check.Arguments(tmp_path, device="cpu"), [])
    found, ended_by = gpu_check.check(tmp_path, config, flags, list(NAMES), 60.0)
    assert ended_by is None
    return {one.part: one for one in found}, json.loads((tmp_path / "summary.json").read_text()), capsys.readouterr().out


def test_a_part_that_crashes_hangs_or_fails_takes_no_other_down(survived, tmp_path):
    found, summary, text = survived
    assert {name: one.status for name, one in found.items()} == {
        "facts": "passed", "parity": "FAILED", "capture": "FAILED", "speed": "FAILED", "idle": "FAILED", "emulators": "FAILED",
        "train": "passed",
    }  # fmt: skip
    assert found["parity"].failures == ["parity: was killed by SIGSEGV"]
    assert found["parity"].lines == ["found by parity"]
    assert {"about to crash", "Fatal Python error: Segmentation fault"} <= set(found["parity"].log_tail)
    assert found["speed"].failures == ["one thing", "another"]
    assert found["idle"].failures == ["idle: exit code 1"]
    assert found["emulators"].failures == ["emulators: exit code 1"]
    assert found["emulators"].log_tail == ["error: three"]
    assert summary["failed"] == ["parity", "capture", "speed", "idle", "emulators"]
    assert summary["parts"]["parity"]["results"]["left"] > 0
    assert "log: idle.log, which ends: Traceback: no file was written" in text
    assert "  FAILED: another" in text
    assert gone(int((tmp_path / "left_behind").read_text()))


def test_a_part_that_hangs_is_ended_at_its_share_with_its_stack_in_the_log_and_its_processes(survived, tmp_path):
    found, _, _ = survived
    hung = found["capture"]
    assert hung.exit_code is None
    assert hung.failures == ["capture: was ended after 3 s, its share of the budget"]  # 2 of 42 parts of nearly 60 s
    assert 2.5 < hung.seconds < 20
    assert hung.lines == ["found by capture"]
    assert "part.py" in (tmp_path / "capture.log").read_text()
    assert gone(int((tmp_path / "child").read_text()))


def test_a_part_is_asked_to_end_before_its_limit(survived):
    left = survived[0]["facts"].results["left"]
    assert 0.5 * 60 * 10 / 62 < left < 0.8 * 60 * 10 / 62


DRIVER = """
import sys
from pathlib import Path
sys.path.append(sys.argv[1])
import gpu_check
gpu_check.PART = Path(sys.argv[2])
sys.argv = ["gpu_check.py", sys.argv[3], "--device", "cpu", "--parts", "facts,capture,train"]
gpu_check.main()
"""


def test_a_signal_ends_the_check_with_what_it_has_and_without_its_parts(tmp_path):
    script, out = tmp_path / "part.py", tmp_path / "out"
    script.write_text(PARTS_THAT)
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(TOOLS), str(script), str(out)], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (out / "capture.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    driver.send_signal(signal.SIGTERM)
    text, _ = driver.communicate(timeout=30)
    assert driver.returncode == 143
    summary = json.loads((out / "summary.json").read_text())
    assert summary["ended_by"] == "SIGTERM"
    assert {name: part["status"] for name, part in summary["parts"].items()} == {"facts": "passed", "capture": "FAILED", "train": "not run"}
    assert summary["parts"]["capture"]["failures"] == ["capture: ended by SIGTERM"]
    assert "facts passed, capture FAILED, train not run" in text
    assert gone(int((out / "child").read_text()))


@pytest.mark.parametrize(("failures", "code"), [(0, 0), (3, 3), (250, 100)])
def test_the_exit_code_is_the_number_of_parts_that_failed_up_to_a_cap(monkeypatch, tmp_path, failures, code):
    outcomes = [gpu_check.Outcome(f"p{i}", "FAILED", 0.0, 1, ["x"], [], {}, []) for i in range(failures)]
    outcomes += [gpu_check.Outcome("fine", status, 0.0, 0, [], [], {}, []) for status in ("passed", "not run")]
    monkeypatch.setattr(gpu_check, "check", lambda *_: (outcomes, None))
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", str(tmp_path / "out"), *ON_CPU])
    with pytest.raises(SystemExit) as left:
        gpu_check.main()
    assert left.value.code == code


def test_a_record_is_whole_after_every_change(tmp_path):
    record = Record(tmp_path / "part.json")
    assert json.loads((tmp_path / "part.json").read_text()) == {"lines": [], "failures": [], "results": {}}
    record.keep("a", {"b": float("nan")})
    record.say("one", "two")
    record.fail("bad")
    assert json.loads((tmp_path / "part.json").read_text()) == {"lines": ["one", "two"], "failures": ["bad"], "results": {"a": {"b": None}}}


def test_a_part_that_raises_says_so_in_one_line_and_keeps_the_rest_for_its_log(tmp_path):
    (tmp_path / JOB).write_text(json.dumps({"config": {}, "arguments": []}))
    command = [sys.executable, str(TOOLS / "gpu_check_part.py"), "facts", str(tmp_path), "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=gpu_check.environment("facts", "cpu"))
    assert done.returncode == 1
    (failure,) = json.loads((tmp_path / "facts.json").read_text())["failures"]
    assert failure.startswith("facts: ConfigError: ")
    assert "Traceback" in done.stderr
