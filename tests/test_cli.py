"""The command line: what it says to a person, above all when something is wrong."""

import dataclasses
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from speedyzero import evaluate
from speedyzero.__main__ import main, parse
from speedyzero.config import Config, ConfigError
from speedyzero.emulators import Emulators
from speedyzero.envs import describe
from speedyzero.loop import train
from speedyzero.run.checkpoint import latest


def fails(capsys, *arguments) -> str:
    """The one line on which the program ends with a non-zero exit."""
    with pytest.raises(SystemExit) as error:
        main([str(argument) for argument in arguments])
    message = error.value.code
    assert isinstance(message, str), f"exit code {message}, printed {capsys.readouterr()}"
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


@pytest.fixture
def finished(tiny_config):
    """A run of Catch-v0 that came to its end; returns its config."""
    config = tiny_config()
    train(config, describe(config.env), torch.device("cpu"))
    return config


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--env Pong", "--env Pong: not an EnvPool id; did you mean Pong-v5?"),
        ("--env Catch-v0 --refresh-roots 12", "--refresh-roots 12"),
        ("--env Catch-v0 --env-steps 100", "--start-transitions 500: must be below --env-steps 100"),
        ("--env Catch-v0 --unroll 300", "--unroll 300: must be at most 256"),
        ("--env Catch-v0 --frame-size 64", "--frame-size 64: Catch-v0 is no Atari game"),
        ("--env Catch-v0 --sticky-actions 0.25", "--sticky-actions 0.25: Catch-v0 is no Atari game"),
        ("--env Pong-v5 --sticky-actions 1", "--sticky-actions 1.0: must be at least 0 and below 1"),
        ("--env Pong-v5 --frame-size 31", "--frame-size 31: must lie between 32 and 256"),
        (f"--env Catch-v0 --run-dir {'x' * 300}", "File name too long"),
        ("--env Catch-v0 --channels 4096 --projection 65536", "--projection 65536: the network takes"),
        ("--env Pong-v5 --preset efficientzero --ring-positions 10000000", "GiB are free on cpu"),
        ("--env Catch-v0 --ring-positions 1000000000000 --dry-run", "--ring-positions 1000000000000: "),
    ],
)
def test_a_bad_flag_gives_one_line_that_names_it_and_leaves_nothing_behind(capsys, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert says in fails(capsys, "--device", "cpu", *arguments.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_asking_for_cuda_without_a_device_says_so(capsys):
    assert "--device cuda: PyTorch finds no CUDA device here" in fails(capsys, "--device", "cuda")


def test_a_run_directory_that_is_taken_is_not_overwritten_and_one_that_is_missing_not_resumed(capsys, finished, tmp_path):
    before = (finished.run_dir / "config.json").read_bytes()
    (tmp_path / "file").write_text("mine")
    for taken in (finished.run_dir, tmp_path / "file"):
        message = fails(capsys, "--env", "Catch-v0", "--run-dir", taken)
        assert f"--run-dir {taken}: exists already; go on with it by --resume" in message
    assert (finished.run_dir / "config.json").read_bytes() == before
    assert (tmp_path / "file").read_text() == "mine"
    assert "no run there" in fails(capsys, "--resume", "--run-dir", tmp_path / "nothing")


@pytest.mark.parametrize("flag", ["--env CartPole-v1", "--channels 32", "--preset smoke", "--threads 2", "--lr 0.5", "--gray True"])
def test_a_resumed_run_keeps_its_settings(capsys, finished, flag):
    message = fails(capsys, "--resume", "--run-dir", finished.run_dir, *flag.split())
    assert f"{flag}: the run in {finished.run_dir} was made with " in message


def test_a_resumed_run_reads_its_settings_where_it_lies_and_takes_the_harmless_flags_anew(finished, tmp_path):
    moved = finished.run_dir.rename(tmp_path / "moved")
    config, *_ = parse(["--resume", "--run-dir", str(moved), "--eval-episodes", "7", "--log-interval", "3"])
    assert config == dataclasses.replace(finished, run_dir=moved, resume=True, eval_episodes=7, log_interval=3)


def test_a_finished_run_that_is_resumed_is_evaluated_again_and_not_trained(capsys, finished):
    before = latest(finished.run_dir / "checkpoints").read_bytes()
    with pytest.raises(SystemExit) as end:
        main(["--resume", "--run-dir", str(finished.run_dir)])
    assert end.value.code == 0
    assert "over 2 episodes" in capsys.readouterr().out
    assert latest(finished.run_dir / "checkpoints").read_bytes() == before


def test_a_bad_flag_on_resume_leaves_the_run_as_it_was(capsys, finished):
    before = (finished.run_dir / "config.json").read_bytes()
    assert "--keep 0: must be greater than 0" in fails(capsys, "--resume", "--run-dir", finished.run_dir, "--keep", "0")
    assert (finished.run_dir / "config.json").read_bytes() == before


def test_an_empty_run_directory_may_be_used(tmp_path):
    asked = ["--env", "Catch-v0", "--device", "cpu", "--run-dir", str(tmp_path)]
    assert parse(asked)[0].run_dir == tmp_path
    # What a run leaves that is killed while it writes its config.json; it cannot be resumed.
    for name in ("lock", "config.json.tmp"):
        (tmp_path / name).touch()
        assert parse(asked)[0].run_dir == tmp_path
    (tmp_path / "notes").touch()
    with pytest.raises(ConfigError, match="exists already"):
        parse(asked)


def test_a_disk_that_is_full_is_told_in_time_and_at_the_end_in_one_line_and_leaves_no_half_checkpoint(tmp_path):
    run_dir = tmp_path / "run"
    # 40 blocks of 1 KiB: metrics and config fit, a checkpoint does not.
    flags = f"--env Catch-v0 --preset smoke --checkpoint-interval 30 --run-dir {run_dir}"
    command = f"ulimit -f 40; exec {sys.executable} -m speedyzero {flags}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: --run-dir: File too large")
    assert done.stderr.count("\n") == 1
    assert "the checkpoint was not written (File too large), the one before stands; tried again after 30 iterations" in done.stdout
    assert [path.name for path in (run_dir / "checkpoints").iterdir() if path.is_file()] == []


def test_a_damaged_checkpoint_is_refused_by_resume_and_by_evaluation(capsys, finished, monkeypatch):
    path = latest(finished.run_dir / "checkpoints")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert "every checkpoint there is damaged" in fails(capsys, "--resume", "--run-dir", finished.run_dir)
    monkeypatch.setattr("sys.argv", ["evaluate", str(finished.run_dir)])
    with pytest.raises(SystemExit) as error:
        evaluate.main()
    assert "is damaged" in error.value.code


@pytest.mark.parametrize(
    ("run", "flags", "says"),
    [
        ("nothing", [], "no run there"),
        ("run/config.json", [], "is a file; give the folder of a run"),
        ("run", ["--episodes", "0"], "--episodes 0"),
    ],
)
def test_evaluation_says_what_is_wrong(finished, monkeypatch, run, flags, says):
    monkeypatch.setattr("sys.argv", ["evaluate", str(finished.run_dir.parent / run), *flags])
    with pytest.raises(SystemExit, match=says):
        evaluate.main()


def test_evaluating_a_run_gives_what_its_own_evaluation_gave(finished, monkeypatch, capsys):
    path = finished.run_dir / "eval.json"
    own = json.loads(path.read_text())
    path.unlink()
    monkeypatch.setattr("sys.argv", ["evaluate", str(finished.run_dir), "--episodes", "2"])
    evaluate.main()
    assert json.loads(path.read_text()) == own
    assert "Catch-v0: mean" in capsys.readouterr().out


@pytest.mark.parametrize(("at", "kept"), [(1, None), (6, [1])])
def test_an_evaluation_that_is_stopped_says_what_it_kept(finished, monkeypatch, capsys, at, kept):
    """Catch's games end together, at the ninth step; one of the two is let end at the fifth."""
    before, steps, recv = signal.getsignal(signal.SIGTERM), [], Emulators.recv

    def stopping(self):
        recv(self)
        steps.append(1)
        if len(steps) == 5:
            self.game_over[1] = self.done[1] = True
            self._finished.append((1.0, 5))
        if len(steps) == at:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Emulators, "recv", stopping)
    monkeypatch.setattr("sys.argv", ["evaluate", str(finished.run_dir), "--episodes", "2"])
    with pytest.raises(SystemExit) as ended:
        evaluate.main()
    assert ended.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    assert len(steps) == at
    printed = capsys.readouterr()
    if kept is None:
        assert printed.err == "stopped by SIGTERM before a game was over\n"
    else:
        line, path = printed.out.splitlines()
        assert "over 1 of 2 episodes" in line
        assert json.loads(Path(path).read_text())["scores"] == kept


