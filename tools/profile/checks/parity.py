"""Every operation of the kernel library against its reference, at the sizes of the run, on equal states from one seed.

Both forms are reached through the public function, with `dispatch.runs_kernel` answering for all: so it compares what the trainer
calls, the convolutions too, of which the bench knows only the library's form. It compares all that a function returns and all that it
was given, as it writes in place; of a tree, the nodes that exist. Random numbers come from generators of one seed.

On a CPU the kernels run in Triton's interpreter, which the driver asks for with TRITON_INTERPRET=1, at the sizes of TOY at most: that
shows the arithmetic, and nothing of what a compiler makes of it.
"""

import dataclasses
import sys
from unittest import mock

import torch
from torch import Tensor
from triton import knobs

from speedyzero.sizes import network_spec
from speedyzero_kernels import dispatch
from tools.profile.checks.compare import Deviation, deviation
from tools.profile.checks.job import Job, Record
from tools.profile.operations import MAKERS, Sizes

SEED = 0
TOY = {"refresh_roots": 16, "batch_size": 8, "lstm": 16, "projection": 32}
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2**-6, torch.float16: 2**-9}
"""Of |kernel - reference| / (|reference| + rms); what is no floating-point number must be equal."""


def outcome(operation: str, at: Sizes, kernel: bool) -> dict[str, Tensor]:
    """What the operation returns and what its state is after it, by name."""
    with mock.patch.object(dispatch, "runs_kernel", lambda x: kernel and x.device.type != "meta"):
        work = MAKERS[operation](at, SEED)
        returned = work.ours()
        if at.device.type == "cuda":
            torch.cuda.synchronize(at.device)
    found = {f"out {i}": tensor for i, tensor in enumerate(returned)} | {f"state {name}": tensor for name, tensor in work.state.items()}
    return {name: tensor.detach() for name, tensor in found.items()}


def differences(operation: str, at: Sizes) -> dict[str, tuple[torch.dtype, Deviation]]:
    """The deviation of the kernel from the reference by tensor, and the dtype that decides its bound: the kernel's."""
    ours, theirs = outcome(operation, at, kernel=True), outcome(operation, at, kernel=False)
    there = None
    if "state visits" in ours:  # of a tree's fields [B, M, ...] only the nodes that exist say something
        there = ours["state visits"] > 0
        if not torch.equal(there, theirs["state visits"] > 0):
            return {"state visits": (torch.bool, deviation(there, theirs["state visits"] > 0))}
    found = {}
    for name in ours.keys() & theirs.keys():  # each layout of a tree has fields that the other does not
        a, b = ours[name], theirs[name]
        if there is not None and name.startswith("state ") and a.shape[:2] == there.shape:
            a, b = a[there], b[there]
        found[name] = a.dtype, deviation(a, b)
    return found


def passes(dtype: torch.dtype, found: Deviation) -> bool:
    """Whether a deviation is within the bound of its dtype; integers must be equal as numbers."""
    return found.within(BOUNDS[dtype]) if dtype in BOUNDS else found.differ == 0


def compared(operation: str, at: Sizes, record: Record) -> dict[str, dict]:
    """Compare one operation; returns its deviations for JSON. Fails the record for every tensor beyond its bound."""
    found = differences(operation, at)
    worst = max(found, key=lambda name: (found[name][1].relative, not found[name][1].bitwise))
    equal, of = sum(one.bitwise for _, one in found.values()), found[worst][1]
    record.say(f"{operation:20s} {len(found):8d} {equal:8d} {of.largest:10.2e} {of.relative:10.2e}  {'-' if of.bitwise else worst}")
    for name, (dtype, one) in found.items():
        if not passes(dtype, one):
            record.fail(f"{operation}, {name}: {one.differ} numbers differ, relatively by {one.relative:.2e}, more than {dtype} may")
    return {name: dataclasses.asdict(one) | {"passed": passes(dtype, one)} for name, (dtype, one) in found.items()}


def run(job: Job, record: Record) -> None:
    if not job.cuda and not knobs.runtime.interpret:
        sys.exit("error: parity on a CPU needs TRITON_INTERPRET=1 before Triton is imported; gpu_check sets it")
    config = job.config
    if not job.cuda:
        config = dataclasses.replace(config, **{name: min(getattr(config, name), most) for name, most in TOY.items()})
    at = Sizes(config, network_spec(config, job.spec.frame_shape, job.spec.num_actions), job.device)
    bounds = ", ".join(f"{str(dtype).removeprefix('torch.')} {bound:.3g}" for dtype, bound in BOUNDS.items())
    record.say(f"kernels {'compiled' if job.cuda else 'interpreted'}, {at.roots} roots, batch {config.batch_size}",
               f"bounds of the relative deviation: {bounds}; all else must be equal",
               f"{'operation':20s} {'tensors':>8s} {'bitwise':>8s} {'largest':>10s} {'relative':>10s}  of")
    operations: dict[str, dict] = {}
    for operation in MAKERS:
        if job.left() == 0:
            record.late(f"{operation} and {len(MAKERS) - len(operations) - 1} more were not compared")
            break
        try:
            operations[operation] = compared(operation, at, record)
        except Exception as error:  # one operation that fails must not hide the others; a device that is lost fails them all
            operations[operation] = {"error": str(error)}
            record.fail(f"{operation}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        record.keep("operations", operations)
