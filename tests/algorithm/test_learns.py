"""It learns: a whole run of the `cpu` preset, as its user starts it, plays Catch at the end."""

import json

import pytest

from speedyzero.__main__ import main


@pytest.mark.slow
def test_the_cpu_preset_learns_catch(tmp_path):
    run_dir = tmp_path / "catch"
    with pytest.raises(SystemExit) as end:
        main(["--env", "Catch-v0", "--device", "cpu", "--seed", "0", "--run-dir", str(run_dir)])
    assert end.value.code == 0
    result = json.loads((run_dir / "eval.json").read_text())
    assert result["episodes"] == 32
    assert result["mean"] >= 0.9
