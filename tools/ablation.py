"""Do SpeedyZero's two techniques matter where the batch is large? An ablation: batch x optimiser x Priority Refresh, three seeds each.

    python -m tools.ablation --env Catch-v0 --out ablations/catch
    python -m tools.ablation --env Krull-v5 --out ablations/krull --env-steps 8000 --lanes 8 --samples 64 --batches 512 -- --threads 1

Every cell takes the same environment steps and learns from the same number of windows: a batch that is four times as large has a quarter
of the updates. Each is a suite (`speedyzero.suite`), so the same command goes on where it was interrupted. Prints the table and writes it
to OUT/ablation.md, and the picture to OUT/ablation.png, which needs matplotlib (pip install 'speedyzero[plot]'). Flags of the runs come
after `--`.
"""

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import tyro

from speedyzero.config import ConfigError
from speedyzero.run.record import Recorded, RunError, read

OPTIMIZERS = {
    "SGD": ("--optimizer", "sgd"),
    "LARS": ("--optimizer", "clipped-lars", "--trust-clip", "1e30"),
    "Clipped LARS": ("--optimizer", "clipped-lars"),
}
COLOURS = {"SGD": "tab:gray", "LARS": "tab:orange", "Clipped LARS": "tab:blue"}
SNAPSHOT, FINAL = 2560, 32_000
"""Windows between two copies of the network for the searches, and windows learned after the last environment step."""