def test_every_evaluation_has_a_file_of_its_own_and_eval_json_is_the_newest(finished, monkeypatch, capsys):
    for extra in (("--episodes", "3"), ("--episodes", "3", "--seed", "5")):
        monkeypatch.setattr("sys.argv", ["evaluate", str(finished.run_dir), *extra])
        evaluate.main()
        line, path = capsys.readouterr().out.splitlines()
        assert f"over 3 episodes of {latest(finished.run_dir / 'checkpoints').stem}" in line
        assert Path(path).read_bytes() == (finished.run_dir / "eval.json").read_bytes()
    assert len(list((finished.run_dir / "evaluations").iterdir())) == 3  # the run's own at its end is one


def test_an_evaluation_by_other_rules_than_the_runs_leaves_eval_json_alone(tmp_path, monkeypatch, capsys):
    flags = "--env Breakout-v5 --preset smoke --frame-size 32 --gray True --device cpu --env-steps 260 --eval-max-steps 10"
    with pytest.raises(SystemExit) as end:
        main([*flags.split(), "--run-dir", str(tmp_path / "run")])
    assert end.value.code == 0
    before = (tmp_path / "run" / "eval.json").read_bytes()
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["evaluate", str(tmp_path / "run"), "--episodes", "2", "--sticky-actions", "0.25"])
    evaluate.main()
    line, path = capsys.readouterr().out.splitlines()
    assert "sticky actions 0.25" in line
    assert json.loads(Path(path).read_text())["sticky_actions"] == 0.25
    assert (tmp_path / "run" / "eval.json").read_bytes() == before


