"""What Numba compiles is kept between processes where it can be, and works where it cannot."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import speedyzero_kernels

PACKAGE = Path(speedyzero_kernels.__file__).parent
CODE = """
import torch
from speedyzero_kernels import native, select, tree
trees = tree.allocate(roots=2, actions=3, simulations=4, discount=0.9, lstm_horizon=1)
tree.plant(trees, torch.full((2, 3), 1 / 3, dtype=torch.float64), torch.zeros(2, 3), torch.zeros(2))
print(select.select_puct(trees, 0).action.tolist(), sum(native._puct.stats.cache_hits.values()))
"""


def select_once(folder, **environment):
    variables = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    variables |= {"PYTHONPATH": str(folder), "HOME": str(folder)} | environment
    done = subprocess.run([sys.executable, "-c", CODE], env=variables, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_a_second_process_does_not_compile_and_a_package_that_cannot_be_written_to_works(tmp_path):
    """A file where the cache's folder would be refuses it to root as well; so does a home that is none."""
    copy = tmp_path / "speedyzero_kernels"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    writes = {"PYTHONDONTWRITEBYTECODE": "1"}
    assert [select_once(tmp_path, **writes) for _ in range(2)] == ["[0, 0] 0", "[0, 0] 1"]
    assert list(copy.glob("__pycache__/native._puct*.nbi"))
    shutil.rmtree(copy / "__pycache__")
    (copy / "__pycache__").touch()
    assert select_once(tmp_path, **writes) == "[0, 0] 0"
    assert select_once(tmp_path, **writes, HOME="/dev/null", XDG_CACHE_HOME="/dev/null") == "[0, 0] 0"
