"""The machine of the check: hardware, versions, and the ceilings of this very device, from which the other parts take every floor."""

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from tools.faults.run import ROOT
from tools.profile import timing
from tools.profile.checks.job import Job, Record, read_results

PACKAGES = ("torch", "triton", "envpool", "numpy", "tyro", "nvtx", "jax")
QUERY = "name,driver_version,pstate,clocks.sm,clocks.max.sm,clocks.mem,power.draw,temperature.gpu,memory.used,mig.mode.current"
# A toy: what a CPU does at best takes larger ones.
TOY_MATRIX, TOY_COPY = 512, 2**25


def ceilings_of(job: Job) -> tuple[float, float]:
    """TFLOP/s and TB/s that the device reaches: what this part found, or measured now if it did not run."""
    found = read_results(job.work, "facts").get("ceilings")
    if not found:
        most = timing.ceilings(job.device) if job.cuda else timing.ceilings(job.device, TOY_MATRIX, TOY_COPY)
        found = most.flops_a_second / 1e12, most.bytes_a_second / 1e12
    return tuple(found)


def output_of(*command: str) -> str:
    """What a program prints, "" if it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def versions() -> dict[str, str | None]:
    """Of Python and of what the project stands on; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found | {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version() or "") or None}


def run(job: Job, record: Record) -> None:
    cpu = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    record.keep("versions", found := versions())
    # Without its locks, git does not write into the checkout.
    changed = output_of("git", "--no-optional-locks", "status", "--porcelain")
    record.keep("commit", f"{output_of('git', 'rev-parse', 'HEAD') or 'unknown'}{' and changes' if changed else ''}")
    record.say(f"{cpu[1] if cpu else platform.machine()}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}",
               ", ".join(f"{name} {number}" for name, number in found.items() if number), f"commit {record.results['commit']}")
    if job.cuda:
        properties = torch.cuda.get_device_properties(job.device)
        record.say(f"{properties.name}, {properties.multi_processor_count} multiprocessors, {properties.total_memory / 2**30:.0f} GiB")
    flops, moved = ceilings_of(job)
    record.keep("ceilings", (flops, moved))
    record.say(f"ceilings: {flops:.4g} TFLOP/s by a matrix product, {moved:.4g} TB/s by a copy; all floors below are taken from them")
    if printed := output_of("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"):
        record.keep("nvidia_smi", printed)
        record.say(f"nvidia-smi after that load: {printed}")