def test_every_flag_has_help_in_words(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert [field.name for field in dataclasses.fields(Config) if "--" + field.name.replace("_", "-") not in text] == []
    assert re.findall(r"\([A-Z]\)", text) == [], "letters of the papers, which nothing explains there"


@pytest.mark.parametrize(("command", "usage"), [("evaluate", "RUN"), ("export", "RUN FILE"), ("watch", "RUN"), ("report", "RUN...")])
def test_what_a_command_takes_has_a_name(command, usage, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [command, "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(f"speedyzero.{command}").main()
    first = capsys.readouterr().out.splitlines()[0]
    assert f" {usage} " in f"{first.replace(' [OPTIONS]', '')} "


def test_help_that_nobody_reads_to_its_end_ends_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as nobody:
        done = subprocess.run([sys.executable, "-m", "speedyzero", "--help"], stdout=nobody, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_auto_takes_the_cpu_preset_without_cuda_and_says_so_in_one_line(capsys, tmp_path):
    flags, lines = ["--env", "Catch-v0", "--device", "cpu", "--run-dir", str(tmp_path)], []
    config, device, _ = parse(flags, lines.append)
    assert (config.preset, device.type) == ("cpu", "cpu")
    assert lines == ["preset cpu, since there is no CUDA device in use: a smaller network and search than efficientzero's"]
    assert parse([*flags, "--preset", "cpu"], lines.append)[0] == config
    assert len(lines) == 1, "asked for by name it is taken without a word"
    assert capsys.readouterr().out == ""


def test_the_first_line_of_a_run_is_what_it_is_and_what_it_took_by_itself_comes_below(capsys, tiny_config, tmp_path):
    train(tiny_config(), describe("Catch-v0"), torch.device("cpu"), notes=["preset cpu, since"])
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("Catch-v0, preset ")
    assert second == "preset cpu, since"


def test_a_preset_gives_defaults_that_flags_override(tmp_path):
    flags = "--env Pong-v5 --preset efficientzero --device cpu --batch-size 128 --search gumbel"
    config, *_ = parse([*flags.split(), "--run-dir", str(tmp_path)])
    assert (config.batch_size, config.channels, config.simulations, config.frame_stack) == (128, 64, 16, 4)


def test_a_dry_run_prints_the_memory_of_a_run_and_starts_nothing(tmp_path, capsys):
    main(["--env", "Catch-v0", "--preset", "smoke", "--run-dir", str(tmp_path / "run"), "--dry-run"])
    printed = capsys.readouterr().out
    for owner in ("ring", "search", "snapshot", "emulators", "total"):
        assert owner in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_ends_the_command_with_its_exit_code_and_the_line_to_go_on_with(tmp_path, number, code):
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "speedyzero", "--env", "Catch-v0", "--log-interval", "1", "--run-dir", str(run_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        metrics = run_dir / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(number)
        printed, errors = process.communicate()
    assert process.returncode == code, errors
    printed = " ".join(printed.split())
    assert f"stopped by {number.name} at iteration" in printed
    assert f"and saved; go on with --resume --run-dir {run_dir}" in printed
    assert latest(run_dir / "checkpoints") is not None
