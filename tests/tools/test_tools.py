"""The tools run as their docstrings say."""

import subprocess
import sys
from pathlib import Path

TOOLS = Path(__file__).parents[2] / "tools"


def test_the_shares_of_an_iteration_add_up_and_name_every_part():
    command = [sys.executable, str(TOOLS / "profile" / "shares.py"), "--preset", "smoke", "--iterations", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    head, *rows = done.stdout.splitlines()
    assert "live roots" in head
    shares = {row.split("  ")[0]: float(row.split("%")[0].split()[-1]) for row in rows}
    assert abs(sum(shares.values()) - 100) < 1
    assert {"network, search", "network, learning", "tree", "gather and targets", "emulators", "optimiser"} <= set(shares)
    assert shares["tree"] > 0
