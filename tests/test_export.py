"""Exporting an agent: its file, its card, and the scores in both."""

import pytest

import speedyzero
from speedyzero import export
from speedyzero.run.files import write_json
from tests.agents import write_run


@pytest.fixture
def run_dir(tiny_config):
    config = tiny_config()
    (config.run_dir / "checkpoints").mkdir(parents=True)
    write_run(config)
    return config.run_dir


def call(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["export", *map(str, arguments)])
    export.main()


def test_scores_go_with_the_agent_if_they_are_of_its_checkpoint(run_dir, tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "agent.safetensors"
    scores = {"env_steps": 10, "updates": 1, "episodes": 2, "mean": 0.5, "median": 0.5, "std": 0.5, "scores": [0.0, 1.0], "seed": 3}
    write_json(run_dir / "eval.json", scores)
    call(monkeypatch, run_dir, out)
    assert speedyzero.load(out).scores == scores
    card = out.with_suffix(".md").read_text()
    assert "value: 0.50 +/- 0.50" in card
    assert "| 2 games | score |" in card
    assert "license: apache-2.0" in card
    assert capsys.readouterr().out.startswith(f"{out}: 0.0")

    write_json(run_dir / "eval.json", scores | {"updates": 2})
    call(monkeypatch, run_dir, out)
    assert speedyzero.load(out).scores is None
    assert "This checkpoint was not evaluated." in out.with_suffix(".md").read_text()
    assert f"python -m speedyzero.evaluate {run_dir}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [(["agent.bin"], "ends in .safetensors"), (["agent.safetensors", "--license", "all mine"], "give a licence's identifier")],
)
def test_bad_flags_are_one_line_and_nothing_is_written(run_dir, tmp_path, monkeypatch, arguments, line):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match=f"^error: .*{line}.*$"):
        call(monkeypatch, run_dir, *arguments)
    assert sorted(tmp_path.rglob("*")) == before
