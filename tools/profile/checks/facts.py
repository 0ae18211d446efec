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

PACKAGES = ("torch", "triton", "envpool", "numpy", "tyro", "cuda-bindings", "nvtx")
QUERY = (
    "name,driver_version,pstate,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu,memory.total,memory.used,"
    "utilization.gpu,mig.mode.current"
)
# A toy: what a CPU does at best takes larger ones.
TOY_MATRIX, TOY_COPY = 512, 2**25


def ceilings(device: torch.device) -> dict[str, float | str]:
    """FLOP/s and B/s that the device reaches, and by what they were measured."""
    if device.type == "cuda":
        most, how = timing.ceilings(device), "product of two 8192 x 8192 in bf16, copy of 1 GiB"
    else:
        source, matrix = torch.zeros(TOY_COPY, dtype=torch.uint8), torch.randn(TOY_MATRIX, TOY_MATRIX)
        target = torch.empty_like(source)
        copy = timing.median_seconds(lambda: target.copy_(source), device)
        product = timing.median_seconds(lambda: matrix @ matrix, device)
        most = timing.Ceilings(2 * TOY_COPY / copy, 2 * TOY_MATRIX**3 / product)
        how = f"product of two {TOY_MATRIX} x {TOY_MATRIX} in fp32 and copy of {TOY_COPY // 2**20} MiB, {torch.get_num_threads()} thread"
    return {"flops_a_second": most.flops_a_second, "bytes_a_second": most.bytes_a_second, "how": how}


def ceilings_of(job: Job) -> tuple[float, float]:
    """TFLOP/s and TB/s: what this part found, or measured now if it did not run."""
    found = read_results(job.out, "facts").get("ceilings") or ceilings(job.device)
    return found["flops_a_second"] / 1e12, found["bytes_a_second"] / 1e12


def output_of(*command: str) -> str | None:
    """What a program prints, None if it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def versions() -> dict[str, str | None]:
    """Of Python and of what the project stands on; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found | {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version() or "") or None}


def host() -> dict[str, str | int | float | None]:
    """The CPU, the cores that this process may use, and the memory in GiB."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "cpu": next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor() or None),
        "cores": os.cpu_count(), "cores_allowed": len(os.sched_getaffinity(0)),
        "ram_gib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, "load_1_min": os.getloadavg()[0],
        "system": platform.platform(),
    }  # fmt: skip


def smi(record: Record, name: str) -> None:
    """Note clocks and power of the device as nvidia-smi tells them; nothing where there is none."""
    if printed := output_of("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"):
        found = dict(zip(QUERY.split(","), printed.splitlines()[0].split(", "), strict=False))
        record.keep(name, found)
        record.say(f"{name}: " + ", ".join(f"{key} {found[key]}" for key in list(found)[1:9]))


def run(job: Job, record: Record) -> None:
    record.keep("host", machine := host())
    record.keep("versions", found := versions())
    # Without its locks, git does not write into the checkout.
    changed = output_of("git", "--no-optional-locks", "status", "--porcelain")
    record.keep("commit", f"{output_of('git', 'rev-parse', 'HEAD')}{' and changes' if changed else ''}")
    record.say(f"{machine['cpu']}, {machine['cores_allowed']} of {machine['cores']} cores, {machine['ram_gib']:.0f} GiB, "
               f"load {machine['load_1_min']:.1f}")
    record.say(", ".join(f"{name} {number}" for name, number in found.items() if number), f"commit {record.results['commit']}")
    if job.cuda:
        properties = torch.cuda.get_device_properties(job.device)
        record.keep("device", {
            "name": properties.name, "capability": f"{properties.major}.{properties.minor}", "memory_gib": properties.total_memory / 2**30,
            "multiprocessors": properties.multi_processor_count, "devices_visible": torch.cuda.device_count(),
        })  # fmt: skip
        record.say(", ".join(f"{name} {value}" for name, value in record.results["device"].items()))
        smi(record, "nvidia_smi")
    record.keep("ceilings", most := ceilings(job.device))
    flops, moved = most["flops_a_second"] / 1e12, most["bytes_a_second"] / 1e12
    record.say(f"ceilings: {flops:.4g} TFLOP/s, {moved:.4g} TB/s ({most['how']})", "all floors below are taken from these ceilings")
    if job.cuda:
        smi(record, "nvidia_smi_under_load")
