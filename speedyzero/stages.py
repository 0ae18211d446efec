"""Names for the parts of an iteration, numbered as in the picture of docs/DESIGN.md, so that a trace reads like it.

A range is seen by torch.profiler, and by Nsight Systems where there is CUDA. In a captured graph it is there while capturing: the kernels
of a replay carry no ranges, so a trace by stage is taken with `--graph off`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import nvtx
import torch

STAGES = ("1 ingest", "2 search", "3 act", "4 refresh", "5 learn", "6 join")
PARTS = (
    "2.1 observe", "2.2 tree search", "5.1 sample", "5.2 gather", "5.3 losses", "5.4 backward", "5.5 optimizer", "5.6 priorities",
)  # fmt: skip


@contextmanager
def stage(name: str) -> Iterator[None]:
    """A named range around a part of the iteration; `name` is one of STAGES or PARTS."""
    with nvtx.annotate(name, domain="speedyzero"), torch.profiler.record_function(name):
        yield


class Progress:
    """Which stage the device has come to, for the watchdog to read while the host waits."""

    def __init__(self, device: torch.device):
        self._codes = torch.arange(len(STAGES), dtype=torch.int32, device=device)
        self._now = torch.zeros((), dtype=torch.int32, pin_memory=device.type == "cuda")

    @contextmanager
    def enter(self, name: str) -> Iterator[None]:
        """`stage(name)`, one of STAGES, and a note that the device has come to it: four bytes, copied when it has."""
        self._now.copy_(self._codes[STAGES.index(name)], non_blocking=True)
        with stage(name):
            yield

    def where(self) -> str:
        """The name of the stage."""
        return STAGES[int(self._now)]
