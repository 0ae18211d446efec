"""Compile every kernel ahead of time, as the presets use it on CUDA, and print what each takes. Needs no GPU.

    python -m tools.profile.compile_table                       # all presets, sm_80 and sm_90
    python -m tools.profile.compile_table --presets efficientzero --envs Pong-v5 --arch 90
    python -m tools.profile.compile_table --write kernels/README.md

The configurations are not listed here: the trainer's own `iteration` runs on tensors without memory, as in launches.py, and every
launch is recorded instead of made. Triton's own binder then says what a launch would have specialised on.
Exits with 1 if a kernel of the package was never launched, does not compile, or spills registers to memory.
"""

import os

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter compiles nothing

import dataclasses
import importlib
import json
import multiprocessing
import pkgutil
import re
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import tyro
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, MockTensor, create_function_from_signature

import speedyzero_kernels
from speedyzero.config import PRESETS, preset_config, resolve
from speedyzero.envs import describe
from speedyzero.iteration import iteration
from speedyzero.ranks import ALONE, Ranks
from tools.profile.blank import blank_state
from tools.profile.launches import Counting

# An environment of 6 actions, one of 18, and for the small presets a board that is not halved.
ENVIRONMENTS = {name: ("Catch-v0",) if name in ("cpu", "smoke") else ("Pong-v5", "Boxing-v5") for name in PRESETS}
# Between them every choice that brings other kernels or other constants.
CHOICES = (
    {"search": "puct", "refresh": "sweep", "optimizer": "sgd"},
    {"search": "gumbel", "refresh": "sampled", "optimizer": "clipped-lars"},
)
# Presets that several GPUs may share: what one of two launches is compiled, too.
SHARED = ("efficientzero", "speedyzero")
# Names that Triton's generated binder keeps for itself: a kernel with such a parameter fails at its first launch on a GPU, and only there.
RESERVED = {"params", "specialization", "options"}
BEGIN, END = "<!-- compile table: begin -->", "<!-- compile table: end -->"


@dataclass(frozen=True)
class Launch:
    """One specialisation of a kernel, picklable: what `triton.compile` needs."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    attributes: tuple[tuple[tuple[int, ...], tuple[tuple[str, int], ...]], ...]
    options: tuple[tuple[str, Any], ...]

    def facts(self) -> dict[str, Any]:
        """All that tells it from other launches of its kernel, by name."""
        names = [name for name, _ in self.signature]
        facts = {name: kind for name, kind in self.signature if kind != "constexpr"}
        facts |= {names[path[0]]: value for path, value in self.constants}
        facts |= {f"{names[path[0]]}'s alignment": dict(value).get("tt.divisibility", 1) for path, value in self.attributes}
        return facts | dict(self.options)


class Recording(Counting):
    """Notes in `launches` what Triton would compile of every launch of a kernel.

    Raises:
        TypeError: Triton could not bind the arguments of a launch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: set[Launch] = set()
        self._backend = make_backend(GPUTarget("cuda", 90, 32))
        self._binders: dict[JITFunction, Any] = {}

    def note_kernel(self, kernel: JITFunction, args: tuple, kwargs: dict[str, Any]) -> None:
        if clash := RESERVED & set(kernel.arg_names):
            raise TypeError(f"{kernel.__module__}.{kernel.__name__}: Triton can bind no parameter named {', '.join(clash)}; rename it")
        if kernel not in self._binders:
            self._binders[kernel] = create_function_from_signature(kernel.signature, kernel.params, self._backend)
        # Triton asks a tensor for its address, which a fake one has not.
        args, kwargs = tree_map_only(torch.Tensor, lambda x: MockTensor(x.dtype, x.shape), (args, kwargs))
        bound, specialization, options = self._binders[kernel](*args, **kwargs)
        _, signature, constants, attributes = kernel._pack_args(self._backend, dict(kwargs), bound, specialization, options)
        self.launches.add(
            Launch(
                kernel.__module__,
                kernel.__name__,
                tuple(signature.items()),
                tuple(constants.items()),
                tuple((path, tuple(map(tuple, value))) for path, value in attributes.items()),
                tuple(sorted(options.items())),
            )
        )


