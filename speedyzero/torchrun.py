"""What torchrun told this process in its environment, if it started it, and that the process ends with it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def is_first() -> bool:
    """Whether this process is rank 0, or the only one; known before they meet."""
    return os.environ.get("RANK", "0") == "0"


def on_this_machine() -> int:
    """How many ranks torchrun started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def torchrun_id() -> str | None:
    """The name of the torchrun that started this process, which its machines share and its restarts keep: its `--rdzv-id`, and under
    `--standalone` one of its own. None without torchrun, or if it was given no name."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if name == "none" else name


def restarted() -> bool:
    """Whether torchrun started the ranks of this machine once more, after one of them failed (`--max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def end_with_torchrun(wanted: bool = True) -> None:
    """From now on get a SIGTERM when torchrun ends, however it does, or no longer: a rank that nobody watches would train on, and keep the
    run locked. Without torchrun, and elsewhere than on Linux, this does nothing.

    The signal may come more than once: the kernel sends it for each thread of torchrun.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM) if wanted else 0)
