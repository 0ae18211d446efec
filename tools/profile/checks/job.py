"""What a part is given, a `Job`, and where it puts what it finds, a `Record`: a file that is complete at any moment."""

import json
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from speedyzero.config import Config, from_json
from speedyzero.envs import EnvSpec, describe
from speedyzero.run.files import write_json


@dataclass(frozen=True)
class Job:
    """The run that is looked at, and how long a part may look."""

    config: Config
    """Resolved."""
    spec: EnvSpec
    arguments: tuple[str, ...]
    """The flags of python -m speedyzero that make this config, but --run-dir."""
    work: Path
    """Folder of all files."""
    deadline: float
    """On the clock of `time.monotonic`: when a part should have all it needs."""

    @property
    def device(self) -> torch.device:
        return torch.device(self.config.device)

    @property
    def cuda(self) -> bool:
        return self.config.device == "cuda"

    def left(self) -> float:
        """Seconds to the deadline, 0 once it has passed."""
        return max(0.0, self.deadline - monotonic())

    def pick(self, cuda: Any, toy: Any) -> Any:
        """The number for a card, or that for the toy run of a CPU."""
        return cuda if self.cuda else toy


def write_job(work: Path, config: Config, arguments: list[str]) -> None:
    """Leave in `work` what all parts read."""
    write_json(work / "job.json", {"config": config.to_json(), "arguments": arguments})


def read_job(work: Path, deadline: float) -> Job:
    """The job in `work`. Raises ConfigError or EnvError."""
    written = json.loads((work / "job.json").read_text())
    config = from_json(written["config"], work / "job.json")
    return Job(config, describe(config.env, frame_size=config.frame_size, gray=config.gray), tuple(written["arguments"]), work, deadline)


class Record:
    """What a part found so far; every change is on the disk before the next is made, as the part may be ended at any time."""

    def __init__(self, path: Path):
        self.path = path
        self.results: dict[str, Any] = {}
        self.lines: list[str] = []
        self.failures: list[str] = []
        self.unfinished: list[str] = []
        self.write()

    def keep(self, name: str, value: Any) -> None:
        """Note a result."""
        self.results[name] = value
        self.write()

    def say(self, *lines: str) -> None:
        """Lines for people, in the order they are to be read."""
        self.lines += lines
        self.write()

    def fail(self, line: str) -> None:
        """Note in one line what is not as it must be; the part goes on."""
        self.failures.append(line)
        self.write()

    def late(self, line: str) -> None:
        """Note in one line what was not done for lack of time, which is no failure."""
        self.unfinished.append(line)
        self.write()

    def write(self) -> None:
        write_json(self.path, {name: getattr(self, name) for name in ("lines", "failures", "unfinished", "results")})


def read_results(work: Path, part: str) -> dict[str, Any]:
    """What another part has kept; empty if it did not run."""
    path = work / f"{part}.json"
    return json.loads(path.read_text())["results"] if path.exists() else {}
