"""The parts of gpu_check.py, a file each: `run(job, record)` measures, and says what it found in lines for people and numbers for JSON."""

from types import ModuleType

NAMES = ("facts", "parity", "capture", "speed", "idle", "emulators", "train")
"""In the order in which they run: what later parts read comes first, what takes any time that is left comes last."""


def load(name: str) -> ModuleType:
    """The part of a name. Imported when it runs: a part must not see what another one needs."""
    from importlib import import_module

    return import_module(f"checks.{name}")