MOST = 1e30
"""Largest learning rate that a run takes."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class Arguments:
    """Batch x optimiser x Priority Refresh, at the same number of samples."""

    env: str
    """EnvPool id."""
    out: Path
    """Folder of the suites, the table and the picture."""
    env_steps: int = 6_000
    """Environment steps of a run."""
    lanes: int = 32
    """Environments side by side."""
    samples: int = 16
    """Windows learned for each environment step."""
    batches: tuple[int, ...] = (32, 128, 512)
    """Windows of an update."""
    optimizers: tuple[str, ...] = tuple(OPTIMIZERS)
    """Among SGD, LARS, Clipped LARS."""
    rates: tuple[float, ...] = (1.0,)
    """Learning rates: one for all, or one for each batch and optimiser, batch by batch."""
    refresh_roots: int = 512
    """Positions searched again for each step of the lanes."""
    seeds: int = 3
    """Runs of a cell, with the seeds 0 to SEEDS - 1."""
    jobs: int = 1
    """Processes at a time on a CPU."""


class Cell(NamedTuple):
    """What is compared."""

    batch: int
    optimizer: str
    refresh: bool
    lr: float

    @property
    def name(self) -> str:
        return f"b{self.batch}_{self.optimizer.lower().replace(' ', '-')}_{'' if self.refresh else 'no-'}refresh_lr{self.lr:g}"

    def flags(self, options: Arguments) -> list[str]:
        """The flags of its runs. Raises ConfigError: the samples are not whole updates."""
        windows = options.samples * options.lanes
        if windows % self.batch:
            raise ConfigError(
                f"--batches {self.batch}: --samples {options.samples} of --lanes {options.lanes} are no whole number of updates; "
                f"give a divisor of {windows}"
            )
        return [
            "--env-steps", str(options.env_steps), "--lanes", str(options.lanes), "--refresh-roots", str(options.refresh_roots),
            "--batch-size", str(self.batch), "--updates-per-iteration", str(windows // self.batch),
            "--final-updates", str(FINAL // self.batch), "--snapshot-interval", str(max(1, SNAPSHOT // self.batch)),
            "--log-interval", "10", "--lr", str(self.lr), *OPTIMIZERS[self.optimizer],
            *([] if self.refresh else ["--no-priority-refresh"]),
        ]  # fmt: skip


def cells(options: Arguments) -> list[Cell]:
    """All cells, the largest batch first. Raises ConfigError: a count below 1, an unknown optimiser, or a rate or their number is wrong."""
    counts = [(name, getattr(options, name)) for name in ("env_steps", "lanes", "samples", "refresh_roots", "seeds", "jobs")]
    if low := next((pair for pair in [*counts, *(("batches", batch) for batch in options.batches)] if pair[1] < 1), None):
        raise ConfigError(f"--{low[0].replace('_', '-')} {low[1]}: must be greater than 0")
    if empty := next((name for name in ("batches", "optimizers") if not getattr(options, name)), None):
        raise ConfigError(f"--{empty}: give at least one")
    if odd := set(options.optimizers) - set(OPTIMIZERS):
        raise ConfigError(f"--optimizers {min(odd)}: not one of {', '.join(OPTIMIZERS)}")
    pairs = [(batch, optimizer) for batch in options.batches for optimizer in options.optimizers]
    if len(options.rates) not in (1, len(pairs)):
        raise ConfigError(f"--rates: {len(options.rates)} of them; give 1, or {len(pairs)}, one for each batch and optimiser")
    rates = options.rates * len(pairs) if len(options.rates) == 1 else options.rates
    if odd_rate := next((rate for rate in rates if not 0 < rate <= MOST), None):
        raise ConfigError(f"--rates {odd_rate}: must be greater than 0 and at most {MOST:g}")
    found = [Cell(*pair, refresh, lr) for pair, lr in zip(pairs, rates, strict=True) for refresh in (True, False)]
    return sorted(found, key=lambda cell: -cell.batch)


class Outcome(NamedTuple):
    """What a run came to."""

    curve: float | None
    """Mean of charts/episodic_return over the environment steps of the training: how soon it learned. None: no game was over."""
    score: float
    """Mean of the games of the evaluation at the end."""
    correlation: float | None
    """Mean of train/priority_rank_correlation over the second half of the environment steps."""


def outcome(run: Recorded) -> Outcome:
    """The outcome of a complete run. Raises RunError: it has no row of training."""
    training = [(before, now) for before, now in pairwise(run.rows) if now["updates"] and now["env_steps"] > before["env_steps"]]
    if not training or run.evaluation is None:
        raise RunError(f"{run.folder}: has no complete training")
    spans = [
        (now["env_steps"] - before["env_steps"], now["charts/episodic_return"])
        for before, now in training
        if now.get("charts/episodic_return") is not None
    ]
    curve = sum(span * value for span, value in spans) / sum(span for span, _ in spans) if spans else None
    later = [now.get("train/priority_rank_correlation") for _, now in training if now["env_steps"] > run.config["env_steps"] / 2]
    known = [value for value in later if value is not None]
    return Outcome(curve, run.evaluation["mean"], mean(known) if known else None)


def table(found: dict[Cell, list[Outcome]]) -> str:
    """Markdown: a row a cell, the mean over the seeds and each of them."""

    def say(values: list[float | None]) -> str:
        there = [value for value in values if value is not None]
        return f"**{mean(there):.2f}** ({', '.join(f'{value:.2f}' for value in there)})" if there else "-"

    def lines() -> Iterator[str]:
        yield "| batch | optimiser | rate | Priority Refresh | return while learning | games at the end | rank correlation |"
        yield "|---|---|---|---|---|---|---|"
        for cell, outcomes in found.items():
            columns = " | ".join(say(list(values)) for values in zip(*outcomes, strict=True))
            yield f"| {cell.batch} | {cell.optimizer} | {cell.lr:g} | {'yes' if cell.refresh else 'no'} | {columns} |"

    return "\n".join(lines()) + "\n"


def figure(found: dict[Cell, list[Outcome]], env: str) -> Any:
    """The picture, a matplotlib Figure: a panel for each measure over the batch. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(13.0, 4.4), layout="constrained", dpi=110)
    titles = ("return while learning", "games at the end", "rank correlation of the priorities")
    for place, (panel, title) in enumerate(zip(picture.subplots(1, 3), titles, strict=True)):
        for optimizer in COLOURS:
            for refresh in (True, False):
                own = {cell.batch: outcomes for cell, outcomes in found.items() if (cell.optimizer, cell.refresh) == (optimizer, refresh)}
                points = {batch: [one[place] for one in outcomes if one[place] is not None] for batch, outcomes in sorted(own.items())}
                if points := {batch: values for batch, values in points.items() if values}:
                    name = f"{optimizer}, {'with' if refresh else 'without'} Priority Refresh"
                    style = {"color": COLOURS[optimizer], "linestyle": "-" if refresh else ":"}
                    panel.plot(list(points), [mean(values) for values in points.values()], label=name, marker="o", **style)
                    for batch, values in points.items():
                        panel.plot([batch] * len(values), values, linestyle="", marker=".", color=COLOURS[optimizer], alpha=0.4)
        panel.set(title=title, xlabel="batch, at the same number of samples", xscale="log")
        batches = sorted({cell.batch for cell in found})
        panel.set_xticks(batches, map(str, batches))
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    handles, labels = picture.axes[0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside lower center", ncols=3)
    seeds = max(map(len, found.values()))
    picture.suptitle(f"{env}: mean of {seeds} seeds" if seeds > 1 else f"{env}: one seed")
    return picture


def run_suite(command: Sequence[str]) -> int:
    """Run a suite to its end; returns its exit code. The first Ctrl-C, SIGTERM or SIGHUP is handed on, and the suite lets its runs save.

    subprocess.run would kill the suite a quarter of a second after Ctrl-C. The suite has a session of its own, so that Ctrl-C does not
    reach it twice: a second request would end its runs unsaved.
    """
    process: subprocess.Popen[bytes] | None = None
    asked: list[int] = []

    def stop(number: int, _: object) -> None:
        asked.append(number)
        if process is not None and len(asked) == 1:
            process.send_signal(number)

    # One that is ignored, as nohup ignores SIGHUP, stays so.
    before = {number: signal.signal(number, stop) for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN}
    try:
        process = subprocess.Popen(command, start_new_session=True)
        if asked:  # while it was started
            process.send_signal(asked[0])
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main() -> None:
    given = sys.argv[1:]
    split = given.index("--") if "--" in given else len(given)
    options, more = tyro.cli(Arguments, prog="python -m tools.ablation", args=given[:split]), given[split + 1 :]
    try:
        commands = {cell: cell.flags(options) for cell in cells(options)}
        for cell, flags in commands.items():
            out = options.out / cell.name
            suite = ["--games", options.env, "--seeds", str(options.seeds), "--jobs", str(options.jobs), "--out", str(out)]
            if code := run_suite([sys.executable, "-m", "speedyzero.suite", *suite, "--", *flags, *more]):
                sys.exit(code if code > 0 else 128 - code)
        found = {cell: [outcome(read(run)) for run in sorted((options.out / cell.name).glob("*_seed*/"))] for cell in sorted(commands)}
    except (ConfigError, RunError) as error:
        sys.exit(f"error: {error}")
    text = table(found)
    (options.out / "ablation.md").write_text(text)
    print(text)
    try:
        picture = figure(found, options.env)
    except ImportError:
        sys.exit("error: matplotlib is missing for the picture: pip install 'speedyzero[plot]'")
    picture.savefig(options.out / "ablation.png")


if __name__ == "__main__":
    main()
