"""tools/runs: what curve.py makes of a run's files, and prove.sh on trainers that stop, stay, fail, and on a real one that goes on."""

import csv
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from speedyzero.__main__ import main
from speedyzero.loop import Trainer

TOOLS = Path(__file__).parents[1] / "tools" / "runs"
CONFIG = {"env": "Pong-v5", "preset": "efficientzero", "seed": 7, "device": "cuda", "env_steps": 100_000}


@pytest.fixture
def tool(monkeypatch):
    """A function of a tool's name that imports it."""

    def load(name: str):
        monkeypatch.syspath_prepend(str(TOOLS))
        spec = importlib.util.spec_from_file_location(f"runs_{name}", TOOLS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


def row(iteration: int, **more) -> dict:
    """A row as the log writes it, with its counts ten and two times the iteration and three seconds an iteration."""
    counts = {"iteration": iteration, "env_steps": 10 * iteration, "updates": 2 * iteration, "wall_s": 3.0 * iteration}
    return counts | {key.replace("__", "/"): value for key, value in more.items()}


def make_run(folder: Path, rows: list[dict] | str, **files) -> Path:
    """A run directory: the text or the rows of metrics.jsonl, and objects for config.json and other files of that kind."""
    folder.mkdir(parents=True)
    text = rows if isinstance(rows, str) else "".join(json.dumps(one) + "\n" for one in rows)
    (folder / "metrics.jsonl").write_text(text)
    for name, value in ({"config": CONFIG} | files).items():
        (folder / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


ROWS = [
    row(1, updates=0, charts__episodic_return=-21.0, charts__episodes=3, search__visit_entropy=1.75),
    row(2, charts__episodic_return=-19.5, charts__episodes=5, losses__value_loss=2.5, losses__loss=None, train__skipped_updates=1),
    row(9000, env_steps=100_000, charts__episodic_return=12.0, losses__value_loss=0.5, search__priority_age=80.5),
]
EVAL = {"mean": 14.6, "episodes": 32, "env_steps": 100_000, "updates": 18_000}
SUMMARY = {"env_steps": 100_000, "updates": 18_000, "wall_s": 724.6}


@pytest.fixture
def finished(tmp_path):
    return make_run(tmp_path / "pong", ROWS, eval=EVAL, summary=SUMMARY, status={"gpu": "NVIDIA H100"})


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def run_curve(tool, capsys, *arguments, monkeypatch) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["curve.py", *map(str, arguments)])
    tool("curve").main()
    return capsys.readouterr().out.splitlines()


# curve.py


def test_the_csv_has_every_row_under_the_names_of_the_log_and_is_empty_where_a_row_is(tool, finished):
    recorded = tool("recorded")
    head, *lines = csv.reader(recorded.to_csv([recorded.read(finished)], ["my run"]).splitlines())
    assert head == [
        "run", "iteration", "env_steps", "updates", "wall_s", "charts/episodic_return", "charts/episodes", "losses/loss",
        "losses/value_prefix_loss", "losses/value_loss", "losses/policy_loss", "losses/consistency_loss", "train/value_abs_max",
        "train/value_target", "search/visit_entropy", "search/priority_age", "train/grad_norm", "train/learning_rate",
        "train/skipped_updates",
    ]  # fmt: skip
    nothing = [""]
    assert lines == [
        ["my run", "1", "10", "0", "3.0", "-21.0", "3", *nothing * 7, "1.75", *nothing * 4],
        ["my run", "2", "20", "4", "6.0", "-19.5", "5", *nothing * 2, "2.5", *nothing * 8, "1"],
        ["my run", "9000", "100000", "18000", "27000.0", "12.0", *nothing * 3, "0.5", *nothing * 5, "80.5", *nothing * 3],
    ]


def test_a_line_that_is_no_row_or_repeats_one_is_left_out_and_counted_but_not_one_that_is_being_written(tool, tmp_path):
    one, two, four = (json.dumps(row(n)) for n in (1, 2, 4))
    odd = ['{"iteration": 3', "[]", '{"iteration": 3, "env_steps": 1, "updates": 2}', json.dumps(row(3, losses__loss="much")), "\ufffe"]
    run = tool("recorded").read(make_run(tmp_path / "run", "\n".join([one, two, *odd, two, one, four, four[:9]])))
    assert [one["iteration"] for one in run.rows] == [1, 2, 4]
    assert run.left_out == 7


def test_the_table_of_a_finished_run_has_the_gpu_the_clock_of_the_run_and_the_score_on_the_human_scale(tool, finished):
    recorded = tool("recorded")
    head, rule, line = recorded.table([recorded.read(finished)], ["pong"]).splitlines()
    assert len(cells(head)) == len(cells(rule)) == 9
    expected = ["Pong-v5", "efficientzero", "7", "NVIDIA H100", "100,000", "18,000", "12 min 05 s", "14.60 over 32 episodes", "1.000"]
    assert cells(line) == expected


def test_the_table_of_an_unfinished_run_says_so_and_has_the_last_return_that_was_logged(tool, tmp_path):
    recorded = tool("recorded")
    run = recorded.read(make_run(tmp_path / "run", [row(4, charts__episodic_return=-9.0), row(5, charts__episodic_return=-3.0), row(20)]))
    expected = ["cuda", "200", "40", "1 min 00 s, unfinished", "none yet (the last games of training -3.00)", "-"]
    assert cells(recorded.table([run], ["run"]).splitlines()[-1])[3:] == expected


def test_a_score_of_another_checkpoint_than_the_last_says_which_and_no_game_of_the_26_has_no_human_scale(tool, tmp_path):
    recorded = tool("recorded")
    run = make_run(tmp_path / "run", ROWS, config=CONFIG | {"env": "Catch-v0"}, eval=EVAL | {"updates": 9000}, summary=SUMMARY)
    line = cells(recorded.table([recorded.read(run)], ["run"]).splitlines()[-1])
    assert line[-2:] == ["14.60 over 32 episodes, played after 100,000 steps and 9,000 updates", "-"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (3599.4, "59 min 59 s"), (3600, "1 h 00 min"), (7500, "2 h 05 min")],
)
def test_a_clock_is_for_a_person(tool, seconds, text):
    assert tool("recorded").clock(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (800, "800"), (2500, "2.5k"), (100_000, "100k"), (1_250_000, "1.25M"), (-0.5, "-0.5"), (-2000, "-2k")]
)
def test_an_axis_counts_in_thousands(tool, value, text):
    assert tool("curve").thousands(value) == text


