"""The tools of tools/, which are no package: loaded by their path, each under a name of its own."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

TOOLS = Path(__file__).parents[2] / "tools"


def load_tool(monkeypatch, folder: str, name: str) -> ModuleType:
    """tools/`folder`/`name`.py, anew and until the test ends. trace.py has the name of a module of Python's own, hence `folder`_`name`."""
    monkeypatch.syspath_prepend(str(TOOLS / folder))
    spec = importlib.util.spec_from_file_location(f"{folder}_{name}", TOOLS / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module
