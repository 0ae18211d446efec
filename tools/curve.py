"""The learning curve of a run, finished or not, or of several laid over each other.

    python -m tools.curve RUN_DIR                                      # writes docs/runs/NAME.csv and NAME.png
    python -m tools.curve runs/sweep runs/sampled --labels sweep sampled --out docs/runs/refresh

Prints the table for BENCHMARKS.md. The CSV has a row for every logged row, the picture the return and the panels of the report. The
picture needs matplotlib (pip install 'speedyzero[plot]').
"""

import csv
import io
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from speedyzero.report import PANELS, RETURN, points
from speedyzero.run.files import replacing
from speedyzero.run.record import Recorded, RunError, clock, human_share, read
from speedyzero.scores import ATARI_100K

COLUMNS = (
    "iteration", "env_steps", "updates", "wall_s", RETURN, "charts/episodes", "losses/loss", *(panel.key for panel in PANELS),
    "train/learning_rate", "train/skipped_updates",
)  # fmt: skip
"""Of the CSV, after the name of the run."""
HEAD = ("environment", "preset", "seed", "device", "environment steps", "updates", "wall-clock", "mean score", "human-normalised")
ACROSS = 5
"""Panels beside each other; the return takes two of them, and two rows."""


def to_csv(runs: Sequence[Recorded], labels: Sequence[str]) -> str:
    """All rows of all runs, the name of the run first; a cell is empty where a row has no value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("run", *COLUMNS))
    for run, label in zip(runs, labels, strict=True):
        writer.writerows((label, *(row.get(key) for key in COLUMNS)) for row in run.rows)
    return text.getvalue()


def table(runs: Sequence[Recorded], labels: Sequence[str]) -> str:
    """A table for BENCHMARKS.md, a line a run; of several, the name of the run first."""
    lines = [HEAD, ("---",) * len(HEAD), *map(_cells, runs)]
    if len(runs) > 1:
        lines = [(first, *cells) for first, cells in zip(("run", "---", *labels), lines, strict=True)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(run: Recorded) -> tuple[str, ...]:
    steps, updates, human, played = run.last["env_steps"], run.last["updates"], None, run.evaluation
    if played:
        score, human = f"{played['mean']:.2f} over {played['episodes']} episodes", human_share(run.env, played)
        if (played["env_steps"], played["updates"]) != (steps, updates):
            score += f", played after {played['env_steps']:,} steps and {played['updates']:,} updates"
    else:
        _, returns = points(run, "env_steps", RETURN)
        score = "none yet" + (f" (the last games of training {returns[-1]:.2f})" if returns else "")
    wall = clock(run.last["wall_s"]) + ("" if run.summary else ", unfinished")
    names = (str(run.config[name]) for name in ("env", "preset", "seed", "device"))
    return (*names, f"{steps:,}", f"{updates:,}", wall, score, "-" if human is None else f"{human:.3f}")


def figure_of(runs: Sequence[Recorded], labels: Sequence[str]) -> Any:
    """The picture, a matplotlib Figure. `runs` are of one environment; each has a colour. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    panels = [panel for panel in PANELS if any(row.get(panel.key) is not None for run in runs for row in run.rows)]
    # Row by row; the square of the first two rows and columns is the return's.
    places = [place for place in itertools.product(range(2 + len(panels)), range(ACROSS)) if max(place) > 1][: len(panels)]
    down = max([2, *(row + 1 for row, _ in places)])
    figure, config = Figure((3.5 * ACROSS, 2.9 * down), dpi=110, layout="constrained"), runs[0].config
    how_far = "" if runs[0].summary else f", unfinished at {runs[0].last['env_steps']:,} of {config['env_steps']:,} environment steps"
    only = f"preset {config['preset']}, seed {config['seed']}, {config['device']}{how_far}"
    figure.suptitle(f"{runs[0].env}, " + (only if len(runs) == 1 else f"{len(runs)} runs"), fontsize=13)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    grid = figure.add_gridspec(down, ACROSS)
    draw_return(figure.add_subplot(grid[:2, :2]), runs, labels)
    for panel, place in zip(panels, places, strict=True):
        axes = figure.add_subplot(grid[place])
        for number, run in enumerate(runs):
            axes.plot(*points(run, "env_steps", panel.key, training=panel.training), color=f"C{number}", linewidth=1.1)
        if panel.log:
            axes.set_yscale("log")
        finish(axes, panel.title, panel.note)
    return figure


