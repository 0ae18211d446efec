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


def test_every_kernel_is_launched_by_the_presets_and_compiles_without_spills_for_both_generations(compiled):
    done, table = compiled
    assert done.returncode == 0, done.stderr
    assert table["rows"]
    for row in table["rows"]:
        for arch, shared in (("sm_80", 163), ("sm_90", 227)):
            measured = row[arch]
            assert 16 <= measured["registers"] <= 255, row
            assert (measured["spilled"], measured["shared"] <= shared * 1024) == (0, True), row
            if row["operation"] == "resblock":
                assert measured["HMMA" if arch == "sm_80" else "HGMMA"] > 0, row  # on tensor cores
