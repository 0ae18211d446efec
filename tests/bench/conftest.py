"""The bench's options, its stored ratios, and what it prints at the end."""

import json
from pathlib import Path

import pytest
import torch

from tools.profile import timing

BASELINE = Path(__file__).with_name("baseline.json")
RESULTS = pytest.StashKey[list[str]]()


def pytest_addoption(parser):
    # Seen only where tests/bench is named on the command line; elsewhere the option counts as not given.
    parser.addoption("--update-baseline", action="store_true", help="write this run's ratios to tests/bench/baseline.json")


def pytest_report_header():
    if torch.cuda.is_available():
        return f"bench: kernels on {torch.cuda.get_device_name()}, against their references and the library"
    return "bench: no CUDA device, so the public functions are the references: these against the library"


def pytest_terminal_summary(terminalreporter, config):
    lines = config.stash.get(RESULTS, [])
    if lines:
        terminalreporter.section("bench")
        for line in lines:
            terminalreporter.write_line(line)


class Baseline:
    """Ratios of earlier runs by kind of device and name of the comparison."""

    def __init__(self, path: Path, kind: str, config: pytest.Config):
        self.path, self.kind, self.config = path, kind, config
        self.stored: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
        self.fresh: dict[str, float] = {}

    def check(self, name: str, comparison: timing.Comparison, noise: float) -> str:
        """Note a comparison; fail the test if it has become worse. Returns the verdict."""
        self.fresh[name] = comparison.ratio
        before = self.stored.get(self.kind, {}).get(name)
        verdict = "no baseline" if before is None else f"baseline {before:.3g}"
        low, high = comparison.quartiles
        self.say(f"{name:60s} {1e6 * comparison.ours:10.1f} us  ratio {comparison.ratio:.3g} [{low:.3g}, {high:.3g}]  {verdict}")
        if before is not None and not self.updates and comparison.regressed(before, noise):
            pytest.fail(f"{name}: ratio {comparison.ratio:.3g}, lower quartile {low:.3g}, was {before:.3g} on {self.kind}")
        return verdict

    def say(self, line: str) -> None:
        """Print at the end of the run."""
        self.config.stash.setdefault(RESULTS, []).append(line)

    @property
    def updates(self) -> bool:
        return bool(self.config.getoption("update_baseline", False))

    def save(self) -> None:
        """Write what was measured, if asked to."""
        if self.updates and self.fresh:
            self.stored[self.kind] = dict(sorted((self.stored.get(self.kind, {}) | self.fresh).items()))
            self.path.write_text(json.dumps(self.stored, indent=1, sort_keys=True) + "\n")


@pytest.fixture(scope="session")
def baseline(pytestconfig):
    kind = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    kept = Baseline(BASELINE, kind, pytestconfig)
    yield kept
    kept.save()


@pytest.fixture(scope="session")
def ceilings():
    """Of the CUDA device; None where there is none."""
    return timing.ceilings(torch.device("cuda")) if torch.cuda.is_available() else None
