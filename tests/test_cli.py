"""The command line: what it says to a person, above all when something is wrong."""

import dataclasses
import json
import signal
import subprocess
import sys
import time

import pytest
import torch

from speedyzero import evaluate
from speedyzero.__main__ import main, parse
from speedyzero.config import ConfigError
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
        (("--env", "Pong"), "--env Pong: not an EnvPool id; did you mean Pong-v5?"),
        (("--env", "catch-v0"), "did you mean Catch-v0?"),
        (("--env", "Pendulum-v1"), "continuous actions"),
        (("--env", "Catch-v0", "--refresh-roots", "12"), "--refresh-roots 12"),
        (("--env", "Catch-v0", "--env-steps", "100"), "--start-transitions 500: must be below --env-steps 100"),
        (("--env", "Catch-v0", "--lr", "-1"), "--lr -1.0: must be greater than 0"),
        (("--env", "Catch-v0", "--batch-size", "1"), "--batch-size 1"),
        (("--env", "Catch-v0", "--discount", "1.5"), "--discount 1.5"),
        (("--env", "Catch-v0", "--unroll", "300"), "--unroll 300: must be at most 256"),
        (("--env", "Catch-v0", "--unroll", "200"), "--unroll 200"),
        (("--env", "Catch-v0", "--projection", "1"), "--projection 1"),
        (("--env", "Catch-v0", "--frame-size", "64"), "--frame-size 64: Catch-v0 is no Atari game"),
        (("--env", "Catch-v0", "--gray", "False"), "--gray False: Catch-v0 is no Atari game"),
        (("--env", "Pong-v5", "--frame-size", "31"), "--frame-size 31: must lie between 32 and 256"),
        (("--env", "Pong-v5", "--frame-size", "10000000"), "--frame-size 10000000: must lie between 32 and 256"),
        (("--env", "Catch-v0", "--env-threads", "100000"), "--env-threads 100000: must be at most 1024"),
        (("--env", "Catch-v0", "--run-dir", "x" * 300), "File name too long"),
        (("--env", "Catch-v0", "--channels", "4096", "--projection", "65536"), "--projection 65536: the network takes"),
        (("--env", "Pong-v5", "--preset", "efficientzero", "--ring-positions", "10000000"), "GiB are free on cpu"),
    ],
)
def test_a_bad_flag_gives_one_line_that_names_it_and_leaves_nothing_behind(capsys, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert says in fails(capsys, "--device", "cpu", *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_asking_for_cuda_without_a_device_says_so(capsys):
    assert "--device cuda: PyTorch finds no CUDA device here" in fails(capsys, "--device", "cuda")


def test_a_run_directory_that_exists_is_not_overwritten(capsys, finished):
    before = (finished.run_dir / "config.json").read_bytes()
    message = fails(capsys, "--env", "Catch-v0", "--run-dir", finished.run_dir)
    assert f"--run-dir {finished.run_dir}: exists already; go on with it by --resume" in message
    assert (finished.run_dir / "config.json").read_bytes() == before


def test_a_file_in_the_place_of_the_run_directory_is_refused(capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "exists already" in fails(capsys, "--env", "Catch-v0", "--run-dir", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_resuming_what_does_not_exist_is_refused(capsys, tmp_path):
    assert "no run there" in fails(capsys, "--resume", "--run-dir", tmp_path / "nothing")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--env", "CartPole-v1"), "--env CartPole-v1: the run in"),
        (("--channels", "32"), "--channels 32: the run in"),
        (("--preset", "smoke"), "--preset smoke: the run in"),
        (("--seed", "7"), "made with 0; leave the flag out"),
        (("--threads", "2"), "--threads 2: the run in"),
        (("--lr", "0.5"), "--lr 0.5: the run in"),
        (("--frame-size", "64"), "--frame-size 64: the run in"),
        (("--gray", "True"), "--gray True: the run in"),
    ],
)
def test_a_resumed_run_keeps_its_settings(capsys, finished, arguments, says):
    assert says in fails(capsys, "--resume", "--run-dir", finished.run_dir, *arguments)


def test_a_resumed_run_reads_its_settings_and_takes_the_harmless_flags_anew(finished):
    config, *_ = parse(["--resume", "--run-dir", str(finished.run_dir), "--eval-episodes", "7", "--log-interval", "3"])
    assert config == dataclasses.replace(finished, resume=True, eval_episodes=7, log_interval=3)


def test_a_finished_run_that_is_resumed_is_evaluated_again_and_not_trained(capsys, finished):
    before = latest(finished.run_dir / "checkpoints").read_bytes()
    with pytest.raises(SystemExit) as end:
        main(["--resume", "--run-dir", str(finished.run_dir)])
    assert end.value.code == 0
    assert "over 2 episodes" in capsys.readouterr().out
    assert latest(finished.run_dir / "checkpoints").read_bytes() == before


@pytest.mark.parametrize("flag", ["--log-interval", "--checkpoint-interval", "--env-threads", "--eval-episodes", "--eval-max-steps"])
def test_a_bad_flag_on_resume_leaves_the_run_as_it_was(capsys, finished, flag):
    before = (finished.run_dir / "config.json").read_bytes()
    assert f"{flag} 0: must be greater than 0" in fails(capsys, "--resume", "--run-dir", finished.run_dir, flag, "0")
    assert (finished.run_dir / "config.json").read_bytes() == before


def test_a_moved_run_is_resumed_where_it_lies(finished, tmp_path):
    moved = finished.run_dir.rename(tmp_path / "moved")
    assert parse(["--resume", "--run-dir", str(moved)])[0].run_dir == moved


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


def test_a_preset_asked_for_by_name_is_taken_without_a_word(capsys):
    config, *_ = parse(["--env", "Catch-v0", "--device", "cpu", "--preset", "cpu"])
    assert config.preset == "cpu"
    assert capsys.readouterr().out == ""


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


def test_a_damaged_config_is_refused(capsys, finished):
    path = finished.run_dir / "config.json"
    path.write_text(path.read_text()[:-20])
    assert "config.json: cannot be read" in fails(capsys, "--resume", "--run-dir", finished.run_dir)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [((), "no run there"), (("--episodes", "0"), "--episodes 0")],
)
def test_evaluation_says_what_is_wrong(finished, tmp_path, monkeypatch, arguments, says):
    run_dir = finished.run_dir if arguments else tmp_path / "nothing"
    monkeypatch.setattr("sys.argv", ["evaluate", str(run_dir), *arguments])
    with pytest.raises(SystemExit) as error:
        evaluate.main()
    assert says in error.value.code


def test_evaluating_a_run_gives_what_its_own_evaluation_gave(finished, monkeypatch, capsys):
    path = finished.run_dir / "eval.json"
    own = json.loads(path.read_text())
    path.unlink()
    monkeypatch.setattr("sys.argv", ["evaluate", str(finished.run_dir), "--episodes", "2"])
    evaluate.main()
    assert json.loads(path.read_text()) == own
    assert "Catch-v0: mean" in capsys.readouterr().out


def test_every_flag_has_help(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    from speedyzero.config import Config

    for field in dataclasses.fields(Config):
        assert "--" + field.name.replace("_", "-") in text
    assert text.count("Gumbel MuZero") == 1


def test_auto_takes_the_cpu_preset_without_cuda_and_says_so_in_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, device, _ = parse(["--env", "Catch-v0", "--device", "cpu"])
    assert config.preset == "cpu"
    assert device.type == "cpu"
    assert capsys.readouterr().out.splitlines() == [
        "preset cpu, since there is no CUDA device in use: a smaller network and search than efficientzero's"
    ]
    assert config.frame_stack == 1
    assert not config.clip_reward
    assert str(config.run_dir) == "runs/Catch-v0_cpu_seed0"


def test_a_preset_gives_defaults_that_flags_override():
    config, *_ = parse(["--env", "Pong-v5", "--preset", "efficientzero", "--device", "cpu", "--batch-size", "128", "--search", "gumbel"])
    assert (config.batch_size, config.channels, config.simulations, config.frame_stack) == (128, 64, 16, 4)
    assert config.clip_reward
    assert config.augment


def test_a_dry_run_prints_the_memory_of_a_run_and_starts_nothing(tmp_path, capsys):
    main(["--env", "Catch-v0", "--preset", "smoke", "--run-dir", str(tmp_path / "run"), "--dry-run"])
    printed = capsys.readouterr().out
    for owner in ("ring", "search", "snapshot", "emulators", "total"):
        assert owner in printed
    assert not (tmp_path / "run").exists()


def test_a_dry_run_of_what_does_not_fit_names_the_flag(tmp_path):
    with pytest.raises(SystemExit, match=r"^error: --ring-positions 1000000000000: "):
        main(["--env", "Catch-v0", "--ring-positions", "1000000000000", "--run-dir", str(tmp_path / "run"), "--dry-run"])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_ends_the_command_with_its_exit_code_and_the_line_to_go_on_with(tmp_path, number, code):
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "speedyzero", "--env", "Catch-v0", "--log-interval", "1", "--run-dir", str(run_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        metrics, patience = run_dir / "metrics.jsonl", time.monotonic() + 60
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < patience:
            time.sleep(0.05)
        process.send_signal(number)
        printed, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert f"stopped by {number.name} at iteration" in " ".join(printed.split())
    assert f"and saved; go on with --resume --run-dir {run_dir}" in " ".join(printed.split())
    assert latest(run_dir / "checkpoints") is not None