def panels(figure) -> dict:
    """The panels of a picture by title: each line's data, and the texts of the legend."""
    found = {}
    for axes in figure.axes:
        lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]
        legend = axes.get_legend()
        found[axes.get_title()] = lines, [text.get_text() for text in legend.get_texts()] if legend else []
    return found


def test_the_picture_shows_what_the_rows_hold_the_evaluation_as_a_point_and_the_two_scores_of_reference(tool, finished):
    curve = tool("curve")
    found = panels(curve.figure_of([curve.read(finished)], ["pong"]))
    (training, played, human, random), legend = found["return of whole games"]
    assert training == ([10, 20, 100_000], [-21.0, -19.5, 12.0])
    assert played == ([100_000], [14.6])
    assert (human[1], random[1]) == ([14.6, 14.6], [-20.7, -20.7])
    assert legend == ["last games of training", "evaluation: 14.60 over 32 episodes", "human: 14.6", "random: -20.7"]
    assert found["value loss"][0] == [([4, 18_000], [2.5, 0.5])]
    assert found["entropy of the visits"][0] == [([], [])]  # before the first update there is no place for it
    assert found["age of the priorities"][0] == [([18_000], [80.5])]
    assert found["progress"][0] == [
        ([3 / 3600, 6 / 3600, 7.5], [10, 20, 100_000]), ([3 / 3600, 6 / 3600, 7.5], [0, 4, 18_000])
    ]  # fmt: skip
    assert {"value prefix loss", "policy loss", "consistency loss", "values"} < set(found)