def launches_of(preset: str, env: str) -> set[Launch]:
    """What a preset launches in an environment, with either search, refresh and optimiser, and on one of two GPUs."""
    base = preset_config(preset)
    spec = describe(env, frame_size=base.frame_size, gray=base.gray)
    found: set[Launch] = set()
    shared = [(CHOICES[0], Ranks(0, 2))] if preset in SHARED else []
    for choice, ranks in [*((choice, ALONE) for choice in CHOICES), *shared]:
        config = dataclasses.replace(base, env=env, device="cuda", updates_per_iteration=1, **choice)
        config = resolve(config, image=spec.image, atari=spec.family == "atari")
        fake = FakeTensorMode()
        blank = blank_state(config, spec, fake, ranks)
        with fake, Recording() as recording:
            blank.refold()
            iteration(blank, "train", config.refresh_roots)
        found |= recording.launches
    return found


def kernels() -> set[tuple[str, str]]:
    """Module and name of every kernel in the package."""
    found = set()
    for info in pkgutil.iter_modules(speedyzero_kernels.__path__, "speedyzero_kernels."):
        for name, value in vars(importlib.import_module(info.name)).items():
            if isinstance(value, JITFunction) and re.fullmatch(r"_\w+_kernel", name) and value.__module__ == info.name:
                found.add((info.name, name))
    return found


def rows_of(users: dict[Launch, set[str]]) -> list[dict[str, Any]]:
    """One row a launch: its kernel, the facts that tell it from the kernel's other launches, and which presets make it."""
    by_kernel: dict[tuple[str, str], list[Launch]] = defaultdict(list)
    for launch in users:
        by_kernel[launch.module, launch.kernel].append(launch)
    rows = []
    for (module, kernel), launches in sorted(by_kernel.items()):
        facts = [launch.facts() for launch in launches]
        varying = [name for name in facts[0] if any(fact.get(name) != facts[0][name] for fact in facts)]
        varying += sorted({name for fact in facts for name in fact} - set(facts[0]))
        for launch, fact in zip(launches, facts, strict=True):
            rows.append({
                "operation": module.rpartition(".")[2],
                "kernel": kernel.strip("_").removesuffix("_kernel"),
                "configuration": ", ".join(f"{name} {fact.get(name, 'absent')}" for name in varying),
                "presets": [name for name in PRESETS if name in users[launch]],
                "warps": fact.get("num_warps", 4),
                "launch": launch,
            })  # fmt: skip
    order = list(PRESETS)
    rows.sort(key=lambda row: (row["operation"], row["kernel"], [order.index(name) for name in row["presets"]], row["configuration"]))
    return rows


def compile_launch(launch: Launch, arch: int) -> dict[str, int]:
    """Compile for sm_`arch`: registers a thread, bytes of shared memory a program, bytes spilled a thread, tensor-core instructions."""
    function = getattr(importlib.import_module(launch.module), launch.kernel)
    source = ASTSource(
        fn=function,
        signature=dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={path: [list(pair) for pair in value] for path, value in launch.attributes},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(launch.options))
    cubin = Path(os.environ.get("TMPDIR", "/tmp")) / f"compile_table_{os.getpid()}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    try:
        usage = _cuobjdump("-res-usage", cubin)
        number = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
        # Disassembling is slow: only where the PTX says that there is something to find.
        mma = re.findall(r"\bH[G]?MMA\b", _cuobjdump("-sass", cubin)) if re.search(r"\bw?g?mma\.", compiled.asm["ptx"]) else []
    finally:
        cubin.unlink()
    return {
        "registers": number["REG"],
        "shared": compiled.metadata.shared,
        "spilled": number["STACK"] + number["LOCAL"],
        "HGMMA": mma.count("HGMMA"),
        "HMMA": mma.count("HMMA"),
    }


def _cuobjdump(flag: str, cubin: Path) -> str:
    return subprocess.run([knobs.nvidia.cuobjdump.path, flag, str(cubin)], capture_output=True, text=True, check=True).stdout


