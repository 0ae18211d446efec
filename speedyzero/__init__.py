"""speedyzero: EfficientZero and SpeedyZero training as one loop on one device. Start at `iteration`; run with `python -m speedyzero`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speedyzero.agent import Agent, load

__all__ = ["Agent", "__version__", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`Agent` and `load`, imported when first asked for: PyTorch takes seconds, and `import speedyzero` should not."""
    if name not in ("Agent", "load"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from speedyzero import agent

    return getattr(agent, name)
