"""tools/runs/prove.sh and its prove_status.py: on trainers that stop, stay and fail, and on a real one that goes on."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from speedyzero.__main__ import main
from speedyzero.loop import Trainer
from tests.tools.recorded_support import CONFIG, EVAL, ROWS, SUMMARY, written_run
from tests.tools.tools_support import TOOLS, load_tool

PROVE = str(TOOLS / "runs" / "prove.sh")


@pytest.fixture
def tool(monkeypatch):
    return partial(load_tool, monkeypatch, "runs")


FAKE = """
import json, os, signal, sys, time
from pathlib import Path
run = Path(sys.argv[sys.argv.index("--run-dir") + 1])
(run.parent / "flags").write_text(json.dumps(sys.argv[1:]))
how = os.environ["FAKE"]
if how == "fail":
    sys.exit("error: --env Pong: not an EnvPool id")
if how == "die":
    os.kill(os.getpid(), signal.SIGKILL)
stopped = []
if how != "early":
    (run).mkdir(exist_ok=True)
    (run / "config.json").write_text('{"env": "Pong-v5", "preset": "smoke", "seed": 0, "device": "cuda", "env_steps": 9}')
    (run / "metrics.jsonl").write_text('{"iteration": 3, "env_steps": 4, "updates": 5, "wall_s": 6}\\n')
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stopped.append(number))
print("begun", flush=True)
if os.getpgid(0) == os.getppid():
    print("a group that is signalled as a whole, and so twice")
while not stopped or how == "stay":
    time.sleep(0.02)