def tensor_cores(measured: dict[str, int]) -> str:
    """The kinds of tensor-core instructions that the SASS holds, with their number."""
    return ", ".join(f"{measured[kind]} {kind}" for kind in ("HGMMA", "HMMA") if measured[kind]) or "-"


def table(rows: list[dict[str, Any]], archs: tuple[int, ...]) -> str:
    """The rows as Markdown."""
    measures = [f"sm_{arch} {what}" for arch in archs for what in ("registers", "shared", "spilled", "tensor cores")]
    head = ["operation", "kernel", "configuration", "presets", "warps", *measures]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        line = [row["operation"], row["kernel"], row["configuration"] or "-", ", ".join(row["presets"]), str(row["warps"])]
        for arch in archs:
            measured = row[f"sm_{arch}"]
            line += [*(str(measured[what]) for what in ("registers", "shared", "spilled")), tensor_cores(measured)]
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(path: Path, text: str) -> None:
    """Put the table between the marks of a file."""
    whole = path.read_text()
    if whole.count(BEGIN) != 1 or whole.count(END) != 1:
        raise SystemExit(f"error: --write {path}: must hold the lines {BEGIN} and {END} once each")
    before, _, rest = whole.partition(BEGIN)
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}")


@dataclass
class Arguments:
    """Compile every kernel in every configuration of the presets, and print registers, shared memory and spills."""

    arch: tuple[int, ...] = (80, 90)
    """Compute capabilities, as 80 for sm_80."""
    presets: tuple[str, ...] = tuple(PRESETS)
    """Presets to take configurations from."""
    envs: tuple[str, ...] = ("Pong-v5", "Boxing-v5", "Catch-v0")
    """Environments to take frame and action shapes from, of those that belong to the presets."""
    jobs: int = 2
    """Processes that compile."""
    list: bool = False
    """Only list the configurations, as JSON; compile nothing."""
    json: Path | None = None
    """Also write the rows as JSON to this file."""
    write: Path | None = None
    """Also replace the table in this Markdown file."""


def main() -> None:
    arguments = tyro.cli(Arguments)
    users: dict[Launch, set[str]] = defaultdict(set)
    for preset in arguments.presets:
        for env in ENVIRONMENTS[preset]:
            if env in arguments.envs:
                for launch in launches_of(preset, env):
                    users[launch].add(preset)
    rows = rows_of(users)
    missing = kernels() - {(launch.module, launch.kernel) for launch in users}
    faults = [f"{module}.{name}: no preset launches it" for module, name in sorted(missing)]
    if arguments.list:
        named = ("operation", "kernel", "configuration", "presets")
        print(json.dumps([{name: row[name] for name in named} for row in rows]))
        sys.exit("\n".join(faults) or 0)

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool:
        futures = [(row, arch, pool.submit(compile_launch, row["launch"], arch)) for row in rows for arch in arguments.arch]
        for row, arch, future in futures:
            what = f"{row['operation']}.{row['kernel']} ({row['configuration']}) sm_{arch}"
            try:
                row[f"sm_{arch}"] = future.result()
            except Exception as error:
                faults.append(f"{what}: {type(error).__name__}: {error}")
                row[f"sm_{arch}"] = dict.fromkeys(("registers", "shared", "spilled", "HGMMA", "HMMA"), 0)
                continue
            if row[f"sm_{arch}"]["spilled"]:
                faults.append(f"{what}: spills {row[f'sm_{arch}']['spilled']} bytes a thread")
    note = f"Triton {triton.__version__}; shared memory in bytes a program, registers and spilled bytes a thread."
    text = f"{note}\n\n{table(rows, arguments.arch)}"
    print(text)
    if arguments.json:
        plain = [{name: value for name, value in row.items() if name != "launch"} for row in rows]
        arguments.json.write_text(json.dumps({"triton": triton.__version__, "rows": plain}, indent=1))
    if arguments.write:
        write(arguments.write, text)
    sys.exit("\n".join(faults) or 0)


if __name__ == "__main__":
    main()
