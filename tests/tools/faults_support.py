"""What the tests of `tools/faults` share: its tools as modules, which lie outside of any package, and as commands."""

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "faults"))

import drift
import kill_test
import moments
import promises
import run
import soak
import watch

__all__ = ["SMALL", "drift", "kill_test", "moments", "promises", "run", "soak", "tool", "watch"]

TOOLS = Path(drift.__file__).parent
SMALL = ["--preset", "smoke", "--env", "Catch-v0"]
"""Flags of a run that takes a few seconds."""


def tool(name: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run a tool as a user does, and keep what it says."""
    command = [sys.executable, str(TOOLS / f"{name}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
