"""One part of gpu_check, in a process of its own:  python -m tools.profile.checks PART WORK_DIR DEADLINE

Reads WORK_DIR/job.json and writes WORK_DIR/PART.json as it finds things. DEADLINE is on the clock of time.monotonic, which on Linux is the
machine's. Exits with 1 if something failed.
"""

import faulthandler
import importlib
import signal
import sys
import traceback
from pathlib import Path

import torch

from speedyzero.graph import deterministic_algorithms
from speedyzero.processor import before_cuda
from tools.profile.checks.job import Record, read_job


def main() -> None:
    name, work, deadline = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
    before_cuda()
    faulthandler.register(signal.SIGUSR2)  # the driver asks for the stack before it ends a part that hangs
    record = Record(work / f"{name}.json")
    try:
        job = read_job(work, deadline)
        torch.set_num_threads(job.config.threads)
        with deterministic_algorithms(job.config.deterministic):
            importlib.import_module(f"tools.profile.checks.{name}").run(job, record)
    except Exception as error:
        traceback.print_exc()
        record.fail(f"{name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
    sys.exit(1 if record.failures else 0)


if __name__ == "__main__":
    main()
