"""Every operation of the kernel library against its reference, at the sizes of the run, on equal states from one seed.

Both forms are reached through the public function, with `dispatch.runs_kernel` answering for all: so it compares what the trainer
calls, the convolutions too, of which the bench knows only the library's form. It compares all that a function returns and all that it
was given, as it writes in place; of a tree, the nodes that exist. Random numbers come from generators of one seed.

On a CPU the kernels run in Triton's interpreter, which the driver asks for with TRITON_INTERPRET=1, at the sizes of TOY at most: that
shows the arithmetic, and nothing of what a compiler makes of it.
"""

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from triton import knobs

from speedyzero.config import Config
from speedyzero.sizes import network_spec
from speedyzero_kernels import dispatch
from tools.profile.checks.compare import Deviation, deviation
from tools.profile.checks.job import Job, Record
from tools.profile.operations import MAKERS, Sizes

SEED = 0
TOY = {"refresh_roots": 16, "batch_size": 8, "lstm": 16, "projection": 32}
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2**-6, torch.float16: 2**-9}
"""Of |kernel - reference| / (|reference| + rms); what is no floating-point number must be equal."""


@contextmanager
def everywhere(kernel: bool) -> Iterator[None]:
    """Every operation is its kernel, or its reference, whatever the device."""
    asked = dispatch.runs_kernel
    dispatch.runs_kernel = lambda x: kernel and x.device.type != "meta"
    try:
        yield
    finally:
        dispatch.runs_kernel = asked


def outcome(operation: str, at: Sizes, kernel: bool) -> dict[str, Tensor]:
    """What the operation returns and what its state is after it, by name."""
    with everywhere(kernel):
        work = MAKERS[operation](at, SEED)
        returned = work.ours()
        if at.device.type == "cuda":
            torch.cuda.synchronize(at.device)
    found = {f"out {i}": tensor for i, tensor in enumerate(returned)} | {f"state {name}": tensor for name, tensor in work.state.items()}
    return {name: tensor.detach() for name, tensor in found.items()}


def nodes_there(name: str, tensor: Tensor, there: Tensor | None) -> Tensor:
    """Of a tree's field [B, M, ...] the rows of the nodes that are `there` [B, M]; anything else as it is."""
    return tensor[there] if there is not None and name.startswith("state ") and tensor.shape[:2] == there.shape else tensor


def differences(operation: str, at: Sizes) -> dict[str, tuple[torch.dtype, Deviation]]:
    """The deviation of the kernel from the reference by tensor, and the dtype that decides its bound: the kernel's."""
    ours, reference = outcome(operation, at, kernel=True), outcome(operation, at, kernel=False)
    there, theirs = ours.get("state visits"), reference.get("state visits")
    if there is not None:
        there, theirs = there > 0, theirs > 0
        if not torch.equal(there, theirs):
            return {"state visits": (torch.bool, deviation(there, theirs))}
    found = {}
    # Each layout of a tree has fields that the other does not: Links are the reference's alone.
    for name in ours:
        if name in reference:
            pair = (nodes_there(name, side[name], there) for side in (ours, reference))
            found[name] = ours[name].dtype, deviation(*pair)
    return found


def passes(dtype: torch.dtype, found: Deviation) -> bool:
    """Whether a deviation is within the bound of its dtype; integers must be equal as numbers."""
    return found.within(BOUNDS[dtype]) if dtype in BOUNDS else found.differ == 0


def toy(config: Config) -> Config:
    """The config for the interpreter."""
    return dataclasses.replace(config, **{name: min(getattr(config, name), most) for name, most in TOY.items()})


def compared(operation: str, at: Sizes, record: Record) -> dict[str, dict]:
    """Compare one operation; returns its deviations for JSON. Fails the record for every tensor beyond its bound."""
    found = differences(operation, at)
    worst = max(found, key=lambda name: (found[name][1].relative, not found[name][1].bitwise))
    equal, of = sum(one.bitwise for _, one in found.values()), found[worst][1]
    record.say(f"{operation:20s} {len(found):8d} {equal:8d} {of.largest:10.2e} {of.relative:10.2e}  {'-' if of.bitwise else worst}")
    for name, (dtype, one) in found.items():
        if not passes(dtype, one):
            record.fail(f"{operation}, {name}: {one.differ} numbers differ, relatively by {one.relative:.2e}, more than {dtype} may")
    return {name: one.to_json() | {"dtype": str(dtype), "passed": passes(dtype, one)} for name, (dtype, one) in found.items()}


def run(job: Job, record: Record) -> None:
    if not job.cuda and not knobs.runtime.interpret:
        sys.exit("error: parity on a CPU needs TRITON_INTERPRET=1 before Triton is imported; gpu_check sets it")
    config = job.pick(job.config, toy(job.config))
    at = Sizes(config, network_spec(config, job.spec.frame_shape, job.spec.num_actions), job.device)
    record.keep("kernels", "compiled" if job.cuda else "interpreted")
    record.keep("sizes", {"roots": at.roots, "batch_size": config.batch_size, "network": dataclasses.asdict(at.network)})
    bounds = ", ".join(f"{str(dtype).removeprefix('torch.')} {bound:.3g}" for dtype, bound in BOUNDS.items())
    record.say(f"kernels {record.results['kernels']}, {at.roots} roots, batch {config.batch_size}",
               f"bounds of the relative deviation: {bounds}; all else must be equal")
    record.say(f"{'operation':20s} {'tensors':>8s} {'bitwise':>8s} {'largest':>10s} {'relative':>10s}  of")
    operations: dict[str, dict] = {}
    for operation in MAKERS:
        if job.left() == 0:
            record.fail(f"{operation} and {len(MAKERS) - len(operations) - 1} more were not compared: out of time")
            break
        try:
            operations[operation] = compared(operation, at, record)
        except Exception as error:  # one operation that fails must not hide the others; a device that is lost fails them all
            operations[operation] = {"error": str(error)}
            record.fail(f"{operation}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        record.keep("operations", operations)
