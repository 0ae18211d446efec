"""Each operation at the shapes of the presets against its reference and against what PyTorch offers.

    python -m pytest tests/bench -n 0 [--benchmark-json OUT.json] [--update-baseline]

Under xdist, as in the whole suite, every contender runs once and nothing is timed.
"""

import pytest
import torch

from tools.profile.operations import MAKERS, sizes
from tools.profile.timing import NOISE, compare, median_seconds

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PRESETS = ("efficientzero", "speedyzero") if DEVICE.type == "cuda" else ("cpu",)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("operation", MAKERS)
def test_speed(benchmark, baseline, request, operation, preset):
    work = MAKERS[operation](sizes(preset, DEVICE), 0)
    others = {"reference": work.reference, "library": work.library}
    others = {name: other for name, other in others.items() if other is not None}
    if benchmark.disabled:
        for run in (work.ours, *others.values()):
            assert all(isinstance(out, torch.Tensor) for out in run())
        benchmark(work.ours)
        return

    def timed() -> None:
        work.ours()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(timed, rounds=10, warmup_rounds=2)  # with the host's share; the numbers below are without
    seconds = median_seconds(work.ours, DEVICE)
    info = benchmark.extra_info
    info |= {
        "ours": "kernel" if DEVICE.type == "cuda" else "reference or native form, as there is no CUDA device", "library": work.library_name,
        "seconds": seconds,
    }  # fmt: skip
    name = f"{operation}[{preset}]"
    if DEVICE.type == "cuda":
        most = request.getfixturevalue("ceilings")
        moved, flops = work.cost()
        floor = most.floor(moved, flops)
        info |= {
            "bytes": moved, "flops": flops, "floor_seconds": floor, "share_of_floor": floor / seconds,
            "bytes_a_second": most.bytes_a_second, "flops_a_second": most.flops_a_second,
        }  # fmt: skip
        baseline.say(f"{name:60s} {1e6 * seconds:10.1f} us  {100 * floor / seconds:.0f} % of the floor")
    failures = []
    for other, run in others.items():
        comparison = compare(work.ours, run, DEVICE)
        low, high = comparison.quartiles
        info[f"ratio_to_{other}"] = {"median": comparison.ratio, "low": low, "high": high, "seconds": comparison.other}
        try:
            info[f"ratio_to_{other}"]["verdict"] = baseline.check(f"{name} / {other}", comparison, NOISE[DEVICE.type])
        except pytest.fail.Exception as failure:
            failures.append(str(failure))
    if not others:
        baseline.say(f"{name:60s} {1e6 * seconds:10.1f} us  nothing to compare with on a CPU")
    assert not failures, failures
