"""What ran the check: the machine, the versions, and the ceilings of this very device, from which the other parts take every floor."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from checks.job import Job, Record, read_results
from tests.bench import timing

ROOT = Path(__file__).parents[3]
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
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10, cwd=ROOT)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


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
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or None,
        "cores": os.cpu_count(),
        "cores_allowed": len(os.sched_getaffinity(0)),
        "ram_gib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30,
        "load_1_min": os.getloadavg()[0],
        "system": platform.platform(),
    }


def card(device: torch.device) -> dict[str, str | int | float]:
    """The CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": properties.total_memory / 2**30,
        "devices_visible": torch.cuda.device_count(),
    }


def smi() -> dict[str, str] | None:
    """What nvidia-smi says of clocks and power; None where there is none."""
    printed = output_of("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader")
    return dict(zip(QUERY.split(","), printed.splitlines()[0].split(", "), strict=False)) if printed else None


def clock_line(clocks: dict[str, str]) -> str:
    """What `smi` found, in short."""
    return (f"SM at {clocks['clocks.sm']} of {clocks['clocks.max.sm']}, memory at {clocks['clocks.mem']}, {clocks['power.draw']} of "
            f"{clocks['power.limit']}, {clocks['temperature.gpu']} C")


def commit() -> str | None:
    """Of the checkout, marked if it was changed since; None outside of one."""
    head = output_of("git", "rev-parse", "HEAD")
    # Without the locks git does not write: the checkout may be read-only, and is not ours to touch.
    changed = output_of("git", "--no-optional-locks", "status", "--porcelain")
    return f"{head}{' and changes' if changed else ''}" if head else None


def run(job: Job, record: Record) -> None:
    record.keep("host", machine := host())
    record.keep("versions", found := versions())
    record.keep("commit", commit())
    memory = f"{machine['ram_gib']:.0f} GiB"
    record.say(f"{machine['cpu']}, {machine['cores_allowed']} of {machine['cores']} cores, {memory}, load {machine['load_1_min']:.1f}")
    record.say(", ".join(f"{name} {number}" for name, number in found.items() if number))
    record.say(f"commit {record.results['commit'] or 'unknown: not a git checkout'}")
    if job.cuda:
        record.keep("device", gpu := card(job.device))
        record.keep("nvidia_smi", clocks := smi())
        record.say(f"{gpu['name']}, compute capability {gpu['capability']}, {gpu['multiprocessors']} SMs, {gpu['memory_gib']:.1f} GiB")
        if clocks:
            record.say(f"driver {clocks['driver_version']}, {clock_line(clocks)}")
    record.keep("ceilings", most := ceilings(job.device))
    flops, moved = most["flops_a_second"] / 1e12, most["bytes_a_second"] / 1e12
    record.say(f"ceilings: {flops:.4g} TFLOP/s, {moved:.4g} TB/s ({most['how']})", "all floors below are taken from these ceilings")
    if job.cuda and (clocks := smi()):
        record.keep("nvidia_smi_under_load", clocks)
        record.say(f"just after that load: {clock_line(clocks)}")