def draw_return(axes: Any, runs: Sequence[Recorded], labels: Sequence[str]) -> None:
    """The return against the environment steps, the evaluation as a point, random and human play as lines."""
    for number, (run, label) in enumerate(zip(runs, labels, strict=True)):
        colour, played = f"C{number}", run.evaluation
        score = f"evaluation: {played['mean']:.2f} over {played['episodes']} episodes" if played else ""
        name = "last games of training" if len(runs) == 1 else ", ".join(filter(None, (label, score)))
        axes.plot(*points(run, "env_steps", RETURN), color=colour, linewidth=1.5, label=name)
        if played:
            axes.plot(
                [played["env_steps"]], [played["mean"]], "D", color=colour, markersize=9, markeredgecolor="black", clip_on=False, zorder=3,
                label=score if len(runs) == 1 else "",
            )  # fmt: skip
    if reference := ATARI_100K.get(runs[0].env):
        axes.axhline(reference.human, color="0.35", linestyle="--", linewidth=1, label=f"human: {reference.human:g}")
        axes.axhline(reference.random, color="0.35", linestyle=":", linewidth=1, label=f"random: {reference.random:g}")
    finish(axes, "Return of whole games", "score, not clipped")
    # Below the panel, where it covers no curve.
    axes.legend(fontsize=9, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)


def finish(axes: Any, title: str, unit: str) -> None:
    """Names and scales of a panel."""
    from matplotlib.ticker import EngFormatter

    axes.set_title(title, fontsize=11)
    axes.set_xlabel("environment steps")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 2.5k, 100k, 1.2M
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


@dataclass
class Arguments:
    """Draw the learning curve of one or several runs, and print their table for BENCHMARKS.md."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs."""
    out: Path | None = None
    """Where OUT.csv and OUT.png go; default: docs/runs/ and the names of the runs."""
    labels: tuple[str, ...] = ()
    """A name for each run; default: its folder's, or its path where two folders have one name."""
    picture: bool = True
    """Draw OUT.png, which needs matplotlib."""


def write(arguments: Arguments) -> tuple[list[Recorded], Sequence[str], list[Path]]:
    """Write the CSV and the picture; returns the runs, their labels and the files. Writes nothing if an argument is wrong.

    Raises:
        RunError: one line.
        OSError: the files cannot be written.
    """
    names = [folder.resolve().name for folder in arguments.runs]
    labels = arguments.labels or (names if len(set(names)) == len(names) else [str(folder) for folder in arguments.runs])
    if not names or len(labels) != len(names):
        raise RunError(f"--labels: {len(labels)} for {len(names)} runs; give at least one run, and a label for each or none")
    runs = [read(folder) for folder in arguments.runs]
    if odd := next((run for run in runs if run.env != runs[0].env), None):
        raise RunError(f"{odd.folder}: is of {odd.env}, and {runs[0].folder} of {runs[0].env}; give runs of one environment")
    out = arguments.out or Path("docs/runs") / "_".join(names)
    files = {out.with_name(out.name + ".csv"): to_csv(runs, labels).encode()}
    if arguments.picture:
        try:
            picture = io.BytesIO()
            figure_of(runs, labels).savefig(picture, format="png")
            files[out.with_name(out.name + ".png")] = picture.getvalue()
        except ImportError:
            raise RunError("matplotlib is missing: pip install 'speedyzero[plot]', or give --no-picture") from None
    out.parent.mkdir(parents=True, exist_ok=True)
    for path, content in files.items():
        with replacing(path) as file:
            file.write(content)
    return runs, labels, list(files)


def main() -> None:
    arguments = tyro.cli(Arguments, prog="curve")
    try:
        runs, labels, written = write(arguments)
    except RunError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: --out {arguments.out}: {error.strerror or error} ({error.filename}); give another")
    for run in runs:
        if run.left_out:
            print(f"{run.folder / 'metrics.jsonl'}: left out {run.left_out} unreadable or repeated lines", file=sys.stderr)
    print(f"wrote {' and '.join(map(str, written))}")
    print(table(runs, labels))


if __name__ == "__main__":
    main()
