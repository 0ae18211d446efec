"""`--track`, with a stand-in for Weights & Biases: that it gets each row once, and that no fault of theirs costs a run."""

import dataclasses
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from speedyzero.__main__ import main
from speedyzero.config import ConfigError
from speedyzero.envs import describe
from speedyzero.loop import train
from speedyzero.run.observation import newest_frames, newest_observation
from speedyzero.run.track import Tracker


class Run:
    """As a run of theirs: a step that goes back is an error here, where they only warn."""

    def __init__(self, id: str, step: int):
        self.id, self.step, self.url, self.exit_code = id, step, "https://example.org/run", None
        self.rows, self.summary, self.offline = [], {}, False

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "env_steps")

    def log(self, values: dict, step: int) -> None:
        assert step >= self.step
        self.rows.append((step, values))
        self.step = step

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.fixture
def wandb(monkeypatch):
    """The module; `runs` are those begun, `asked` what for."""
    module = ModuleType("wandb")
    module.runs, module.asked, module.Image = [], [], lambda picture: picture
    module.Video = lambda file, format: (file.read(6), format)

    def init(**asked):
        module.asked.append(asked)
        module.runs.append(Run(asked["id"], module.runs[-1].step + 1 if module.runs else 0))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def rows_of(config) -> list[dict]:
    return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]


def test_the_same_rows_the_scores_and_one_picture_are_sent_and_a_resumed_run_goes_on_with_its_own(tiny_config, wandb):
    config = tiny_config(track=True, wandb_project_name="mine", wandb_entity="us")
    train(config, describe(config.env), torch.device("cpu"))
    (asked,), (run,) = wandb.asked, wandb.runs
    assert (asked["project"], asked["entity"], asked["name"]) == ("mine", "us", config.run_dir.name)
    assert (asked["config"]["lr"], asked["config"]["speedyzero"]["version"]) == (config.lr, asked["config"]["speedyzero"]["version"])
    sent = {step: values for step, values in run.rows if "env_steps" in values}
    for row in rows_of(config):
        assert sent[row["iteration"]].items() >= {name: value for name, value in row.items() if value is not None}.items()
        assert None not in sent[row["iteration"]].values()
    assert len(sent) == len(rows_of(config))
    assert [values["observation"].shape for _, values in run.rows if "observation" in values] == [(10, 5)]
    assert [values["video"] for _, values in run.rows if "video" in values] == [(b"GIF89a", "gif")]
    score = json.loads((config.run_dir / "eval.json").read_text())["mean"]
    assert run.rows[-1] == (rows_of(config)[-1]["iteration"], run.rows[-1][1])
    assert run.rows[-1][1]["eval/episodic_return"] == run.summary["eval/episodic_return"] == score
    assert run.exit_code == 0
    train(dataclasses.replace(config, resume=True), describe(config.env), torch.device("cpu"))
    assert (wandb.asked[1]["id"], wandb.asked[1]["resume"], asked["resume"]) == (asked["id"], "allow", None)
    assert wandb.runs[1].rows == [], "all of it was sent before"


def test_a_service_that_fails_on_the_way_is_told_once_and_one_that_does_not_begin_leaves_no_run(tiny_config, wandb, capsys):
    config = tiny_config(track=True)
    lines = []
    (config.run_dir).mkdir()
    tracker = Tracker(config, {}, lines.append)
    tracker._run.log = None
    tracker.log({"a": 1.0}, 1)
    tracker.log({"a": 1.0}, 2)
    assert len(lines) == 1
    assert "metrics.jsonl has the rows" in lines[0]
    (config.run_dir / "wandb.json").unlink()

    def refuse(**asked):
        raise RuntimeError("no key\nof yours")

    wandb.init = refuse
    with pytest.raises(ConfigError, match=r"--track: Weights & Biases did not begin \(no key of yours\); wandb login"):
        train(config, describe(config.env), torch.device("cpu"))
    assert [path.name for path in config.run_dir.iterdir()] == ["lock"]
    train(dataclasses.replace(config, track=False), describe(config.env), torch.device("cpu"))


@pytest.mark.parametrize(
    ("module", "flags"), [(None, []), (ModuleType("wandb"), []), (None, ["--dry-run"])], ids=["none", "an empty folder wandb", "dry run"]
)
def test_without_it_one_line_says_so_before_anything_is_made(tmp_path, monkeypatch, module, flags):
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(SystemExit, match="error: --track: Weights & Biases is not installed; pip install wandb, or leave --track out"):
        main(["--env", "Catch-v0", "--device", "cpu", "--track", "--run-dir", str(tmp_path / "run"), *flags])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("normalised", [False, True])
def test_the_picture_is_the_stack_oldest_left(normalised):
    def of(frames):
        ring = SimpleNamespace(frames=frames[None], first=torch.zeros(1, 3, dtype=torch.bool), newest=lambda: torch.tensor([2]))
        shape = frames.shape[1:]
        norm = {"mean": torch.full(shape, 0.5), "scale": torch.full(shape, 2.0)} if normalised else {}
        return newest_observation(SimpleNamespace(
            ring=ring, config=SimpleNamespace(frame_stack=2, normalize_frames=normalised),
            spec=SimpleNamespace(image=True, frame_shape=frames.shape[1:]),
            snapshot=SimpleNamespace(input_format={"dtype": torch.float32, **norm}),
        ))  # fmt: skip

    frames = torch.tensor([0, 0, 255], dtype=torch.uint8).view(3, 1, 1, 1)
    dark, light = (102, 153) if normalised else (0, 255)  # -1 and 1 of -5 to 5
    gray = of(frames.expand(3, 1, 2, 3).contiguous())
    assert gray.shape == (2, 6, 1)
    assert (gray[:, :3] == dark).all()
    assert (gray[:, 3:] == light).all()
    colours = frames.expand(3, 3, 2, 3).clone()
    colours[2, 1:] = 0  # red
    rgb = of(colours)
    assert rgb.shape == (2, 6, 3)
    assert rgb[0, 5].tolist() == [light, dark, dark]


def test_the_newest_frames_come_oldest_first_though_the_ring_has_gone_round():
    frames = torch.arange(5, dtype=torch.uint8).view(1, 5, 1, 1, 1).expand(2, 5, 3, 2, 2).contiguous()
    frames[1] = 99
    state = SimpleNamespace(
        ring=SimpleNamespace(frames=frames, slots=5, head=torch.tensor(7)), spec=SimpleNamespace(image=True, frame_shape=(3, 2, 2))
    )
    shown = newest_frames(state)
    assert shown.shape == (5, 2, 2, 3)
    assert shown[:, 0, 0, 0].tolist() == [2, 3, 4, 0, 1]
    state.ring.head = torch.tensor(3)
    assert newest_frames(state)[:, 0, 0, 0].tolist() == [0, 1, 2]
    state.spec = SimpleNamespace(image=False, frame_shape=(4, 1, 1))
    assert newest_frames(state) is None
