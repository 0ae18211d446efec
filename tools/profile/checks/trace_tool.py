"""tools/profile/trace.py, imported under another name: a module of Python's own is called `trace`, and may be loaded already."""

import importlib.util
import sys
from pathlib import Path

_NAME = "profile_trace"
_spec = importlib.util.spec_from_file_location(_NAME, Path(__file__).parents[1] / "trace.py")
trace = importlib.util.module_from_spec(_spec)
sys.modules[_NAME] = trace  # a dataclass looks its module up
_spec.loader.exec_module(trace)
