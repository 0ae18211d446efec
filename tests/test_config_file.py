"""`--config FILE`, and what config.json says beside the settings."""

import dataclasses
import json
import subprocess

import pytest
import torch

from speedyzero import __version__
from speedyzero.__main__ import parse
from speedyzero.config import ConfigError
from speedyzero.run.directory import RunDirectory
from speedyzero.run.trained import read_config
from speedyzero.software import software


@pytest.fixture
def file(tmp_path):
    """A function that writes settings to a file and gives the flag for it."""

    def write(settings: object) -> list[str]:
        path = tmp_path / "mine.json"
        path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
        return ["--config", str(path), "--device", "cpu", "--run-dir", str(tmp_path / "new")]

    return write


def test_a_part_of_a_config_stands_between_its_preset_and_the_flags(file):
    part = {"env": "Catch-v0", "preset": "smoke", "lr": 2, "unroll": 4, "temperatures": [1, 0.5, 0.5], "run_dir": "elsewhere", "threads": 7}
    flags = file(part)
    config, *_ = parse([*flags, "--unroll", "2"])
    assert (config.env, config.preset, config.env_steps) == ("Catch-v0", "smoke", 400), "of the file's environment and preset"
    assert (repr(config.lr), config.temperatures) == ("2.0", (1.0, 0.5, 0.5))
    assert config.unroll == 2, "a flag goes before the file"
    assert (str(config.run_dir), config.threads) == (flags[-1], 1), "a folder and a machine's settings are not taken"
    assert parse([*flags, "--preset", "cpu"])[0].env_steps == 9_000


def test_the_config_of_a_run_gives_the_same_run_elsewhere(tiny_config, file):
    config = dataclasses.replace(tiny_config(lr=0.125, seed=3), resume=False)
    directory = RunDirectory(config)
    directory.write_config()
    directory.close()
    text = (config.run_dir / "config.json").read_text()
    again, *_ = parse(file(text))
    assert dataclasses.replace(again, run_dir=config.run_dir) == config
    assert json.loads(text)["speedyzero"]["version"] == __version__
    assert read_config(config.run_dir) == config


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"batchsize": 3}, "batchsize is no setting; did you mean batch_size?"),
        ({"lanes": "8"}, "lanes is '8'"),
        ({"lr": None}, "lr is None"),
        ([], "not an object"),
        ("{", "cannot be read"),
        ({"env": "Catch-v0", "unroll": 300}, r"--unroll 300: must be at most 256 \(with the settings of --config .*mine.json\)"),
    ],
    ids=str,
)
def test_a_file_that_cannot_be_a_config_is_refused_in_one_line_that_names_it(file, settings, says):
    with pytest.raises(ConfigError, match=says) as refused:
        parse(file(settings))
    assert "mine.json" in str(refused.value)
    assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match="a run that is resumed"):
        parse([*file({"lr": 1.0}), "--resume"])


def test_the_commit_is_that_of_the_checkout_and_none_elsewhere(tmp_path, monkeypatch):
    package = tmp_path / "checkout" / "speedyzero"
    package.mkdir(parents=True)
    assert software(package)["commit"] is None

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        return subprocess.run(["git", *who, "-C", package.parent, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    assert software(package)["commit"] is None, "nothing is committed"
    (package / "a.py").write_text("1")
    git("add", "-A")
    git("commit", "-qm", "a")
    assert software(package)["commit"] == git("rev-parse", "HEAD")
    (package / "a.py").write_text("2")
    assert software(package)["commit"] == git("rev-parse", "HEAD") + "-dirty"
    inside = package.parent / "venv" / "lib" / "speedyzero"
    inside.mkdir(parents=True)
    assert software(inside)["commit"] is None, "installed inside another project's checkout"
    monkeypatch.setenv("PATH", "")
    assert software(package) == {"version": __version__, "commit": None}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_preset_for_a_gpu_warns_on_a_cpu_with_its_operations_counted(tmp_path, capsys):
    run_dir = ["--run-dir", str(tmp_path / "run")]
    parse(["--env", "Pong-v5", "--preset", "efficientzero", "--env-steps", "4000", "--final-updates", "0", *run_dir])
    (line,) = capsys.readouterr().out.splitlines()
    # By hand from the sizes of the layers: an update is 0.73 TFLOP, a search of 50 simulations 1.2 GFLOP. 4,000 updates in 500 iterations,
    # of 520 searches while there are steps to take and 512 after them.
    assert line.startswith("warning: --preset efficientzero is made for a GPU: ")
    assert float(line.split("GPU: ")[1].split(" PFLOP")[0]) == pytest.approx((4_000 * 0.73e12 + 250 * (520 + 512) * 1.2e9) / 1e15, rel=0.03)
    parse(["--env", "Catch-v0", "--preset", "smoke", *run_dir])
    assert capsys.readouterr().out == ""
