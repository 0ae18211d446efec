"""Which speedyzero this is: its version, and in a checkout of git its commit."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

from speedyzero import __version__


def software(package: Path = Path(__file__).parent) -> dict[str, str | None]:
    """`version`, and `commit` of the checkout whose folder `speedyzero` is `package`: 40 hex digits, with `-dirty` behind them if a
    tracked file was changed since. None if it is no checkout (an installed package within another project's is none), or git does not
    say.
    """
    commit = None
    if (package.parent / ".git").exists():  # a file in a worktree
        asked = ["git", "-C", str(package.parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            commit = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=30).stdout.strip() or None
    return {"version": __version__, "commit": commit}