time.sleep(0.3)  # a second signal would be seen
print(f"{len(stopped)} signals")
print(f"stopped by {signal.Signals(stopped[0]).name} at iteration 3 and saved; go on with --resume", flush=True)
sys.exit(128 + stopped[0])
"""
SMI = """#!/bin/sh
echo "$*" >> "$(dirname "$0")/asked"
echo "NVIDIA H100 80GB HBM3, 570.1, 81559, 1200, 97, 1755, 1980, 612.5, [N/A], 61"
"""


class Proving:
    """prove.sh with a trainer that is a script: `FAKE`, or one that calls the real one. Nothing else is faked."""

    def __init__(self, folder: Path):
        self.folder, self.out, self.run_dir = folder, folder / "out", folder / "run"
        self.python, self.trainer = folder / "python", folder / "trainer.py"
        self.trainer.write_text(FAKE)
        self.python.write_text(
            f'#!/bin/bash\nif [ "$1 $2" = "-m speedyzero" ]; then shift 2; exec {sys.executable} {self.trainer} "$@"; fi\n'
            # As where there is no matplotlib: its picture takes a second, and is looked at once.
            f'if [ "$1" = -c ] && [ -z "$PICTURE" ]; then exit 1; fi\nexec {sys.executable} "$@"\n'
        )
        self.python.chmod(0o755)

    def environment(self, **more) -> dict:
        return os.environ | {"PYTHON": str(self.python), "FAKE": "stop", "PICTURE": ""} | more

    def command(self, *flags: str, limit: int = 4, margin: int = 3, first: tuple[str, ...] = ()) -> list[str]:
        flags = ("--env", "Pong-v5", *flags, "--run-dir", str(self.run_dir))
        return ["/bin/bash", PROVE, *first, "--margin", str(margin), str(self.out), str(limit), "--", *flags]

    def __call__(self, *flags: str, limit: int = 4, margin: int = 3, **more) -> subprocess.CompletedProcess:
        command = self.command(*flags, limit=limit, margin=margin)
        return subprocess.run(command, capture_output=True, text=True, check=False, env=self.environment(**more))

    @property
    def status(self) -> dict:
        return json.loads((self.out / "status.json").read_text())


@pytest.fixture
def prove(tmp_path):
    return Proving(tmp_path)


def the_error(done: subprocess.CompletedProcess) -> str:
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_a_trainer_is_stopped_in_time_by_one_signal_and_reported_with_its_gpu(prove, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvidia-smi").write_text(SMI)
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    begin = time.monotonic()
    done = prove(limit=6, margin=4, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", CUDA_VISIBLE_DEVICES="3,1")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begin >= 2
    lines = (prove.out / "log.txt").read_text().splitlines()
    assert (lines[0], lines[1]) == ("begun", "1 signals")
    assert sorted(path.name for path in prove.out.iterdir()) == ["config.json", "curve.csv", "log.txt", "metrics.jsonl", "status.json"]
    status = prove.status
    assert (status["ended"], status["complete"], status["exit_code"], status["limit_s"]) == ("stopped", False, 138, 6)
    assert (status["resumed_from"], status["iteration"], status["gpu"]) == (None, 0, "NVIDIA H100 80GB HBM3")
    assert 0 <= status["seconds"] <= time.monotonic() - begin + 1  # a shell counts whole seconds of the clock
    assert status["nvidia_smi"]["at_start"] == {
        "name": "NVIDIA H100 80GB HBM3", "driver": "570.1", "memory_total_mib": 81559, "memory_used_mib": 1200, "utilisation_percent": 97,
        "sm_clock_mhz": 1755, "sm_clock_max_mhz": 1980, "power_w": 612.5, "power_limit_w": None, "temperature_c": 61,
    }  # fmt: skip
    assert "--id=3" in (tmp_path / "bin" / "asked").read_text().split()
    assert "| NVIDIA H100 80GB HBM3 | 4 | 5 | 6 s, unfinished |" in done.stdout
    assert "no curve.png" in done.stderr
    assert "the same command goes on" in done.stdout


def test_the_gpu_of_a_machine_is_not_that_of_a_run_on_its_cpu(tool, tmp_path):
    prove_status = tool("prove_status")
    for device, name in (("cpu", None), ("cuda", "NVIDIA H100")):
        out = written_run(tmp_path / device, ROWS, config=CONFIG | {"device": device})
        (out / "log.txt").write_text("")
        line = "NVIDIA H100, 570.1, 81559, 1200, 97, 1755, 1980, 612.5, 700, 61"
        arguments = prove_status.Arguments(out, tmp_path / "run", limit=9, gpu_at_start=line, exit_code=1)
        assert prove_status.status(arguments, [])["gpu"] == name


def test_a_trainer_that_does_not_stop_is_killed_before_the_time_is_over(prove):
    done = prove(FAKE="stay", limit=5)
    assert done.returncode == 137
    assert "was killed" in the_error(done)
    assert (prove.status["ended"], prove.status["exit_code"]) == ("killed", 137)
    assert prove.status["seconds"] <= 5
    assert (prove.out / "curve.csv").exists()


def test_a_trainer_that_fails_gives_its_code_and_its_last_line(prove):
    done = prove(FAKE="fail", limit=60)
    assert done.returncode == 1
    assert "exit code 1: error: --env Pong: not an EnvPool id" in the_error(done)
    assert (prove.status["ended"], prove.status["exit_code"]) == ("failed", 1)


def test_a_trainer_that_is_gone_before_it_heeds_signals_was_not_stopped_but_cut_off(prove):
    done = prove(FAKE="early")
    assert done.returncode == 138
    assert "give more SECONDS" in the_error(done)
    assert prove.status["ended"] == "stopped too early"


def test_a_signal_to_the_call_saves_the_run_and_its_report(prove):
    call = subprocess.Popen(prove.command(limit=60), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=prove.environment())
    log = prove.out / "log.txt"
    while not log.exists() or "begun" not in log.read_text():
        assert call.poll() is None
        time.sleep(0.02)
    assert prove.status["ended"] == "running"
    call.send_signal(signal.SIGTERM)
    call.communicate()
    assert call.returncode == 143
    assert prove.status["exit_code"] == 143
    assert prove.status["last_line"].startswith("stopped by SIGTERM")
    assert (prove.out / "curve.csv").exists()


def test_a_run_that_is_there_is_resumed_with_the_same_flags_and_a_complete_one_is_reported_alone(prove, tmp_path):
    words = [*prove.command("--preset", "smoke"), "--seed=0"]
    words[2:2] = ["--dry-run"]

    def printed() -> list[str]:
        return shlex.split(subprocess.run(words, capture_output=True, text=True, check=True, env=prove.environment()).stdout)

    new = [str(prove.python), "-m", "speedyzero", "--env", "Pong-v5", "--preset", "smoke", "--run-dir", str(prove.run_dir), "--seed=0"]
    assert printed() == new
    written_run(prove.run_dir, ROWS)
    assert printed() == [*new, "--resume"]
    assert not prove.out.exists()
    (prove.run_dir / "summary.json").write_text(json.dumps(SUMMARY))
    (prove.run_dir / "eval.json").write_text(json.dumps(EVAL))
    done = prove()
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "flags").exists()
    assert (prove.status["ended"], prove.status["complete"]) == ("complete", True)
    assert "| 14.60 over 32 episodes | 1.000 |" in done.stdout
    assert {path.name for path in prove.out.iterdir()} >= {"eval.json", "summary.json"}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["out", "60"], "no -- before"),
        (["out", "--", "--run-dir", "run"], "no OUT_DIR and SECONDS"),
        (["out", "60", "70", "--", "--run-dir", "run"], "70: there are"),
        (["out", "soon", "--", "--run-dir", "run"], "SECONDS soon"),
        (["out", "45", "--", "--run-dir", "run"], "SECONDS 45: must be whole seconds, more than --margin 45"),
        (["--margin", "2", "out", "60", "--", "--run-dir", "run"], "--margin 2"),
        (["--margin", "--", "--run-dir", "run"], "--margin: needs a value"),
        (["--seed", "out", "60", "--", "--run-dir", "run"], "--seed: no such flag"),
        (["out", "60", "--", "--env", "Pong-v5"], "no --run-dir"),
        (["out", "60", "--", "--resume", "--run-dir", "run"], "--resume: leave it out"),
        (["run/out", "60", "--", "--run-dir=run"], "OUT_DIR run/out: lies in --run-dir run"),
        (["other/../run", "60", "--", "--run_dir", "run"], "lies in --run-dir run"),
        (["other", "60", "--", "--run-dir", "run"], "OUT_DIR other: has a metrics.jsonl that is not of prove.sh"),
        (["run/config.json", "60", "--", "--run-dir", "other"], "OUT_DIR run/config.json: is no folder"),
        (["run/config.json/x", "60", "--", "--run-dir", "other"], "cannot be written"),
    ],
)
def test_prove_says_in_one_line_what_is_wrong_and_leaves_all_as_it_was(tmp_path, arguments, named):
    for name in ("run", "other"):
        written_run(tmp_path / name, ROWS)
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    done = subprocess.run(["/bin/bash", PROVE, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert named in the_error(done)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_a_real_run_that_was_stopped_goes_on_to_its_end(prove, tool, monkeypatch):
    flags = ["--preset", "smoke", "--env", "Catch-v0", "--device", "cpu", "--env-steps", "232", "--start-transitions", "216"]
    step = Trainer.step

    def stopped_at_27(trainer, phase):
        step(trainer, phase)
        if trainer.iterations == 27:
            signal.raise_signal(signal.SIGUSR1)

    monkeypatch.setattr(Trainer, "step", stopped_at_27)
    with pytest.raises(SystemExit) as ended:
        main([*flags, "--run-dir", str(prove.run_dir)])
    assert ended.value.code == 138
    # A game is 9 steps and a dead slot: two of the 27 slots of each of 8 lanes are dead.
    assert tool("prove_status").counts(prove.run_dir) == {"iteration": 27, "env_steps": 8 * 25, "updates": 0}
    prove.trainer.write_text("from speedyzero.__main__ import main\nmain()\n")
    prove.out.mkdir()
    done = prove(*flags, limit=200, PICTURE="yes")
    assert done.returncode == 0, done.stderr
    status, summary = prove.status, json.loads((prove.run_dir / "summary.json").read_text())
    assert (status["ended"], status["resumed_from"], status["env_steps"], status["complete"]) == ("complete", 27, 232, True)
    assert (status["iteration"], status["updates"]) == (summary["iterations"], summary["updates"])
    assert len(list(prove.out.iterdir())) == 8  # as many as come back from a machine that is lent
    assert (prove.out / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert (prove.out / "metrics.jsonl").read_bytes() == (prove.run_dir / "metrics.jsonl").read_bytes()
    assert status["gpu"] is None
