"""Every kernel, ahead of time and without a GPU: it compiles for both generations, and keeps its numbers in registers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What the tool says of the `efficientzero` preset with 6 actions, the one that matters most; by itself it takes all of them."""
    folder = tmp_path_factory.mktemp("compile")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(folder)}
    out = folder / "rows.json"
    tool = [sys.executable, "-m", "tools.profile.compile_table"]
    command = [*tool, "--presets", "efficientzero", "--envs", "Pong-v5", "--jobs", "1", "--json", str(out)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert out.exists(), done.stderr
    return done, json.loads(out.read_text())


def test_every_kernel_is_launched_by_the_presets_and_compiles_without_spills(compiled):
    done, _ = compiled
    assert done.returncode == 0, done.stderr


def test_every_row_was_compiled_for_both_generations(compiled):
    _, table = compiled
    assert table["rows"]
    for row in table["rows"]:
        for arch in ("sm_80", "sm_90"):
            measured = row[arch]
            assert 16 <= measured["registers"] <= 255, row
            assert measured["spilled"] == 0, row
            assert 0 <= measured["shared"] <= (163 if arch == "sm_80" else 227) * 1024, row


def test_the_residual_block_runs_on_tensor_cores(compiled):
    _, table = compiled
    rows = [row for row in table["rows"] if row["operation"] == "resblock"]
    assert rows
    for row in rows:
        assert row["sm_80"]["HMMA"] > 0, row
        assert row["sm_90"]["HGMMA"] > 0, row
