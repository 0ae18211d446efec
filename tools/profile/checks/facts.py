"""The machine of the check: hardware, versions, and the ceilings of this very device, from which the other parts take every floor."""

import os
import platform
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


def host() -> dict[str, str | int | float]:
    """The CPU, the cores that this process may use, and the memory in GiB."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "cpu": next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()),
        "cores": len(os.sched_getaffinity(0)), "ram_gib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30,
        "load_1_min": os.getloadavg()[0], "system": platform.platform(),
    }  # fmt: skip


def run(job: Job, record: Record) -> None:
    record.keep("host", machine := host())
    record.keep("versions", found := versions())
    # Without its locks, git does not write into the checkout.
    changed = output_of("git", "--no-optional-locks", "status", "--porcelain")
    record.keep("commit", f"{output_of('git', 'rev-parse', 'HEAD') or 'unknown'}{' and changes' if changed else ''}")
    record.say(f"{machine['cpu']}, {machine['cores']} cores, {machine['ram_gib']:.0f} GiB, load {machine['load_1_min']:.1f}",
               ", ".join(f"{name} {number}" for name, number in found.items() if number), f"commit {record.results['commit']}")
    if job.cuda:
        properties = torch.cuda.get_device_properties(job.device)
        record.keep("device", {
            "name": properties.name, "capability": f"{properties.major}.{properties.minor}", "memory_gib": properties.total_memory / 2**30,
            "multiprocessors": properties.multi_processor_count,
        })  # fmt: skip
        record.say(", ".join(f"{name} {value}" for name, value in record.results["device"].items()))
    flops, moved = ceilings_of(job)
    record.keep("ceilings", (flops, moved))
    record.say(f"ceilings: {flops:.4g} TFLOP/s by a matrix product, {moved:.4g} TB/s by a copy; all floors below are taken from them")
    if printed := output_of("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"):
        record.keep("nvidia_smi", printed)
        record.say(f"nvidia-smi after that load: {printed}")
