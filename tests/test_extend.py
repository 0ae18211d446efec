"""A run that is complete can be given more environment steps."""

import json

import pytest

from speedyzero.__main__ import main

SMOKE = ["--env", "Catch-v0", "--preset", "smoke", "--device", "cpu"]


def train(run_dir, *flags) -> None:
    with pytest.raises(SystemExit) as end:
        main([*flags, "--run-dir", str(run_dir)])
    if end.value.code:
        raise AssertionError(end.value.code)


def test_a_complete_run_goes_on_to_more_steps_and_never_to_fewer(tmp_path, capsys):
    run_dir = tmp_path / "run"
    train(run_dir, *SMOKE)
    before = json.loads((run_dir / "summary.json").read_text())
    train(run_dir, "--resume", "--env-steps", "480")
    assert "extends the run from 400 steps" in capsys.readouterr().out
    after = json.loads((run_dir / "summary.json").read_text())
    assert (before["env_steps"], json.loads((run_dir / "config.json").read_text())["env_steps"]) == (400, 480)
    assert after["env_steps"] >= 480
    # The updates that were done after step 400 count. Ten more steps of 8 lanes, or one more since a reset is none, are all that is left.
    assert before["updates"] == 60
    assert after["updates"] in (70, 71)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == sorted({row["iteration"] for row in rows})
    with pytest.raises(SystemExit, match=r"--env-steps 400: the run in .* was made with 480"):
        main(["--resume", "--run-dir", str(run_dir), "--env-steps", "400"])