def test_runs_are_laid_over_each_other_each_under_its_name(tool, finished, tmp_path, capsys, monkeypatch):
    other = make_run(tmp_path / "other" / "pong", ROWS[:2])
    curve = tool("curve")
    found = panels(curve.figure_of([curve.read(finished), curve.read(other)], ["sweep", "sampled"]))
    legend = ["sweep, evaluation: 14.60 over 32 episodes", "sampled", "human: 14.6", "random: -20.7"]
    assert found["return of whole games"][1] == legend
    assert found["value loss"][0] == [([4, 18_000], [2.5, 0.5]), ([4], [2.5])]
    assert found["progress"][1] == ["environment steps", "updates"]
    out = tmp_path / "docs" / "v1.0"
    printed = run_curve(tool, capsys, finished, other, "--out", out, monkeypatch=monkeypatch)
    assert printed[0] == f"wrote {out}.csv and {out}.png"
    names = [str(finished), str(other)]  # their folders have one name
    assert [cells(line)[0] for line in printed[1:]] == ["run", "---", *names]
    assert [line["run"] for line in csv.DictReader(Path(f"{out}.csv").read_text().splitlines())] == [names[0]] * 3 + [names[1]] * 2
    assert Path(f"{out}.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.parent.iterdir()) == ["v1.0.csv", "v1.0.png"]


def test_a_run_with_nothing_but_counts_can_be_drawn(tool, tmp_path):
    curve = tool("curve")
    figure = curve.figure_of([curve.read(make_run(tmp_path / "run", [row(1, updates=0)], config=CONFIG | {"env": "Catch-v0"}))], ["run"])
    assert panels(figure)["return of whole games"] == ([([], [])], ["last games of training"])
    assert "unfinished at 10 of 100,000" in figure.get_suptitle()


def curve_fails(tool, capsys, monkeypatch, *arguments) -> str:
    with pytest.raises(SystemExit) as error:
        run_curve(tool, capsys, *arguments, monkeypatch=monkeypatch)
    assert isinstance(error.value.code, str)
    assert error.value.code.startswith("error: ")
    assert "\n" not in error.value.code
    return error.value.code


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "RUN_DIR: is missing"),
        (["nowhere"], "nowhere: no run there"),
        (["empty"], "empty/metrics.jsonl: has no row yet"),
        (["bare"], "bare: metrics.jsonl is missing"),
        (["torn"], "torn/config.json: is not JSON"),
        (["list"], "list/eval.json: is not an object"),
        (["typed"], "typed/summary.json: wall_s is missing or no float"),
        (["pong", "catch"], "catch: is of Catch-v0, and pong of Pong-v5"),
        (["pong", "--labels", "a", "b"], "--labels: 2 for 1 runs"),
        (["pong"] * 11, "11 runs: no more than 10"),
        (["pong", "--out", "pong/eval.json/x"], "--out pong/eval.json/x"),
    ],
)
def test_curve_says_in_one_line_what_is_wrong_and_writes_nothing(tool, finished, tmp_path, capsys, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "empty", "")
    make_run(tmp_path / "bare", "")
    (tmp_path / "bare" / "metrics.jsonl").unlink()
    make_run(tmp_path / "torn", ROWS, config="{")
    make_run(tmp_path / "list", ROWS, eval="[]")
    make_run(tmp_path / "typed", ROWS, summary=SUMMARY | {"wall_s": "long"})
    make_run(tmp_path / "catch", ROWS, config=CONFIG | {"env": "Catch-v0"})
    before = sorted(tmp_path.rglob("*"))
    more = [] if "--out" in arguments else ["--no-picture"]
    assert named in curve_fails(tool, capsys, monkeypatch, *arguments, *more)
    assert sorted(tmp_path.rglob("*")) == before


def test_without_matplotlib_there_is_one_line_and_without_the_picture_it_is_not_needed(tool, finished, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "speedyzero[plot]" in curve_fails(tool, capsys, monkeypatch, finished)
    assert not (tmp_path / "docs").exists()
    assert run_curve(tool, capsys, finished, "--no-picture", monkeypatch=monkeypatch)[0] == "wrote docs/runs/pong.csv"
    assert [path.name for path in (tmp_path / "docs" / "runs").iterdir()] == ["pong.csv"]


def test_a_curve_needs_no_pytorch(finished, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('PyTorch was imported')")
    command = [sys.executable, str(TOOLS / "curve.py"), str(finished), "--no-picture", "--out", str(tmp_path / "x")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stderr) == (0, "")


# prove.sh

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
        return ["/bin/bash", str(TOOLS / "prove.sh"), *first, "--margin", str(margin), str(self.out), str(limit), "--", *flags]

    def __call__(self, *flags: str, limit: int = 4, margin: int = 3, **more) -> subprocess.CompletedProcess:
        command = self.command(*flags, limit=limit, margin=margin)
        return subprocess.run(command, capture_output=True, text=True, check=False, env=self.environment(**more))

    @property
    def status(self) -> dict:
        return json.loads((self.out / "status.json").read_text())

    @property
    def flags(self) -> list[str]:
        return json.loads((self.folder / "flags").read_text())


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
        out = make_run(tmp_path / device, ROWS, config=CONFIG | {"device": device})
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
    make_run(prove.run_dir, ROWS)
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
        make_run(tmp_path / name, ROWS)
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    done = subprocess.run(["/bin/bash", str(TOOLS / "prove.sh"), *arguments], capture_output=True, text=True, check=False, cwd=tmp_path)
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
